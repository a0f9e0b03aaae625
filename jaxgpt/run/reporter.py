"""A run's steps, as they are shown and logged: the bar or lines, metrics, skipped steps."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxgpt.config.resolved import Resolved
from jaxgpt.errors import UserError
from jaxgpt.planning.gpus import lookup_gpu
from jaxgpt.planning.speed import peak_of, reached_mfu
from jaxgpt.run import device as hardware
from jaxgpt.run.console import LiveConsole, duration

if TYPE_CHECKING:  # it imports tensorboardX, which comes after the command line
    from jaxgpt.run.metrics import MetricsLog

IN_A_ROW = 10  # after so many skipped steps, the run is not expected to recover


class DivergedError(UserError):
    """Every recent step was skipped; the message names the steps and the remedy."""


class Reporter(LiveConsole):
    """Shows each step's metrics on the console and writes them to the log."""

    def __init__(
        self, cfg: Resolved, device: Any, log: "MetricsLog", skips: "SkipCounter", start: int
    ):
        """`start` is the step that the run begins or resumes at."""
        left = "step {task.completed:,}/{task.total:,}"
        super().__init__(left, start, cfg.max_iters, "compiling")
        self._cfg, self._device, self._log, self._skips = cfg, device, log, skips
        self.pace = Pace(cfg.tokens_per_step)
        gpu = lookup_gpu(device.device_kind)
        self._peak_flops = peak_of(gpu, cfg.dtype, cfg.batch.devices)

    def read(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Wait for the metrics of `step`, show them, and return what is to be logged.

        Raises:
            DivergedError: if too many steps in a row were skipped.
        """
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        self.pace.lap()
        status = " · ".join(self._status(step, values["train/loss"]))
        self._bar.update(self._task, completed=step, status=status)
        scalars = {**values, **self._speed(), **hardware.memory_in_use(self._device)}
        try:
            if message := self._skips.note(step, values):
                self.say(message)
        except DivergedError:
            self._log.scalars(step, scalars)
            raise
        return scalars

    def is_logged(self, step: int) -> bool:
        """Whether the step is one of every log_interval."""
        return step % self._cfg.asked.log_interval == 0

    def log_if_due(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log at every log_interval; without a bar, print a line too."""
        if not self.is_logged(step):
            return
        self._log.scalars(step, scalars)
        if not self.console.is_terminal:
            where = f"step {step:,}/{self._cfg.max_iters:,}"
            self.say("  ".join([where, *self._status(step, scalars["train/loss"])]))

    def _status(self, step: int, loss: float) -> list[str]:
        if self.pace.tokens_per_second is None:
            return [f"loss {loss:.4f}"]
        steps_left = self._cfg.max_iters - step
        evaluations_left = -(-steps_left // self._cfg.asked.eval_interval)
        eta = duration(self.pace.eta(steps_left, evaluations_left))
        return [f"loss {loss:.4f}", f"{self.pace.tokens_per_second:,.0f} tokens/s", f"{eta} to go"]

    def _speed(self) -> dict[str, float]:
        tokens_per_second = self.pace.tokens_per_second
        if tokens_per_second is None:
            return {}
        values = {"speed/tokens_per_second": tokens_per_second}
        if self._peak_flops is not None:
            model = self._cfg.model
            values["speed/mfu"] = reached_mfu(tokens_per_second, model, self._peak_flops)
        return values

    def evaluated(
        self, step: int, scores: Mapping[str, float], scalars: Mapping[str, float] | None = None
    ) -> float:
        """Print and log an evaluation, with the step's own `scalars`; returns the loss."""
        others = [f"  {name} {value:.4f}" for name, value in scores.items() if name != "val/loss"]
        self.say(f"step {step:,}  validation loss {scores['val/loss']:.4f}{''.join(others)}")
        self._log.scalars(step, {**(scalars or {}), **scores})
        return scores["val/loss"]


class Pace:
    """Seconds per step and time left, from the steps only: evaluations and saves do not count."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._since: float | None = None
        self._seconds_per_step = 0.0
        self._pause = 0.0  # seconds that the last evaluation took, with its save

    def lap(self) -> None:
        """Count one step since the last lap; the first lap only starts the clock."""
        since, self._since = self._since, time.monotonic()
        if since is None:
            return
        seconds = self._since - since
        if not self._seconds_per_step:
            self._seconds_per_step = seconds
        # An average over some twenty steps: steady enough to read, and soon up to date.
        self._seconds_per_step += 0.05 * (seconds - self._seconds_per_step)

    def leave_out_pause(self, evaluated: bool = True) -> None:
        """Leave out the time since the last lap, of a save or (`evaluated`) an evaluation."""
        now = time.monotonic()
        if evaluated:
            self._pause = now - (self._since or now)
        self._since = now

    @property
    def tokens_per_second(self) -> float | None:
        """None before the second step of the process."""
        return self._tokens_per_step / self._seconds_per_step if self._seconds_per_step else None

    def eta(self, steps_left: int, pauses_left: int) -> float:
        """Seconds to the end of the run."""
        return steps_left * self._seconds_per_step + pauses_left * self._pause


class SkipCounter:
    """Detects skipped steps from the metrics of every step, in order."""

    def __init__(self, skipped: int, overflows: int = 0):
        """The numbers of skipped steps and of float16 overflows so far, from the checkpoint."""
        self._skipped, self._overflows, self._in_a_row = skipped, overflows, 0

    def note(self, step: int, scalars: Mapping[str, float]) -> str | None:
        """A message if `step` was skipped; DivergedError if it was the tenth in a row.

        Overflows of scaled gradients in float16 are expected, and no reason to stop.
        """
        overflows = int(scalars.get("train/overflows", 0))
        if overflows > self._overflows:
            self._overflows = overflows
            scale = scalars["train/loss_scale"]
            return (
                f"step {step:,} skipped: a gradient overflowed float16; the loss scale is now "
                f"{scale:,g} ({overflows:,} so far)"
            )
        skipped = int(scalars["train/skipped_steps"])
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if not self._in_a_row:
            return None
        if self._in_a_row >= IN_A_ROW:
            first = step - IN_A_ROW + 1
            raise DivergedError(
                f"{IN_A_ROW} steps in a row, {first:,} to {step:,}, were skipped: their loss or "
                "gradient was not finite, or a spike. The run is stopped; its checkpoints are from "
                "before. The same command would reach the same steps: resume with a smaller "
                "--learning-rate, or check the data"
            )
        loss, norm = scalars["train/loss"], scalars["train/grad_norm"]
        return f"step {step:,} skipped: loss {loss:g}, gradient norm {norm:g} ({skipped:,} so far)"
