"""Which devices a run has, and what of it lies where.

This is the layout of one device, on which nothing has to be said of sharding; `hardware/mesh.py`
has that of several, with the same interface.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgpt.model.gpt import Gather
from jaxgpt.training.step import Accumulate, Spread, alone


class OneDevice:
    """Everything on one device."""

    count: int = 1
    gpu_options: Mapping[str, Any] = {}  # what XLA is told on top of what every GPU gets
    gather: Gather | None = None  # makes parameters whole of which a device holds a shard

    def __init__(self, device: Any):
        self.device = device  # one of them, like all the others
        self.local_devices = [device]  # those of this process

    def state_shardings(self, state: Any) -> Any:
        """A sharding for each leaf of a state, or of a part of it."""
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(self.device), state)

    def tokens_sharding(self, leading: int) -> Any:
        """Of windows that have so many axes before the batch's."""
        return jax.sharding.SingleDeviceSharding(self.device)

    def results(self, shardings: Any) -> dict[str, Any]:
        """What `jax.jit` is told of a function's results; None stands for all on every device."""
        return {}

    def spread_gradients(self, accumulate: Accumulate) -> Spread:
        """`accumulate` on the rows of each device, and the mean of what comes of it."""
        return alone(accumulate)

    def spread_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, tokens_BT1)`, whose results have a row for each of B."""
        return function

    def load(self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> Any:
        """Windows (..., B, T+1) for a step; `read(rows)` gives those of some rows of B."""
        return read(slice(0, shape[-2]))

    def from_host(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(params, tokens_BT1)` for tokens that every process has all of."""
        return step
