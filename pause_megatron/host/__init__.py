"""Processes of this host: liveness, ancestors, and the launcher of a rank."""
