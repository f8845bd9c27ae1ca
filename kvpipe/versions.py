"""Which versions a run uses, as installed; found without importing any of them."""

import json
import platform

# What the bytes, the programs and the outputs of a run depend on.
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
    # Imported here: it takes longer than all else that `--help` needs of kvpipe.
    from importlib.metadata import PackageNotFoundError

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:
            continue
    return found


def version_of(package: str) -> str:
    """Return the version of an installed package; of one from git with its commit.

    The version alone does not tell: many commits of sglang-jax after 0.0.2 call themselves 0.0.2.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    from importlib.metadata import distribution

    installed = distribution(package)
    # PEP 610: pip and uv write where they have a package from, unless it is from an index.
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    return f"{installed.version} (git {commit[:12]})" if commit else installed.version
