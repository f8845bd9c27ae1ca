"""Sizes as people read them; everywhere else they are integers in bytes."""

_GIB = 1024**3


def gib(size: int) -> str:
    """Return bytes as GiB in five characters, for anything below 100 TiB."""
    amount = size / _GIB
    digits = 3 if amount < 9.9995 else 2 if amount < 99.995 else 1 if amount < 999.95 else 0
    return f"{amount:.{digits}f}"
