"""What a person is told of wrong input."""

from collections.abc import Callable
from typing import Any

import pytest

from kvpipe.errors import InputError


def refusal(act: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Call ``act``, which has to refuse its input, and return the message."""
    with pytest.raises(InputError) as caught:
        act(*arguments, **options)
    return str(caught.value)
