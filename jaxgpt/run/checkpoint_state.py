"""What a checkpoint holds of a training state, and whether it is fit to be held."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.training.step import TrainState


def to_store(state: TrainState) -> dict[str, Any]:
    """The state without its accumulator, which is zero between steps: a quarter less to write."""
    return {**state._asdict(), "opt_state": state.opt_state._replace(acc_grads=())}


def from_stored(stored: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state again, its accumulator zeros in the shapes and shardings of `like`."""
    acc_grads = jax.tree.map(_zeros, like.opt_state.acc_grads)
    return TrainState(**{**stored, "opt_state": stored["opt_state"]._replace(acc_grads=acc_grads)})


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """(), bool: whether no floating-point number in any array is NaN or infinite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def abstract(state: TrainState) -> TrainState:
    """Its shapes, dtypes and shardings: a target to restore into, without the memory."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def describe(stored: Mapping[str, Any]) -> dict[str, str]:
    """'float32(257, 128)' by path, for every array."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{leaf.shape}"
        for path, leaf in jax.tree.leaves_with_path(dict(stored))
    }


def misfits(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """A line for each of the first arrays that differ between two descriptions; '' if none does.

    Orbax casts silently from one dtype to another, and says nothing useful about other shapes.
    """
    rows = [
        f"{name}: saved as {saved.get(name, 'nothing')}, now {wanted.get(name, 'nothing')}"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    more = [f"and {len(rows) - 5} more"] if len(rows) > 5 else []
    return "\n".join(rows[:5] + more)


def _zeros(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
