"""The W&B API key and other secrets: where they may come from, and where they must not go.

The key comes from the environment or from a ``.env`` that nobody else can read. Secrets must not
reach the config, which is recorded and uploaded, nor records, logs or messages.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpipe.errors import InputError

API_KEY = "WANDB_API_KEY"
REDACTED = "[redacted]"
_OTHERS_BITS = 0o077
# W&B keys have at least 40 characters; a much shorter value would match in any text.
_SHORTEST_KEY = 20
_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)")
_QUOTED = re.compile(r"""(?P<quote>['"])(?P<value>.*?)(?P=quote)\s*(?:\#.*)?""")
# "token" counts only as the whole name or its last word: max_new_tokens is not a secret.
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret)_?key|token|secret|passw(?:or)?d|credentials?)$"
)


def wandb_api_key(directory: Path, environ: Mapping[str, str]) -> str | None:
    """Return the W&B API key of the environment, else of ``directory/.env``, else None.

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
    """Refuse a config that contains a secret.

    Raises:
        InputError: an option with a secret's name has a value, or a value contains the API key.
    """
    key = api_key if api_key and len(api_key) >= _SHORTEST_KEY else None
    for path, value in _leaves(config, ""):
        # A step may be called "my_token", and have a time limit; a limit is a float.
        can_be = value not in (None, "") and not isinstance(value, float)
        named_so = can_be and _names_a_secret(re.split(r"[.\[]", path)[-1])
        if named_so or (key and key in str(value)):
            raise InputError(
                f"{path}: this looks like a secret, and the config is recorded and uploaded; "
                f"give it through the environment instead (W&B: {API_KEY})"
            )


@dataclass(frozen=True)
class Redactor:
    """Redacts secrets in texts and files.

    Attributes:
        secrets: their values.
    """

    secrets: tuple[str, ...] = ()

    def text(self, text: str) -> str:
        """Return ``text`` with each secret replaced by a mark; the text may be JSON."""
        for secret in self.secrets:
            text = text.replace(secret, REDACTED).replace(json.dumps(secret)[1:-1], REDACTED)
        return text

    def file(self, path: Path) -> None:
        """Redact a file in place, if it exists and contains a secret.

        Raises:
            OSError: it cannot be written, e.g. because the disk is full.
        """
        if not (self.secrets and path.is_file()):
            return
        content = before = path.read_bytes()
        for secret in self.secrets:
            content = content.replace(secret.encode(), REDACTED.encode())
        if content != before:
            path.write_bytes(content)


def redactor(environ: Mapping[str, str], api_key: str | None) -> Redactor:
    """Return a redactor for the API key and every secret of the environment.

    A variable is a secret if its name says so, e.g. ``HF_TOKEN``, and its value is not much shorter
    than a key: a short value would match in any text.
    """
    named = (value.strip() for name, value in environ.items() if _names_a_secret(name))
    found = {value for value in (api_key or "", *named) if len(value) >= _SHORTEST_KEY}
    return Redactor(tuple(sorted(found, key=len, reverse=True)))


def _names_a_secret(name: str) -> bool:
    return _SECRET_NAME.search(name.lower().replace("-", "_")) is not None


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
        # The decoder's own message shows bytes of the file, so it is not included.
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
        raise InputError(f"{where}: it must be KEY=VALUE, a comment or empty")
    value = line["value"]
    if value[:1] not in ("'", '"'):
        return line["name"], re.split(r"\s+#", value, maxsplit=1)[0].strip()
    quoted = _QUOTED.fullmatch(value)
    if quoted is None:
        raise InputError(f"{where}: the value's quotes must be closed at its end")
    return line["name"], quoted["value"]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each scalar in nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
