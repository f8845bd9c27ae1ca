"""Plan the experiments of two git revisions, or of the files here, to compare them.

A revision's code, phases and configs are unpacked into a scratch folder and planned by its own
command line, with the installed engine, so that a change of a phase's declared effect shows as well
as a change of a config. The user's work tree and index stay untouched.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

from kvpipe.config.schema import ComparePlansConfig
from kvpipe.errors import InputError
from kvpipe.records.run import RunPlanned
from kvpipe.report.comparison import PlanChange
from kvpipe.report.side import Side, plan_side
from kvpipe.system.places import PACKAGE, place_of

_PACKAGES = ("kvpipe", "phases", "conf")


@dataclass(frozen=True)
class Revision:
    """One side: its name, e.g. ``origin/main (1a2b3c4)``, its folder, and how to plan it.

    The folder has kvpipe, phases and conf; the arguments are overrides and flags of its plans.
    """

    name: str
    root: Path
    arguments: Sequence[str]

    def experiments(self) -> list[str]:
        """Return the names of its experiments."""
        return sorted(
            path.stem
            for path in (place_of("conf", self.root / "kvpipe") / "experiment").glob("*.yaml")
        )

    def plan(self, experiments: Sequence[str]) -> dict[str, Side]:
        """Return each experiment's side of the comparison.

        Raises:
            InputError: one of them cannot be planned.
        """
        if not experiments:
            return {}
        # Flags first: argparse takes none between overrides.
        chosen = f"+experiment={','.join(experiments)}"
        shown = self._kvpipe("plan", "-m", *self.arguments, chosen, "plan.format=json")
        plans = [RunPlanned.from_json(json.loads(line)) for line in shown.splitlines()]
        return {
            name: plan_side(self.name, plan, self._config(name))
            for name, plan in zip(experiments, plans, strict=True)
        }

    def _config(self, name: str) -> dict[str, object]:
        chosen = f"+experiment={name}"
        return yaml.safe_load(self._kvpipe("--cfg", "job", "--resolve", *self.arguments, chosen))

    def _kvpipe(self, *arguments: str) -> str:
        """Return the stdout of this revision's command line, also of a plan that does not fit."""
        done = subprocess.run(
            [sys.executable, "-m", "kvpipe", *arguments],
            # Safe path: the working directory may hold another revision's packages.
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
) -> tuple[Revision, Revision]:
    """Return the files before and after the change.

    The overrides and the directory of further configs are those of both sides; ``config`` may have
    more overrides for the side after the change. Revisions are unpacked in ``scratch``.

    Raises:
        InputError: this is no git repository, or it has no such revision of kvpipe.
    """
    common = [*(["--config-dir", config_dir] if config_dir else []), *overrides]
    base = config.base
    if base is None and config.head is None and not config.overrides:
        base = "HEAD"
    before = _side("base", base, common, scratch)
    after = _side("head", config.head, common, scratch)
    if config.overrides:
        name = f"{after.name} with {', '.join(f'`{text}`' for text in config.overrides)}"
        after = Revision(name, after.root, [*common, *config.overrides])
    return before, after


def changes(
    before: Revision, after: Revision, experiments: Sequence[str] | None
) -> list[PlanChange]:
    """Return the change of each named experiment, or of all; both sides are planned in parallel.

    Raises:
        InputError: one of them cannot be planned.
    """
    chosen = [experiments or revision.experiments() for revision in (before, after)]
    with ThreadPoolExecutor() as pool:
        old, new = pool.map(Revision.plan, (before, after), chosen)
    return [PlanChange(name, old.get(name), new.get(name)) for name in sorted({**old, **new})]


def _side(key: str, revision: str | None, arguments: Sequence[str], scratch: Path) -> Revision:
    """Return the files of the git revision that is the value of ``key``, or of this process."""
    if revision is None:
        return Revision("the files here", PACKAGE.parent, arguments)
    top = _top(key, revision)
    commit = _commit(key, revision, top)
    archive = _archive(key, revision, commit, top)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(scratch / commit, filter="data")
    return Revision(f"{revision} ({commit[:7]})", scratch / commit, arguments)


def _top(key: str, revision: str) -> str:
    found = _git("rev-parse", "--show-toplevel")
    if found.returncode:
        raise InputError(
            f"compare_plans.{key} is {revision!r}, a git revision, but {Path.cwd()} is in no git "
            f"repository ({_why(found)}); run this in a clone of kvpipe, or leave "
            f"compare_plans.{key} out and set compare_plans.overrides to compare the files here"
        )
    return found.stdout.decode().strip()


def _commit(key: str, revision: str, top: str) -> str:
    asked = ["rev-parse", "--quiet", "--verify", "--end-of-options", f"{revision}^{{commit}}"]
    found = _git("-C", top, *asked)
    if found.returncode:
        raise InputError(
            f"compare_plans.{key}: {top} has no revision {revision!r}; right are a commit, a tag or "
            "a branch that it has, e.g. HEAD; git fetch gets those of its remote"
        )
    return found.stdout.decode().strip()


def _archive(key: str, revision: str, commit: str, top: str) -> bytes:
    found = _git("-C", top, "archive", commit, *_PACKAGES)
    if found.returncode:
        raise InputError(
            f"compare_plans.{key} is {revision!r}, but {top} does not have kvpipe's "
            f"{', '.join(_PACKAGES)} in it ({_why(found)}); choose a revision of kvpipe"
        )
    return found.stdout


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        raise InputError("compare-plans: there is no git here; install it") from None


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return git's own reason."""
    return " ".join(done.stderr.decode(errors="replace").removeprefix("fatal: ").split())
