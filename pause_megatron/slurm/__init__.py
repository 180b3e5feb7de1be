"""SLURM jobs: scripts from one template, calls of SLURM's commands, and checks before submission."""
