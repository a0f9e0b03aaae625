"""Skipped steps: each is reported, and too many in a row end the run."""

from collections.abc import Mapping

from jaxgpt.errors import UserError

IN_A_ROW = 10  # after so many, the run is not expected to recover


class DivergedError(UserError):
    """Every recent step was skipped; the message names the steps and the remedy."""


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
