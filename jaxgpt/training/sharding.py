"""Training on several devices: how state and batches are sharded over a mesh of them.

The state is replicated along the mesh axis `data` and sharded along `fsdp`; batches are sharded
along both. Every device runs the single-device program on its rows (`shard_map`). All collectives
of a step are in this file: a weight is all-gathered when it is used and its gradient
reduce-scattered (`all_gather`), and gradients are all-reduced once per step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.training.groups import is_vector, joined
from jaxgpt.training.layout import Layout
from jaxgpt.training.step import Factor, Gradients

AXES = ("data", "fsdp")
# Gradients in one reduce-scatter: enough to keep a link busy, but no more than a few layers'.
COMBINED_BYTES = 64 * 2**20


def make_layout(devices: Sequence[Any], shape: MeshShape) -> Layout:
    """The layout of a run on the first `shape.devices` of `devices`."""
    if shape.devices == 1:
        return Layout(devices[0])
    return MeshLayout(devices[: shape.devices], shape)


class MeshLayout(Layout):
    """Replicated along `data`, sharded along `fsdp`. `Layout` says what each method is for."""

    def __init__(self, devices: Sequence[Any], shape: MeshShape):
        """`devices` are ordered by process, so that each process has adjacent rows."""
        assert len(devices) == shape.devices
        self.mesh = Mesh(np.asarray(devices).reshape(shape), AXES)
        self.shape, self.count = shape, shape.devices
        local = [d for d in devices if d.process_index == jax.process_index()]
        self.local_devices = local or list(devices)  # none is local in an ahead-of-time compilation
        self.device = self.local_devices[0]
        if shape.fsdp > 1:
            self.all_gather = all_gather
            # XLA combines reduce-scatters up to a threshold in bytes of one shard. By its default
            # all layers' gradients would wait for each other, unsharded and in float32.
            threshold = "xla_gpu_reduce_scatter_combine_threshold_bytes"
            self.gpu_options = {threshold: COMBINED_BYTES // shape.fsdp}

    def state_shardings(self, state: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs_of(state))

    def tokens_sharding(self, leading: int) -> NamedSharding:
        return NamedSharding(self.mesh, _rows(leading))

    def jit_options(self, out_shardings: Any = None) -> dict[str, Any]:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return {
            "out_shardings": jax.tree.map(
                lambda x: x or replicated, out_shardings, is_leaf=lambda x: x is None
            )
        }

    def data_parallel_gradients(self, gradients: Gradients) -> Gradients:
        """`gradients` on each device's rows, averaged over the devices.

        Micro-batch a of device d has index a * count + d, as its rows would have on a single
        device, and therefore the same dropout.
        """

        def on_each(
            params: Any, empty: Any, tokens_ABT1: jax.Array, key: jax.Array, factor: Factor
        ) -> Any:
            first_A = jnp.arange(len(tokens_ABT1)) * self.count
            indices_A = first_A + jax.lax.axis_index(AXES)
            means, loss = gradients(params, empty, tokens_ABT1, key, factor, indices_A)
            return jax.tree.map_with_path(self._all_reduce, means), jax.lax.pmean(loss, AXES)

        def step_gradients(params: Any, empty: Any, *others: Any) -> Any:
            param_specs, replicated = specs_of(params), PartitionSpec()
            return jax.shard_map(
                on_each,
                mesh=self.mesh,
                in_specs=(param_specs, specs_of(empty), _rows(1), replicated, replicated),
                out_specs=(param_specs, replicated),
                check_vma=False,
            )(params, empty, *others)

        return step_gradients

    def _all_reduce(self, path: Any, gradient: jax.Array) -> jax.Array:
        # Along fsdp a sharded gradient has been averaged already, by `all_gather`'s backward pass.
        scattered = self.shape.fsdp > 1 and not is_vector(joined(path))
        return jax.lax.pmean(gradient, "data" if scattered else AXES)

    def data_parallel_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def on_all(params: Any, tokens_BT1: jax.Array) -> Any:
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(specs_of(params), _rows(0)),
                out_specs=_rows(0),
                check_vma=False,
            )(params, tokens_BT1)

        return on_all

    def map_stack(
        self, function: Callable[[jax.Array], jax.Array], stack_KMN: jax.Array
    ) -> jax.Array:
        """`function(stack_KMN)` with the stack's matrices divided among the devices.

        The stack is sent once each way, whatever `function` computes.
        """

        def placed(stack_KMN: jax.Array, *axes: Any) -> jax.Array:
            sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
            return jax.lax.with_sharding_constraint(stack_KMN, sharding)

        # Resharded in two steps each way: for a single reshard XLA would replicate it.
        shares_KMN = placed(placed(stack_KMN, "fsdp"), ("fsdp", "data"))
        return placed(placed(function(shares_KMN), "fsdp"), None, "fsdp")

    def load_batch(self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
        """A batch of windows (..., B, T+1); `read(rows)` is called for this process's rows only."""
        sharding = self.tokens_sharding(len(shape) - 2)
        return jax.make_array_from_callback(shape, sharding, lambda index: read((index or ())[-2]))

    def with_sharded_batch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def on_rows(params: Any, tokens_BT1: np.ndarray) -> Any:
            batch_BT1 = self.load_batch(tokens_BT1.shape, lambda rows: tokens_BT1[rows])
            result = step(params, batch_BT1)
            # XLA:CPU may have just one thread per device. A program that waits in a collective
            # holds one, and if that was the last, the program that it waits for cannot run.
            return jax.block_until_ready(result) if self.device.platform == "cpu" else result

        return on_rows


def specs_of(tree: Any) -> Any:
    """A PartitionSpec for each leaf, by its path: of parameters, or of moments shaped like them.

    Matrices and embeddings are sharded along their first axis (`is_vector`).
    """
    return jax.tree.map_with_path(
        lambda path, _: PartitionSpec() if is_vector(joined(path)) else PartitionSpec("fsdp"), tree
    )


def all_gather(shards: Any, dtype: Any) -> Any:
    """All-gather this device's float32 shards; matrices and embeddings in `dtype`.

    They are cast before they are sent. Gradients are reduce-scattered in float32 whatever `dtype`
    is, so that the sum over devices equals a single device's accumulation.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if is_vector(joined(path)) else _all_gather(leaf, dtype), shards
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(shard: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", tiled=True)


def _all_gather_forward(shard: jax.Array, dtype: Any) -> tuple[jax.Array, None]:
    return _all_gather(shard, dtype), None


def _all_gather_backward(dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    summed = jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", tiled=True)
    return (summed / jax.lax.axis_size("fsdp"),)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


def _rows(leading: int) -> PartitionSpec:
    return PartitionSpec(*[None] * leading, AXES)
