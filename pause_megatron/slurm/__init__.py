"""SLURM jobs: scripts from one template, SLURM's commands, and what can be checked before the queue. No torch."""
