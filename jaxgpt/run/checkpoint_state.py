"""The part of a training state that a checkpoint stores, and checks of it."""

from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.training.groups import joined
from jaxgpt.training.loss_scale import LossScale
from jaxgpt.training.step import TrainState

LOSS_SCALE = "loss_scale"  # the field of TrainState that runs in other dtypes than float16 lack
MADE_WITH = ("jax", "flax", "optax", "orbax-checkpoint")


def to_stored(state: TrainState) -> dict[str, Any]:
    """The state without its accumulator, which is zero between steps: a quarter less to write."""
    stored = {**state._asdict(), "opt_state": state.opt_state._replace(acc_grads=())}
    return stored if state.loss_scale else {k: x for k, x in stored.items() if k != LOSS_SCALE}


def from_stored(stored: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state, with an accumulator of zeros in the shapes and shardings of `like`.

    A run that changes to float16 starts with the initial loss scale; one that leaves it has none.
    """
    acc_grads = jax.tree.map(_zeros, like.opt_state.acc_grads)
    state = TrainState(**{**stored, "opt_state": stored["opt_state"]._replace(acc_grads=acc_grads)})
    if like.loss_scale and not state.loss_scale:
        shardings = jax.tree.map(lambda x: x.sharding, like.loss_scale)
        return state._replace(loss_scale=jax.jit(LossScale.initial, out_shardings=shardings)())
    return state if like.loss_scale else state._replace(loss_scale=())


def with_loss_scale_as(saved: Collection[str], like: TrainState) -> TrainState:
    """`like`, with a loss scale only if the saved arrays, whose paths are `saved`, have one."""
    if not any(path.startswith(f"{LOSS_SCALE}/") for path in saved):
        return like._replace(loss_scale=())
    shapes = jax.eval_shape(LossScale.initial)
    return like._replace(
        loss_scale=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.step.sharding), shapes
        )
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every floating-point number in every array is finite; (), bool."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def not_finite_message(step: int, folder: Path, latest: int | None) -> str:
    """Why the state of `step` is not saved; `latest` is the newest checkpoint in `folder`."""
    if latest is None:
        return (
            f"the parameters of step {step:,} are not finite, so they cannot be trained; check the "
            "weights that --init-from names"
        )
    return (
        f"the parameters or the optimizer's moments of step {step:,} are not finite, so they are "
        f"not saved; checkpoint {latest} in {folder} is kept: resume from it with a smaller "
        "--learning-rate, or with --grad-clip 1 if that was off"
    )


def array_specs(stored: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of every array by path, such as 'float32(257, 128)'."""
    return {
        joined(path): f"{leaf.dtype}{leaf.shape}"
        for path, leaf in jax.tree.leaves_with_path(dict(stored))
    }


def manifest_notes(
    stored: Mapping[str, Any], config: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of a checkpoint's manifest that are known when its save begins."""
    return {
        "config": dict(config),
        "data": dict(data),
        "arrays": array_specs(stored),
        "made_with": {name: version(name) for name in MADE_WITH},
    }


def differences(saved: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """A line for each of the first five arrays whose specs differ; '' if none does.

    Orbax casts silently from one dtype to another, and its error about shapes names no array.
    """
    rows = [
        f"{name}: saved as {saved.get(name, 'nothing')}, now {expected.get(name, 'nothing')}"
        for name in {**saved, **expected}
        if saved.get(name) != expected.get(name)
    ]
    more = [f"and {len(rows) - 5} more"] if len(rows) > 5 else []
    return "\n".join(rows[:5] + more)


def _zeros(leaf: jax.Array) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
