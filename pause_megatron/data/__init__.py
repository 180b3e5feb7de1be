"""Text to micro-batches: the folders are named after the steps of the way, see README.md."""
