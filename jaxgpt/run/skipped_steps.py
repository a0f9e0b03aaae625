"""Skipped steps, as the host sees them: each is told, and too many in a row end the run."""

from collections.abc import Mapping

from jaxgpt.errors import UserError

IN_A_ROW = 10  # after so many nobody may hope that it passes


class DivergedError(UserError):
    """The run gets nowhere any more; the message says since when and what can be done."""


class SkipCounter:
    """Notices skipped steps in the metrics of each, in order."""

    def __init__(self, skipped: int):
        """`skipped`: how many were skipped before this process."""
        self._skipped, self._in_a_row = skipped, 0

    def note(self, step: int, scalars: Mapping[str, float]) -> str | None:
        """A sentence if `step` was skipped; DivergedError if it was the tenth in a row."""
        skipped = int(scalars["train/skipped_steps"])
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if not self._in_a_row:
            return None
        if self._in_a_row >= IN_A_ROW:
            first = step - IN_A_ROW + 1
            raise DivergedError(
                f"{IN_A_ROW} steps in a row, {first:,} to {step:,}, had a loss or gradient that is "
                "not finite or a spike, and were skipped; the run is stopped, and its checkpoints "
                "hold none of them. The same command would come to the same steps: "
                "go on with a smaller --learning-rate, or look at the data"
            )
        loss, norm = scalars["train/loss"], scalars["train/grad_norm"]
        return f"step {step:,} skipped: loss {loss:g}, gradient norm {norm:g} ({skipped:,} so far)"
