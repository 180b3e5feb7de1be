"""Text to micro-batches: a folder for each step of the way, as README.md lists them."""
