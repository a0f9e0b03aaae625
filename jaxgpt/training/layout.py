"""The placement of state and batches: here on one device, in `sharding.py` on several.

Everything that depends on the number of devices goes through this interface, so that a step on one
device has no sharding annotations.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgpt.model.blocks import AllGather
from jaxgpt.training.step import Gradients


class Layout:
    """Everything on one device; the base of `MeshLayout`."""

    count: int = 1  # devices
    gpu_options: Mapping[str, Any] = {}  # XLA options in addition to those of every GPU
    all_gather: AllGather | None = None  # gathers sharded parameters; None if they are replicated

    def __init__(self, device: Any):
        self.device = device  # any of them; all are of one kind
        self.local_devices = [device]  # those of this process

    def state_shardings(self, state: Any) -> Any:
        """A sharding for each leaf of a TrainState, or of a part of it."""
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(self.device), state)

    def tokens_sharding(self, leading: int) -> Any:
        """The sharding of windows with `leading` axes before the batch axis."""
        return jax.sharding.SingleDeviceSharding(self.device)

    def jit_options(self, out_shardings: Any = None) -> dict[str, Any]:
        """Arguments of `jax.jit` that place the outputs; None replicates them on every device."""
        return {}

    def data_parallel_gradients(self, gradients: Gradients) -> Gradients:
        """`gradients` on each device's rows, averaged over the devices."""
        return gradients

    def data_parallel_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, tokens_BT1)` on each device's rows; its outputs have an axis B."""
        return function

    def map_stack(self, function: Callable[[Any], Any], stack_KMN: Any) -> Any:
        """`function(stack_KMN)`, which treats each matrix of the stack separately."""
        return function(stack_KMN)

    def load_batch(self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> Any:
        """A batch of windows (..., B, T+1); `read(rows)` returns the windows of a slice of B."""
        return read(slice(0, shape[-2]))

    def with_sharded_batch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(params, tokens_BT1)` for a NumPy batch that every process has in full."""
        return step
