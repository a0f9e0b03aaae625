"""Batch arithmetic: one optimizer step's sequences, divided over devices and micro-batches.

    effective_batch_size = batch_size x devices x accumulation

`batch_size` is what one device processes at a time and decides the memory; `effective_batch_size`
is what one optimizer step sees and decides the training. No other module divides one by the other.
"""

import math
from typing import Literal, NamedTuple

from jaxgpt.config.checks import ConfigError


class BatchError(ConfigError):
    """Sizes that do not divide evenly; the message names them and the nearest that do."""


class Batch(NamedTuple):
    """How the sequences of one optimizer step are divided."""

    batch_size: int  # sequences per device and micro-batch
    devices: int
    accumulation: int  # micro-batches per step

    @property
    def global_micro_batch(self) -> int:
        """Sequences of one micro-batch over all devices."""
        return self.batch_size * self.devices

    @property
    def effective(self) -> int:
        """Sequences of one optimizer step."""
        return self.global_micro_batch * self.accumulation

    def __str__(self) -> str:
        over = "" if self.devices == 1 else f"{self.devices} devices x "
        return f"batch_size {self.batch_size} x {over}{self.accumulation} accumulated"


def divide_batch(effective: int, batch_size: int, devices: int = 1) -> Batch:
    """Divide `effective` sequences into micro-batches of `batch_size` on each of `devices`.

    Raises:
        BatchError: if that leaves a remainder.
    """
    accumulation, remainder = divmod(effective, batch_size * devices)
    if remainder:
        each = f"batch_size {batch_size}" + (f" x {devices} devices" if devices > 1 else "")
        raise BatchError(
            f"effective_batch_size {effective} is not a multiple of {each}; "
            f"{_nearest(effective, batch_size, devices)}"
        )
    return Batch(batch_size, devices, accumulation)


def batch_sizes(effective: int, devices: int = 1) -> list[int]:
    """Every batch_size that divides `effective` sequences over `devices`, smallest first.

    Raises:
        BatchError: if the devices alone leave a remainder.
    """
    return divisors(divide_batch(effective, 1, devices).accumulation)


def fields_of_accumulation(
    accumulation: int | None, batch_size: int | Literal["auto"], effective: int | None
) -> dict[str, int | None]:
    """nanoGPT's gradient_accumulation_steps as the field effective_batch_size.

    `accumulation` counts the micro-batches of all devices. {} if it is unset, or contradicts the
    other two, which `Config` reports.
    """
    if accumulation is None or accumulation < 1 or batch_size == "auto":
        return {}
    product = accumulation * batch_size
    if effective not in (None, product):
        return {}
    return {"effective_batch_size": product, "gradient_accumulation_steps": None}


def divisors(value: int) -> list[int]:
    """Every divisor of a positive number, smallest first."""
    small = [k for k in range(1, math.isqrt(value) + 1) if value % k == 0]
    return sorted({d for k in small for d in (k, value // k)})


def nearest_multiple(value: int, of: int) -> int:
    """The positive multiple of `of` nearest to `value`."""
    return max(1, round(value / of)) * of


def _nearest(effective: int, batch_size: int, devices: int) -> str:
    """The end of a message: sizes that divide evenly."""
    near = f"the nearest that is: {nearest_multiple(effective, batch_size * devices)}"
    if effective % devices == 0:
        return f"{near}, or use batch_size {_largest(effective // devices, batch_size)}"
    other = nearest_multiple(effective, devices)
    smaller = _largest(other // devices, batch_size)
    if smaller < batch_size:
        near += f", {other} with batch_size {smaller}"
    fewer = _largest(effective, devices)
    return (
        f"{near}, or use {fewer} device{'s' * (fewer > 1)} with --mesh and batch_size "
        f"{_largest(effective // fewer, batch_size)}"
    )


def _largest(value: int, limit: int) -> int:
    return max(d for d in divisors(value) if d <= limit)
