"""A run's saves: checkpoints, metrics and configuration, in an order in which nothing is lost."""

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
            with suppress(ConfigError):  # the user deleted it; the next save tries again
                save_config(self._cfg)

    def finish(self, val_loss: float | None) -> None:
        """Complete the save under way as a checkpoint; `val_loss` is None without an evaluation."""
        self._log.flush()  # first, so that a checkpoint's metrics are never missing
        self._checkpoints.finish(val_loss)

    def is_due(self) -> bool:
        """Whether checkpoint_minutes require a save now."""
        return self._checkpoints.due(self._cfg.asked.checkpoint_minutes)

    def poll(self) -> None:
        """Report the save under way if it has failed."""
        self._checkpoints.poll()

    def settle(self) -> None:
        """Wait until the newest save is on disk or has failed."""
        self._checkpoints.settle()

    def wait(self) -> None:
        """Wait until the newest save is on disk; CheckpointError if it failed."""
        self._checkpoints.wait()
