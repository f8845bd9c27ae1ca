"""Sweeps: the config that their jobs share, the list of the jobs, and the summary of their records."""
