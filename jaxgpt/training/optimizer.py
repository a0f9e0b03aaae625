"""The optimizer: nanoGPT's schedule and AdamW as an optax chain, accumulating in MultiSteps.

MultiSteps is outermost, so the clip sees the averaged gradient (the other order clips each
micro-batch), and the schedule counts optimizer steps, never micro-batches.

With `state_dtype` bfloat16 a parameter takes 10 bytes instead of 16. Rounded to nearest, AdamW's
second moment would stop moving: at beta2 0.99 a step changes it by less than half of bfloat16's
spacing unless the squared gradient is off by a third. It is rounded up or down at random instead,
so that it is right on average.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxgpt.config.fields import OptimizerConfig

GRAD_NORM = "grad_norm"  # the name under which the chain keeps the norm before clipping
DECAYED = ("kernel", "embedding")  # the last part of the paths of matrices and embeddings


def make_schedule(cfg: OptimizerConfig, max_iters: int) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, ...: nanoGPT's warm-up and cosine.

    Step i of the warm-up has (i + 1) / (warmup_iters + 1) of the peak. A decay that would end
    before the warm-up does is over when the warm-up is; `decay_lr` False keeps the peak.
    """
    first = cfg.learning_rate / (cfg.warmup_iters + 1)
    decay_iters = cfg.lr_decay_iters or max_iters
    if cfg.decay_lr and decay_iters > cfg.warmup_iters:
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=cfg.learning_rate,
            warmup_steps=cfg.warmup_iters,
            decay_steps=decay_iters,
            end_value=cfg.min_lr,
        )
    warmup = optax.linear_schedule(first, cfg.learning_rate, cfg.warmup_iters)
    after = optax.constant_schedule(cfg.min_lr if cfg.decay_lr else cfg.learning_rate)
    return optax.join_schedules([warmup, after], [cfg.warmup_iters])


def make_optimizer(
    cfg: OptimizerConfig, schedule: optax.Schedule, accumulation: int
) -> optax.MultiSteps:
    """AdamW or Muon behind a clip by global norm, fed the mean of `accumulation` gradients."""
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    chain = optax.chain(
        optax.snapshot(GRAD_NORM, optax.tree.norm),
        clip,
        scale_by_moments(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.MultiSteps(chain, accumulation, accumulator_dtype=cfg.state_dtype)


def scale_by_moments(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """What makes a direction of a gradient: Adam's two moments, or Muon's one for the matrices."""
    adam = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2)
    if cfg.state_dtype == "bfloat16":
        adam = stored_in_bfloat16(adam)
    if cfg.optimizer == "adamw":
        return adam
    # Rounding to nearest is good enough here: a step changes this moment by a twentieth.
    momentum = optax.contrib.scale_by_muon(
        mu_dtype=cfg.state_dtype,
        weight_dimension_numbers=lambda updates: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), updates
        ),
    )
    muon = optax.chain(momentum, optax.stateless_with_tree_map(lambda g, _: _like_adam(g)))
    return optax.partition({"muon": muon, "adam": adam}, orthogonalized)


def orthogonalized(params: Any) -> Any:
    """'muon' for each matrix inside a block, 'adam' for embeddings and vectors."""
    return jax.tree.map_with_path(
        lambda path, _: "muon" if _name(path) == "kernel" else "adam", params
    )


def _like_adam(update_DF: jax.Array) -> jax.Array:
    # Liu et al., "Muon is Scalable for LLM Training" (2025): an orthogonal matrix has a root mean
    # square of 1 / sqrt(its longer side), a step of Adam's one of about 0.2. So one learning rate
    # and one weight decay serve both.
    return 0.2 * math.sqrt(max(update_DF.shape)) * update_DF


def make_accumulator(cfg: OptimizerConfig, accumulation: int) -> optax.MultiSteps:
    """What `make_optimizer`'s MultiSteps does to its accumulator, and nothing else.

    It would step on one gradient more than it is ever given, so that after the last one the mean is
    still there; its inner optimizer has no state.
    """
    return optax.MultiSteps(optax.identity(), accumulation + 1, accumulator_dtype=cfg.state_dtype)


def stored_in_bfloat16(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, computing in float32 but keeping the floating-point leaves of its state in bfloat16.

    Its state must have a `count`, from which the random bits of the rounding are drawn, so that a
    resumed run draws the same.
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
    """Finite float32 `x` as one of its two neighbours in bfloat16, so that it is x on average.

    `random` holds uint32 of the shape of `x`, of which the upper half is used.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is float32's upper half: a carry out of the lower half is a step up.
    carried = bits + (random >> 16)
    return jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)


def random_bits(shape: tuple[int, ...], count: jax.Array, salt: int) -> jax.Array:
    """uint32 of a shape, another draw for each count and salt.

    A hash of each element's index, Wellons' lowbias32: rounding needs no better, and JAX's own
    generator, twenty times as many operations for each of hundreds of leaves, takes minutes to
    compile.
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


def decay_mask(params: Any) -> Any:
    """True for each leaf that weight decay applies to: matrices and embeddings, by path."""
    return jax.tree.map_with_path(lambda path, _: _name(path) in DECAYED, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def grad_norm(opt_state: optax.MultiStepsState) -> jax.Array:
    """Global norm () of the last averaged gradient, before clipping."""
    return jnp.asarray(optax.tree.get(opt_state.inner_opt_state, GRAD_NORM))
