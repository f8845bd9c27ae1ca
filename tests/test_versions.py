import platform

from kvpipe.versions import installed_versions


def test_the_versions_are_those_that_are_installed():
    import jax

    found = installed_versions()
    assert found["python"] == platform.python_version()
    assert found["jax"] == jax.__version__
    assert found["sglang-jax"] == "0.0.2"


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr("kvpipe.versions._PACKAGES", ("numpy", "no-such-package"))
    assert list(installed_versions()) == ["python", "numpy"]
