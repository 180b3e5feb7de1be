"""Processes of this machine: who runs, who started whom, and the launcher above the ranks. No torch."""
