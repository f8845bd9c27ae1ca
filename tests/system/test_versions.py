import json
import platform

import pytest

from kvpipe.system.versions import installed_versions, version_of


def test_the_versions_are_those_that_are_installed():
    import jax

    found = installed_versions()
    assert found["python"] == platform.python_version()
    assert found["jax"] == jax.__version__
    assert found["sglang-jax"] == "0.0.2"


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr("kvpipe.system.versions._PACKAGES", ("numpy", "no-such-package"))
    assert list(installed_versions()) == ["python", "numpy"]


GIT = {"url": "https://git.test/engine", "vcs_info": {"vcs": "git", "commit_id": "c0ffee" * 6}}


@pytest.mark.parametrize(
    ("origin", "reported"),
    [
        (None, "0.0.2"),
        ({"url": "file:///src/engine", "dir_info": {}}, "0.0.2"),
        (GIT, "0.0.2 (git c0ffeec0ffee)"),
    ],
)
def test_two_commits_with_one_version_are_distinguished(tmp_path, monkeypatch, origin, reported):
    """Commits of sglang-jax after 0.0.2 call themselves 0.0.2 too."""
    info = tmp_path / "some_engine-0.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-engine\nVersion: 0.0.2\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    assert version_of("some-engine") == reported
