"""What a run writes and shows: metrics.jsonl, TensorBoard, the terminal."""
