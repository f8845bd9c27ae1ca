"""The W&B API key and other secrets: where they may come from, and where they must not go.

The key comes from the environment or from a ``.env`` that nobody else can read. Secrets must not
reach the config, which is recorded and uploaded, nor records, logs or messages.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from kvpipe.errors import InputError

API_KEY = "WANDB_API_KEY"
REDACTED = "[redacted]"
_OTHERS_BITS = 0o077
# A value counts as a secret from this length on, or from the shorter one with letters and digits:
# "test", "1" and "offline" would match in any text, and a number in any record.
_SHORTEST = 20
_SHORTEST_MIXED = 8
_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)")
_QUOTED = re.compile(r"""(?P<quote>['"])(?P<value>.*?)(?P=quote)\s*(?:\#.*)?""")
# "token" counts only as the whole name or its last word: max_new_tokens is not a secret.
_SECRET_OPTION = re.compile(
    r"(?:^|_)(?:(?:api|access|private|secret)_?key|token|secret|passw(?:or)?d|credentials?)$"
)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:(?:api)?key|token|secret|passw(?:or)?d|passphrase|credentials?)$|_(?:pat|pwd)$"
)
_URL_PASSWORD = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")


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


def without_key(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child process, which must not see the W&B API key."""
    return {name: value for name, value in environ.items() if name != API_KEY}


@dataclass(frozen=True)
class Redactor:
    """Finds and redacts secrets, each the value of a variable, in texts and files."""

    secrets: Mapping[str, str] = field(default_factory=dict)

    def variable_in(self, text: str) -> str | None:
        """Return the variable whose value, or a reference to it, is in ``text``; None if none is."""
        for secret, variable in self.secrets.items():
            if secret in text or re.search(rf"\boc\.env:\s*{re.escape(variable)}\b", text):
                return variable
        return None

    def text(self, text: str) -> str:
        """Return ``text`` with each secret replaced by a mark; the text may be JSON."""
        for form in self._forms():
            text = text.replace(form, REDACTED)
        return text

    def file(self, path: Path) -> None:
        """Redact a file in place, if it exists and contains a secret.

        Raises:
            OSError: it cannot be written, e.g. because the disk is full.
        """
        if not (self.secrets and path.is_file()):
            return
        content = before = path.read_bytes()
        for form in self._forms():
            content = content.replace(form.encode(), REDACTED.encode())
        if content != before:
            path.write_bytes(content)

    def _forms(self) -> Iterator[str]:
        """Yield each secret as it is and as JSON writes it."""
        for secret in self.secrets:
            yield secret
            yield json.dumps(secret)[1:-1]


def redactor(environ: Mapping[str, str], api_key: str | None) -> Redactor:
    """Return a redactor for the API key and every secret of the environment.

    A variable is a secret if its name says so, e.g. ``HF_TOKEN``; the password within a URL is one
    too. A value that is short or a plain word would match in any text, so it is not looked for.
    """
    found = [(api_key or "", API_KEY)]
    for name, value in environ.items():
        if _SECRET_VARIABLE.search(_as_words(name)):
            found.append((value.strip(), name))
        found += [(password, name) for password in _URL_PASSWORD.findall(value)]
    # As a URL writes it, and as it is if a URL has it.
    found += [(form(value), name) for value, name in found for form in (_quoted, unquote)]
    found.sort(key=lambda pair: len(pair[0]), reverse=True)
    return Redactor({value: name for value, name in found if _can_be_found(value)})


def known_secrets(directory: Path, environ: Mapping[str, str], online: bool) -> Redactor:
    """Return a redactor for every secret that a run in ``directory`` would have.

    A ``.env`` that must be refused counts as empty here; the code that needs its key refuses it.
    """
    key = None
    if online:
        with suppress(InputError):
            key = wandb_api_key(directory, environ)
    return redactor(environ, key or environ.get(API_KEY))


def refuse_secrets(config: Mapping[str, Any], redact: Redactor) -> None:
    """Refuse a config that contains a secret, in a key or in a value.

    Raises:
        InputError: an option with a secret's name has a value, or a text contains a secret.
    """
    for path, value in _leaves(config, ""):
        refuse_secret(redact.text(path), f"{path} {value}", redact)
        option = re.split(r"[.\[]", path)[-1]
        if isinstance(value, str) and value and _SECRET_OPTION.search(_as_words(option)):
            raise InputError(
                f"{path}: this looks like a secret, and the config is recorded and uploaded; "
                f"give it through the environment instead (W&B: {API_KEY})"
            )


def refuse_secret(where: str, text: str, redact: Redactor) -> None:
    """Refuse a text that contains a secret.

    Raises:
        InputError: it does; the message names ``where`` and the variable, and shows no value.
    """
    if variable := redact.variable_in(text):
        raise InputError(
            f"{where}: this contains the secret in the variable {variable}, and would be recorded and "
            f"uploaded; take it out, or unset {variable} if it is not a secret"
        )


def _quoted(value: str) -> str:
    return quote(value, safe="")


def _can_be_found(value: str) -> bool:
    mixed = re.search(r"[^\W\d]", value) and re.search(r"\d", value)
    return len(value) >= (_SHORTEST_MIXED if mixed else _SHORTEST)


def _as_words(name: str) -> str:
    return name.lower().replace("-", "_")


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
    """Yield the path and value of each scalar or empty container in nested mappings and lists."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
