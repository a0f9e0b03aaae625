"""A pre-norm block, and how a list of them runs: unrolled or by `lax.scan`, with
rematerialization and all-gathers."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.fields import Remat
from jaxgpt.model.attention import LayerCache
from jaxgpt.model.layers import Norm, add_by_rows, dropout
from jaxgpt.model.remat import rematerialized

Params = dict[str, Any]
# (sharded float32 parameters, dtype) -> all-gathered parameters, matrices and embeddings in `dtype`
AllGather = Callable[[Params, Any], Params]
Keys = list[jax.Array] | list[None]  # one per block; None without dropout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    A subclass creates `attn`, `mlp`, the dropout `drop` and the norms, which it names itself.
    """

    attn: nnx.Module
    mlp: nnx.Module
    drop: nnx.Dropout

    @abstractmethod
    def norms(self) -> tuple[Norm, Norm]:
        """The norms before attention and before the MLP."""

    def __call__(
        self,
        x_BTD: jax.Array,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        """(x_BTD, cache): with a cache, x follows `start` cached tokens and is added to it."""
        before_attn, before_mlp = self.norms()
        attn_key, mlp_key = (None, None) if key is None else jax.random.split(key, 2)
        y_BTD, cache = self.attn(x_BTD, before_attn, cache, start)
        x_BTD = add_by_rows(x_BTD, dropout(self.drop, y_BTD, attn_key))
        x_BTD = add_by_rows(x_BTD, dropout(self.drop, self.mlp(x_BTD, before_mlp), mlp_key))
        return x_BTD, cache


def make_blocks(n: int, make: Callable[[nnx.Rngs], Block], rngs: nnx.Rngs) -> nnx.List:
    """`n` blocks, with the random numbers that making one after the other would give.

    They are drawn in a loop, since compiling a block's random numbers takes seconds on a GPU.
    """
    stream = rngs.params
    graphdefs: list[nnx.GraphDef] = []

    def one(drawn: jax.Array, _: None) -> tuple[jax.Array, Params]:
        own = nnx.Rngs(params=stream.key[...])
        own.params.count[...] = drawn
        graphdef, params = nnx.split(make(own))
        graphdefs.append(graphdef)
        return own.params.count[...], nnx.to_pure_dict(params)

    drawn, stacked = jax.lax.scan(one, stream.count[...], length=n)
    stream.count[...] = drawn
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(n)]
    return nnx.List([nnx.merge(graphdefs[0], layer) for layer in layers])


def run_unrolled(
    blocks: nnx.List,
    x_BTD: jax.Array,
    keys: Keys,
    dtype: jnp.dtype,
    remat: Remat,
    all_gather: AllGather | None,
) -> jax.Array:
    """x through the blocks, unrolled: XLA compiles each one; matrix products are in `dtype`."""
    for block, key in zip(blocks, keys, strict=True):
        run = block if all_gather is None else _gathered_when_run(block, dtype, all_gather)
        x_BTD, _ = rematerialized(run, remat)(x_BTD, key)
    return x_BTD


def _gathered_when_run(
    block: nnx.Module, dtype: jnp.dtype, all_gather: AllGather
) -> Callable[..., Any]:
    # The all-gather is inside the rematerialized function, so that remat repeats it instead of
    # keeping every block's full parameters for the backward pass.
    graphdef, shards = nnx.graphdef(block), nnx.to_pure_dict(nnx.state(block, nnx.Param))
    return lambda x_BTD, key: nnx.merge(graphdef, all_gather(shards, dtype))(x_BTD, key)


def run_scanned(
    blocks: nnx.List,
    x_BTD: jax.Array,
    keys: Keys,
    dtype: jnp.dtype,
    remat: Remat,
    all_gather: AllGather | None,
) -> jax.Array:
    """x through the blocks by one `lax.scan` over their stacked parameters.

    Compile time does not grow with depth. The price is a second, stacked copy of all weights and,
    in the backward pass, of their gradients; matrices are stacked in the dtype of their products.
    """
    graphdef = nnx.graphdef(blocks[0])
    params = [nnx.to_pure_dict(nnx.state(block, nnx.Param)) for block in blocks]
    stack_dtype = dtype if all_gather is None else jnp.float32  # shards are cast when gathered
    stacked = jax.tree.map(lambda *leaves: _stack(leaves, stack_dtype), *params)

    def one(x_BTD: jax.Array, layer: tuple[Params, jax.Array | None]) -> tuple[jax.Array, None]:
        params, key = layer
        params = params if all_gather is None else all_gather(params, dtype)
        return nnx.merge(graphdef, params)(x_BTD, key)

    stacked_keys = None if keys[0] is None else jnp.stack(keys)
    return jax.lax.scan(rematerialized(one, remat), x_BTD, (stacked, stacked_keys))[0]


def _stack(leaves: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
    # Scales and biases stay in float32, the dtype they are used in.
    return jnp.stack([leaf.astype(dtype) if leaf.ndim > 1 else leaf for leaf in leaves])
