import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm


@pytest.fixture(scope="module")
def cluster():
    """A SLURM of one node with one TPU, and with processors enough for whatever is asked."""
    if lacking := slurm.missing():
        missing = f"no {', '.join(lacking)} on this machine; .ci/slurm installs SLURM and MUNGE"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="kvpipe-slurm-"))
    try:
        with slurm.start(folder, cpus=8, memory_mb=64_000) as running:
            yield running
    finally:
        shutil.rmtree(folder)
