"""Standard output and standard error: streams that may fail, and progress bars. No torch."""
