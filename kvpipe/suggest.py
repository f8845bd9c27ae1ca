"""Suggest the nearest valid names for a wrong one."""

import difflib
from collections.abc import Iterable


def nearest(wrong: str, valid: Iterable[str]) -> str:
    """Return a phrase for the end of an error: the close matches, else all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(wrong, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    return f"valid are: {', '.join(names) or 'none'}"
