"""The message that a person gets about wrong input."""

from collections.abc import Callable
from typing import Any

import pytest

from kvpipe.errors import InputError


def refusal(act: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Call ``act``, which must refuse its input, and return the message."""
    with pytest.raises(InputError) as caught:
        act(*arguments, **options)
    return str(caught.value)
