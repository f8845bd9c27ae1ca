"""The two sides of a comparison of plans: files of a git revision, or those that are here.

A revision's code, phases and configs are unpacked into a scratch folder and planned by its own
command line, with the engine that is installed here: so a change of a phase's declared effect shows
as well as one of a config. The user's work tree and index are never touched.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

import kvpipe
from kvpipe.errors import InputError
from kvpipe.records import planned_from_json
from kvpipe.report.plan_changes import Change, Planned
from kvpipe.schema import ComparePlansConfig

_PACKAGES = ("kvpipe", "phases", "conf")


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        name: what it is called, e.g. ``origin/main (1a2b3c4)``.
        root: folder with kvpipe, phases and conf.
        arguments: overrides and flags that its plans have.
    """

    name: str
    root: Path
    arguments: Sequence[str]

    def experiments(self) -> list[str]:
        """Return the names of the experiments that it has."""
        return sorted(path.stem for path in (self.root / "conf/experiment").glob("*.yaml"))

    def plan(self, experiments: Sequence[str]) -> dict[str, Planned]:
        """Return the config and the plan of each experiment.

        Raises:
            InputError: one of them cannot be planned.
        """
        if not experiments:
            return {}
        # Flags first: argparse takes none between overrides.
        chosen = f"+experiment={','.join(experiments)}"
        shown = self._kvpipe("plan", "-m", *self.arguments, chosen, "plan.format=json")
        plans = [planned_from_json(json.loads(line)) for line in shown.splitlines()]
        return {
            name: Planned(self._config(name), plan)
            for name, plan in zip(experiments, plans, strict=True)
        }

    def _config(self, experiment: str) -> Mapping[str, object]:
        chosen = f"+experiment={experiment}"
        shown = self._kvpipe("--cfg", "job", "--resolve", *self.arguments, chosen)
        return yaml.safe_load(shown)

    def _kvpipe(self, *arguments: str) -> str:
        """Return the stdout of this side's command line; a plan that does not fit is no error."""
        done = subprocess.run(
            [sys.executable, "-m", "kvpipe", *arguments],
            # Safe path: the working directory may hold another side's packages.
            env=os.environ | {"PYTHONPATH": str(self.root), "PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode > 1:
            raise InputError(f"{self.name} cannot be planned: {done.stderr.strip()}")
        return done.stdout


def sides(
    config: ComparePlansConfig, overrides: Sequence[str], config_dir: str | None, scratch: Path
) -> tuple[Side, Side]:
    """Return the sides before and after the change.

    Args:
        config: which revisions and overrides.
        overrides: overrides that both sides have.
        config_dir: directory of further configs, of both sides.
        scratch: folder to unpack revisions in.

    Raises:
        InputError: this is no git repository, or it has no such revision of kvpipe.
    """
    common = [*(["--config-dir", config_dir] if config_dir else []), *overrides]
    base = config.base
    if base is None and config.head is None and not config.overrides:
        base = "HEAD"
    before, after = _side(base, common, scratch), _side(config.head, common, scratch)
    if config.overrides:
        name = f"{after.name} with {', '.join(f'`{text}`' for text in config.overrides)}"
        after = Side(name, after.root, [*common, *config.overrides])
    return before, after


def changes(before: Side, after: Side, experiments: Sequence[str] | None) -> list[Change]:
    """Return the change of each experiment.

    Args:
        before: the one side.
        after: the other; both are planned at the same time.
        experiments: which; None are all of both sides.

    Raises:
        InputError: one of them cannot be planned.
    """
    chosen = [experiments or side.experiments() for side in (before, after)]
    with ThreadPoolExecutor() as pool:
        old, new = pool.map(Side.plan, (before, after), chosen)
    return [Change(name, old.get(name), new.get(name)) for name in sorted({**old, **new})]


def _side(revision: str | None, arguments: Sequence[str], scratch: Path) -> Side:
    """Return the side of a git revision, or without one of the files that this process runs."""
    if revision is None:
        return Side("the files here", Path(kvpipe.__file__).parents[1], arguments)
    found = _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    commit = found.decode().strip()
    root = scratch / commit
    top = _git("rev-parse", "--show-toplevel").decode().strip()
    archive = _git("-C", top, "archive", commit, *_PACKAGES)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(root, filter="data")
    return Side(f"{revision} ({commit[:7]})", root, arguments)


def _git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise InputError("compare: there is no git here") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"compare: git says: {error.stderr.decode().strip()}") from None
