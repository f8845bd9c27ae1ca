"""Frozen records of what happened; every sink and report reads these and nothing else."""
