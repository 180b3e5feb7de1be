"""Files: atomic writes, locks, paths, and text lines."""
