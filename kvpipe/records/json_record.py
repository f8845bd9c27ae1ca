"""Base of the records that are written as one JSON line each."""

import json
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any


class JsonRecord(ABC):
    """A record that keeps its JSON line: it is serialised once, or not at all if it was read."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the record."""

    @cached_property
    def line(self) -> str:
        """The record as one JSON line, without its newline."""
        # ASCII: some readers split lines at U+2028, which a text may contain.
        return json.dumps(self.to_json(), allow_nan=False)
