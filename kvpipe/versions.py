"""Which versions a run uses, as installed; found without importing any of them."""

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
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
