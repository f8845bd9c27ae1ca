"""The W&B API key: where it may come from, and where it must not go.

It comes from the environment or from a ``.env`` that nobody else can read. It must not get into
the config, which is recorded and uploaded.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvpipe.errors import InputError

API_KEY = "WANDB_API_KEY"
REDACTED = "<redacted>"
_OTHERS_BITS = 0o077
# W&B's keys have at least 40 characters; a much shorter one would be found in any text.
_SHORTEST_KEY = 20
_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)")
_QUOTED = re.compile(r"""(?P<quote>['"])(?P<value>.*?)(?P=quote)\s*(?:\#.*)?""")
# "token" counts only as the whole name or its last word: max_new_tokens is no secret.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret)_?key|token|secret|passw(?:or)?d|credentials?)$"
)


def wandb_api_key(directory: Path, environ: Mapping[str, str]) -> str | None:
    """Return the W&B API key of the environment, else that of ``directory/.env``, else None.

    Raises:
        InputError: others may read the ``.env``, or one of its lines is not KEY=VALUE.
    """
    if key := environ.get(API_KEY, "").strip():
        return key
    path = directory / ".env"
    if not path.is_file():
        return None
    return _read_env_file(path).get(API_KEY) or None


def refuse_secrets(config: Mapping[str, Any], api_key: str | None) -> None:
    """Refuse a config that holds a secret.

    Raises:
        InputError: an option is named like a secret and has a value, or a value holds the API key.
    """
    for path, value in _leaves(config, ""):
        if _is_secret(path, value, api_key):
            raise InputError(
                f"{path}: this looks like a secret, and the config is recorded and uploaded; "
                f"give it through the environment instead (W&B: {API_KEY})"
            )


def redacted(config: Mapping[str, Any], api_key: str | None) -> dict[str, Any]:
    """Return the config with :data:`REDACTED` in place of what :func:`refuse_secrets` refuses."""

    def clean(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(item, _below(path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return REDACTED if _is_secret(path, value, api_key) else value

    return clean(config, "")


def _is_secret(path: str, value: Any, api_key: str | None) -> bool:
    key = api_key if api_key and len(api_key) >= _SHORTEST_KEY else None
    name = re.split(r"[.\[]", path)[-1].lower().replace("-", "_")
    named_so = value not in (None, "") and _SECRET_NAME.search(name) is not None
    return named_so or (key is not None and key in str(value))


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _read_env_file(path: Path) -> dict[str, str]:
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS_BITS:
        raise InputError(
            f"{path}: its mode is {mode:03o}, so others may read or change the keys in it; "
            f"run: chmod 600 {path}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        # The decoder's own message shows bytes of the file, so it is not passed on.
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.startswith("#"):
            name, value = _parse(text, f"{path}, line {number}")
            values[name] = value
    return values


def _parse(text: str, where: str) -> tuple[str, str]:
    """Return name and value of a line; messages never show its content."""
    line = _LINE.fullmatch(text)
    if line is None:
        raise InputError(f"{where}: it has to be KEY=VALUE, a comment or empty")
    value = line["value"]
    if value[:1] not in ("'", '"'):
        return line["name"], re.split(r"\s+#", value, maxsplit=1)[0].strip()
    quoted = _QUOTED.fullmatch(value)
    if quoted is None:
        raise InputError(f"{where}: the value's quotes have to be closed at its end")
    return line["name"], quoted["value"]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each scalar in nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, _below(path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
