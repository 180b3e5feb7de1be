"""Where data, model and engine meet."""
