"""Attach to an engine in the caller's own process; ``kvpipe/__init__.py`` names what is public."""
