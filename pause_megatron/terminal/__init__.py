"""Standard output and standard error: streams that may fail, logging, and progress bars."""
