"""Keep compiled programs on disk, so that a later run loads them instead of compiling.

jax makes the keys and calls the store. jax's own store would wait for a lock at each read and look
at every entry at each write. It also writes in place: after a kill or a full disk in the middle of a
write it never writes again, and never replaces an entry that it cannot read.
"""

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size
_OF_JAX = "JAX_COMPILATION_CACHE_DIR"


def keep_in(directory: Path, max_bytes: int) -> None:
    """Let jax store the programs that this process compiles.

    With 0 bytes, or with jax's own variable, nothing is stored here. With that variable the engine
    turns on caches of XLA, which change the keys, only when it starts: a run would compile again
    what its plan has compiled. So they are turned on here.

    Call it before the first compilation.
    """
    import jax

    if os.environ.get(_OF_JAX):
        jax.config.update("jax_persistent_cache_enable_xla_caches", "all")
        return
    if not max_bytes:
        return
    from jax._src import compilation_cache

    compilation_cache.get_file_cache = lambda path: (Store(Path(path), max_bytes), path)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs too: there are many of them, and each loads faster than it compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Store:
    """A directory of entries by jax's keys, within ``max_bytes``: the least recently used go first.

    It serves several processes without a lock: a file appears complete, with a checksum, or not at
    all. A damaged entry counts as missing and is removed. No error of the disk reaches jax.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._path = directory  # jax names it in its log
        self._max_bytes = max_bytes
        self._used: int | None = None
        self._reported = False

    def get(self, key: str) -> bytes | None:
        """Return the entry of a key; None if there is none that can be read."""
        file = self._path / key
        try:
            content = file.read_bytes()
            value = content[_DIGEST_BYTES:]
            if hashlib.sha256(value).digest() != content[:_DIGEST_BYTES]:
                file.unlink(missing_ok=True)
                return None
        except FileNotFoundError:
            return None
        except OSError as error:
            return self._report("read", error)
        with suppress(OSError):  # on a disk that is read only
            os.utime(file)
        return value

    def put(self, key: str, value: bytes) -> None:
        """Store an entry, unless it cannot be written or exceeds the limit of the whole cache."""
        content = hashlib.sha256(value).digest() + value
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            if len(content) <= self._max_bytes:
                self._write(self._path / key, content)
        except OSError as error:
            self._report("write", error)

    def _write(self, file: Path, content: bytes) -> None:
        descriptor, part = tempfile.mkstemp(dir=self._path)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
            Path(part).replace(file)
        except BaseException:
            Path(part).unlink()
            raise

    def _make_room(self, size: int) -> None:
        """Remove the oldest files, a killed process's included, until ``size`` more bytes fit."""
        if self._used is None or self._used + size > self._max_bytes:
            files = sorted(self._files())
            self._used = sum(held for _, held, _ in files)
            for _, held, file in files:
                if self._used + size <= self._max_bytes:
                    break
                Path(file).unlink(missing_ok=True)
                self._used -= held
        self._used += size

    def _files(self) -> list[tuple[int, int, str]]:
        """Return time of use, size and path of each file; another process may remove some."""
        found: list[tuple[int, int, str]] = []
        with os.scandir(self._path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        return found

    def _report(self, verb: str, error: OSError) -> None:
        """Write the first error to the log of the engine; each program would have the same."""
        if not self._reported:
            self._reported = True
            print(f"kvpipe: cannot {verb} compiled programs: {error}", file=sys.stderr)
