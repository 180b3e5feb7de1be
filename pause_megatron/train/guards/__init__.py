"""What keeps a run safe: signals, hangs, one owner of the run folder, the same run on every rank."""
