"""Training: the stages of a run, the loop with its hooks, logs, checkpoints, and guards."""
