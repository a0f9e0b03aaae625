"""Who holds what: the devices of a run as one mesh, and where its state and its tokens lie there.

`data` devices hold the same share of the state, `fsdp` devices hold a share each; all see rows of
their own. Every device runs the program that one device alone runs, on its rows (`shard_map`), and
all that they say to each other is said here: a weight is gathered from its shards when it is
needed and its gradient summed back into them (`gather`), gradients are averaged once a step.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.training.layout import OneDevice
from jaxgpt.training.step import Accumulate, Spread

AXES = ("data", "fsdp")
# By the last part of a path: matrices and embeddings are cut along their first axis, in parameters,
# moments and accumulator alike. Norms and biases are too small to be worth a message.
SHARDED = ("kernel", "embedding")
# Gradients in one message: enough to keep a link busy, no more than a few layers.
JOINED_BYTES = 64 * 2**20


def make_layout(devices: Sequence[Any], shape: MeshShape) -> OneDevice:
    """The layout of a run on the first of `devices`, as many as `shape` has."""
    if shape.devices == 1:
        return OneDevice(devices[0])
    return OverMesh(devices[: shape.devices], shape)


class OverMesh(OneDevice):
    """Over several devices."""

    def __init__(self, devices: Sequence[Any], shape: MeshShape):
        """`devices` in the order of their processes, so that each holds neighbouring rows."""
        assert len(devices) == shape.devices
        self.mesh = Mesh(np.asarray(devices).reshape(shape), AXES)
        self.shape, self.count = shape, shape.devices
        local = [d for d in devices if d.process_index == jax.process_index()]
        self.local_devices = local or list(devices)  # none is here where a step is only compiled
        self.device = self.local_devices[0]
        # XLA joins small messages, of which it counts the shards: all layers' gradients would wait
        # for each other, whole and in float32.
        joined = {"xla_gpu_reduce_scatter_combine_threshold_bytes": JOINED_BYTES // shape.fsdp}
        self.gpu_options = joined if shape.fsdp > 1 else {}
        self.gather = gather if shape.fsdp > 1 else None

    def state_shardings(self, state: Any) -> Any:
        """A sharding for each leaf, by its path."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs_of(state))

    def tokens_sharding(self, leading: int) -> NamedSharding:
        """Of windows with so many axes before the batch."""
        return NamedSharding(self.mesh, _rows(leading))

    def results(self, shardings: Any) -> dict[str, Any]:
        """What `jax.jit` is told of a function's results; None stands for all on every device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        filled = jax.tree.map(lambda x: x or everywhere, shardings, is_leaf=lambda x: x is None)
        return {"out_shardings": filled}

    def spread_gradients(self, accumulate: Accumulate) -> Spread:
        """`accumulate` on the rows of each device, and the mean of what comes of it.

        Micro-batch a of device d has the number, and so the dropout, that one device alone gives
        the same rows: a * count + d.
        """

        def on_each(params: Any, empty: Any, tokens_ABT1: jax.Array, key: jax.Array) -> Any:
            first = jnp.arange(len(tokens_ABT1)) * self.count
            numbers_A = first + jax.lax.axis_index(AXES)
            means, loss = accumulate(params, empty, tokens_ABT1, numbers_A, key)
            return jax.tree.map_with_path(self._mean, means), jax.lax.pmean(loss, AXES)

        def spread(params: Any, empty: Any, tokens_ABT1: jax.Array, key: jax.Array) -> Any:
            held, whole = specs_of(params), PartitionSpec()
            return jax.shard_map(
                on_each,
                mesh=self.mesh,
                in_specs=(held, specs_of(empty), _rows(1), whole),
                out_specs=(held, whole),
                check_vma=False,
            )(params, empty, tokens_ABT1, key)

        return spread

    def spread_rows(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(params, tokens_BT1)`, whose results have a row for each of B."""

        def spread(params: Any, tokens_BT1: jax.Array) -> Any:
            return jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(specs_of(params), _rows(0)),
                out_specs=_rows(0),
                check_vma=False,
            )(params, tokens_BT1)

        return spread

    def load(self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray]) -> jax.Array:
        """Windows (..., B, T+1) for a step; `read(rows)` is asked for this process's rows alone."""
        sharding = self.tokens_sharding(len(shape) - 2)
        return jax.make_array_from_callback(shape, sharding, lambda index: read((index or ())[-2]))

    def from_host(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step(params, tokens_BT1)` for tokens that every process has all of."""
        return lambda params, tokens_BT1: step(
            params, self.load(tokens_BT1.shape, lambda rows: tokens_BT1[rows])
        )

    def _mean(self, path: Any, leaf: jax.Array) -> jax.Array:
        # Over fsdp a shard's gradient has been averaged already, by `gather`.
        summed = self.shape.fsdp > 1 and _is_sharded(path)
        return jax.lax.pmean(leaf, "data") if summed else jax.lax.pmean(leaf, AXES)


def specs_of(tree: Any) -> Any:
    """A PartitionSpec for each leaf of parameters, or of anything shaped like them, by its path."""
    return jax.tree.map_with_path(
        lambda path, _: PartitionSpec("fsdp") if _is_sharded(path) else PartitionSpec(), tree
    )


def gather(shards: Any, dtype: Any) -> Any:
    """Whole parameters from this device's float32 shards, matrices and embeddings in `dtype`.

    Cast before they travel. Gradients travel in float32, whatever `dtype`, so that a sum over
    devices is that of a single device's accumulation.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: _gather(leaf, dtype) if _is_sharded(path) else leaf, shards
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(shard: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(shard.astype(dtype), "fsdp", tiled=True)


def _gather_forward(shard: jax.Array, dtype: Any) -> tuple[jax.Array, None]:
    return _gather(shard, dtype), None


def _gather_backward(dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    summed = jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", tiled=True)
    return (summed / jax.lax.axis_size("fsdp"),)


_gather.defvjp(_gather_forward, _gather_backward)


def _is_sharded(path: Any) -> bool:
    return jax.tree_util.keystr(path[-1:], simple=True) in SHARDED


def _rows(leading: int) -> PartitionSpec:
    return PartitionSpec(*[None] * leading, AXES)
