"""Parts of the command line that verbs share, and the larger part of a verb's output."""
