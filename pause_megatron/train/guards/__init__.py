"""Guards of a run: stop signals, a watchdog for hangs, one job per run folder, the same run on every rank."""
