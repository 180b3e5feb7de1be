"""What a run records and shows: metrics.jsonl, TensorBoard, and the terminal."""
