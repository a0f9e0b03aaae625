"""A run's saves: checkpoints, with metrics and configuration, in the order that loses nothing."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.resolved import Resolved
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.folder import CONFIG_FILE, save_config

if TYPE_CHECKING:
    from jaxgpt.run.metrics import MetricsLog
    from jaxgpt.training.step import TrainState


class Saver:
    """Saves a run's state in the background, its metrics and its configuration with it."""

    def __init__(
        self, checkpoints: Checkpoints, log: "MetricsLog", cfg: Resolved, data: dict[str, Any]
    ):
        """`data` identifies the run's data. Writes config.json; raises ConfigError if it cannot."""
        self._checkpoints, self._log, self._cfg, self._data = checkpoints, log, cfg, data
        if checkpoints.processes.is_main:
            save_config(cfg)

    def begin(self, state: "TrainState") -> None:
        """Begin to save `state`, whose arrays may be donated as soon as this returns."""
        self._checkpoints.begin(state, config=self._cfg.flat(), data=self._data)
        if self._checkpoints.processes.is_main and not (self._cfg.out_dir / CONFIG_FILE).exists():
            with suppress(ConfigError):  # somebody deleted it; what fails now may work next time
                save_config(self._cfg)

    def finish(self, val_loss: float | None) -> None:
        """Make a checkpoint of the save that has begun; `val_loss` None if not evaluated."""
        self._log.flush()  # first, so that a checkpoint's metrics are never missing
        self._checkpoints.finish(val_loss)

    def is_due(self) -> bool:
        """Whether to begin a save for the sake of time alone."""
        return self._checkpoints.due(self._cfg.asked.checkpoint_minutes)

    def poll(self) -> None:
        """Report a save that has failed since it was started."""
        self._checkpoints.poll()

    def settle(self) -> None:
        """Return when the newest save is on disk or has failed."""
        self._checkpoints.settle()

    def wait(self) -> None:
        """Return when the newest save is on disk; CheckpointError if it is not."""
        self._checkpoints.wait()
