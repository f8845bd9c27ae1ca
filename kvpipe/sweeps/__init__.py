"""Sweeps: what their jobs share, which jobs there are, and what the records of all of them tell."""
