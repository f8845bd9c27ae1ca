"""Compare an installed sglang-jax with the supported: ``make upstream-watch PYTHON=.../python``.

It gathers the facts that the adapter relies on, prints their differences from the committed facts
of the supported version, and runs the adapter's contract tests. It exits 0 if the tests and the
adapter's steps pass, 1 if not; differences alone do not fail it.

    --facts-only    skip the contract tests
    --write         commit these facts as the supported version's: write the file, compare nothing
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.upstream_watch import changes

ROOT = Path(__file__).parents[2]
SUPPORTED = Path(__file__).with_name("supported.json")
CONTRACT = "tests/engine"
_PATCHES = "compat patches"
_TESTS_FAILED = 1  # pytest's exit code


def main() -> int:
    """Gather, compare, test; return the exit code."""
    parser = argparse.ArgumentParser(prog="make upstream-watch", allow_abbrev=False)
    parser.add_argument("--facts-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    facts = _facts()
    if facts is None:
        return 1
    broken = _broken(facts)
    if options.write:
        if broken:
            print("The adapter does not work with it, so nothing is written:", *broken, sep="\n  ")
            return 1
        SUPPORTED.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {SUPPORTED.relative_to(ROOT)}")
        return 0
    supported = json.loads(SUPPORTED.read_text(encoding="utf-8"))
    print(f"Supported: {_versions(supported)}\nInstalled: {_versions(facts)}\n\n{changes.LEGEND}\n")
    print("Patches of kvpipe/engine/compat.py:")
    for name, verdict in facts[_PATCHES].items():
        print(f"  {name}: {verdict}")
    for line in changes.lines(*map(_compared, (supported, facts))):
        print(line)
    codes = [1 if broken else 0]
    if not options.facts_only:
        codes.append(_contract())
    return max(codes)


def _facts() -> dict[str, Any] | None:
    """Return the installed version's facts; None, after printing its last output, if it died."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "facts.json"
        done = subprocess.run(
            [sys.executable, "-m", "tools.upstream_watch.facts", str(file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    print(f"The facts could not be gathered (exit code {done.returncode}):\n{done.stdout[-2000:]}")
    return None


def _broken(facts: dict[str, Any]) -> list[str]:
    """Return the failures: sections that could not be gathered, and the step that failed."""
    sections = [f"{name}: {s['failed']}" for name, s in facts.items() if "failed" in s]
    return sections + [f"{name}: {how}" for name, how in facts["steps"].items() if how != "works"]


def _compared(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the sections to compare, without those that are printed in full."""
    return {name: section for name, section in facts.items() if name not in ("versions", _PATCHES)}


def _versions(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items())


def _contract() -> int:
    """Run the adapter's contract tests; print the failed ones with their reasons, and the counts.

    Each file runs in a separate process, so that an engine that dies in one cannot fail the others:
    from bd09a87 on, all engines of a process share one event loop.
    """
    print(f"\nContract tests ({CONTRACT}):", flush=True)
    files = sorted((ROOT / CONTRACT).glob("test_*.py"))
    return max([_contract_of(file) for file in files])


def _contract_of(file: Path) -> int:
    options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--disable-warnings"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), *options],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "400"},  # pytest truncates reasons at the terminal's width
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    summary = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print(*summary, f"{file.name}: {lines[-1] if lines else 'no output'}", sep="\n", flush=True)
    if done.returncode not in (0, _TESTS_FAILED):
        print(f"pytest ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
