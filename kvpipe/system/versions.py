"""Installed versions of the packages that a run uses, found without importing them."""

import json
import platform
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import Distribution

# The packages that determine a run's bytes, programs and outputs.
_PACKAGES = (
    "kvpipe",
    "sglang-jax",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "transformers",
    "numpy",
    "wandb",
)


def installed_versions() -> dict[str, str]:
    """Return the version of Python and of each package that is installed."""
    # Imported here because it takes longer than everything else that `--help` needs of kvpipe.
    from importlib.metadata import PackageNotFoundError

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version_of(package)
    return found


def version_of(package: str) -> str:
    """Return the version of an installed package, with the commit if it is from git.

    The version alone is ambiguous: many commits of sglang-jax after 0.0.2 call themselves 0.0.2.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    from importlib.metadata import distribution

    return distribution_version(distribution(package))


def distribution_version(installed: "Distribution") -> str:
    """Return the version of a distribution, as :func:`version_of`."""
    # PEP 610: pip and uv record where a package comes from, unless it is from an index.
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"{installed.version} (git {commit[:12]})" if commit else installed.version
