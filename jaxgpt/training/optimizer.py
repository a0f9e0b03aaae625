"""The optimizer: AdamW, or Muon for the matrices, as an optax chain inside MultiSteps.

MultiSteps is outermost, so that the clip sees the averaged gradient (the other order clips each
micro-batch) and the schedule counts optimizer steps, never micro-batches.

With `state_dtype` bfloat16 a parameter takes 10 bytes instead of 16. Rounded to nearest, AdamW's
second moment would stop changing: at beta2 0.99 a step changes it by less than half of bfloat16's
spacing, unless the squared gradient differs from it by a third. So it is rounded stochastically,
which is unbiased.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config.optimizer import Optimizer, OptimizerConfig
from jaxgpt.training.groups import group_of, is_vector, joined, peak_rates
from jaxgpt.training.muon import MapStack, on_one_device, scale_by_muon

GRAD_NORM = "grad_norm"  # the key in the chain's state of the norm before clipping


def make_optimizer(
    cfg: OptimizerConfig,
    schedule: optax.Schedule,
    accumulation: int,
    dtype: str = "float32",
    map_stack: MapStack = on_one_device,
) -> optax.MultiSteps:
    """Clip by global norm, then `cfg.optimizer`, on the mean of `accumulation` gradients.

    `dtype` is that of Muon's matrix products, which `map_stack` divides among the devices.
    """
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    chain = optax.chain(
        optax.snapshot(GRAD_NORM, optax.tree.norm),
        clip,
        OPTIMIZERS[cfg.optimizer].scale(cfg, dtype, map_stack),
        optax.identity(),  # keeps the schedule's place in the state of older checkpoints
        decay_and_scale(cfg, schedule),
    )
    return optax.MultiSteps(chain, accumulation, accumulator_dtype=cfg.state_dtype)


def decay_and_scale(cfg: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """From a direction to an update: weight decay, then the negative learning rate of each group.

    Its state is always that of `optax.scale_by_learning_rate`, so that a resumed run may change any
    setting.
    """
    scale, peaks = optax.scale_by_learning_rate(schedule), peak_rates(cfg)

    def update(directions: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decay = cfg.weight_decay
        if cfg.weight_decay_schedule == "lr":
            decay = decay * schedule(state.count) / cfg.learning_rate

        def decayed(path: Any, direction: jax.Array, param: jax.Array) -> jax.Array:
            name = joined(path)
            if cfg.weight_decay and not is_vector(name):
                towards_zero = decay * param
                if cfg.cautious_weight_decay:  # Chen et al., "Cautious Weight Decay" (2025)
                    towards_zero = jnp.where(direction * param >= 0, towards_zero, 0)
                direction = direction + towards_zero
            peak = peaks[group_of(name)]
            return direction if peak == cfg.learning_rate else peak / cfg.learning_rate * direction

        return scale.update(jax.tree.map_with_path(decayed, directions, params), state)

    return optax.GradientTransformation(scale.init, update)


def scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction, from two moments of the gradient."""
    adam = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2)
    return stored_in_bfloat16(adam) if cfg.state_dtype == "bfloat16" else adam


def scale_by_muon_and_adam(
    cfg: OptimizerConfig, dtype: str, map_stack: MapStack
) -> optax.GradientTransformation:
    """Orthogonalized momentum for the matrices inside blocks, Adam's direction for the rest."""
    return optax.partition(
        {"muon": scale_by_muon(cfg, dtype, map_stack), "adam": scale_by_adam(cfg)},
        lambda params: jax.tree.map_with_path(
            lambda path, _: "muon" if group_of(joined(path)) == "matrix" else "adam", params
        ),
    )


class OptimizerKind(NamedTuple):
    """One value of `--optimizer`."""

    # (configuration, dtype, map_stack) -> the transformation of gradients into directions
    scale: Callable[[OptimizerConfig, str, MapStack], optax.GradientTransformation]
    moments: Callable[[str], int]  # moments kept for a parameter, by its path


OPTIMIZERS: dict[Optimizer, OptimizerKind] = {
    "adamw": OptimizerKind(lambda cfg, *_: scale_by_adam(cfg), moments=lambda path: 2),
    "muon": OptimizerKind(
        scale_by_muon_and_adam, moments=lambda path: 1 if group_of(path) == "matrix" else 2
    ),
}


def make_accumulator(cfg: OptimizerConfig, accumulation: int) -> optax.MultiSteps:
    """Only the accumulating part of `make_optimizer`'s MultiSteps.

    It would step after `accumulation` + 1 gradients, one more than it gets, so after the last one
    the mean is still in the accumulator. Its inner optimizer has no state.
    """
    return optax.MultiSteps(optax.identity(), accumulation + 1, accumulator_dtype=cfg.state_dtype)


def stored_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` computing in float32, with the floating-point leaves of its state in bfloat16.

    Its state must have a `count`: the random bits for rounding are a function of it, so that a
    resumed run draws the same bits.
    """

    def init(params: Any) -> Any:
        return _cast_floats(inner.init(params), jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(updates, _cast_floats(state, jnp.float32), params)
        leaves, treedef = jax.tree.flatten(new)
        rounded = [
            stochastic_round(leaf, random_bits(leaf.shape, new.count, salt=i))
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
            for i, leaf in enumerate(leaves)
        ]
        return updates, jax.tree.unflatten(treedef, rounded)

    return optax.GradientTransformation(init, update)


def stochastic_round(x: jax.Array, random: jax.Array) -> jax.Array:
    """Round finite float32 `x` up or down to bfloat16 at random, so that the mean result is x.

    `random` is uint32 of the shape of `x`; its upper 16 bits are used.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is float32's upper half: a carry out of the lower half rounds up.
    carried = bits + (random >> 16)
    return jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)


def random_bits(shape: tuple[int, ...], count: jax.Array, salt: int) -> jax.Array:
    """Random uint32 of a shape, different for each count and salt.

    A hash of each element's index (Wellons' lowbias32), which is good enough for rounding. JAX's
    generator has twenty times as many operations, which take minutes to compile for hundreds of
    leaves.
    """
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    x = index ^ _mix(count.astype(jnp.uint32) ^ _mix(jnp.uint32(salt)))
    return _mix(x)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _cast_floats(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def grad_norm(opt_state: optax.MultiStepsState) -> jax.Array:
    """Global norm () of the last averaged gradient, before clipping."""
    return jnp.asarray(optax.tree.get(opt_state.inner_opt_state, GRAD_NORM))
