"""Files that survive crashes: atomic writes, locks, paths, lines of text. No torch."""
