"""Refuse a config that contains a secret before Hydra writes it to the run's directory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from kvpipe.config.schema import TrackingMode
from kvpipe.errors import InputError
from kvpipe.system.secrets import known_secrets, refuse_secret, refuse_secrets


class Refused(BaseException):
    """Ends Hydra from a callback, whose exceptions it turns into warnings; ``error`` says why."""

    def __init__(self, error: InputError) -> None:
        super().__init__(str(error))
        self.error = error


class RefuseSecrets(Callback):
    """Check what Hydra has composed: the config, its own part of it, and each override.

    The overrides of a sweep's jobs are among them, but not the config files that they choose.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check a run, or a sweep."""
        _check(OmegaConf.to_container(config))

    on_multirun_start = on_run_start


def _check(plain: Any) -> None:
    online = plain["tracking"]["mode"] is TrackingMode.online
    redact = known_secrets(Path.cwd(), os.environ, online)
    try:
        for override in _overrides(plain["hydra"]):
            refuse_secret(redact.text(override.partition("=")[0]), override, redact)
        refuse_secrets(plain, redact)
    except InputError as error:
        raise Refused(error) from None


def _overrides(hydra: Mapping[str, Any]) -> list[str]:
    params = hydra["sweeper"].get("params") or {}
    swept = [f"{key}={value}" for key, value in params.items()]
    return [*hydra["overrides"]["task"], *hydra["overrides"]["hydra"], *swept]
