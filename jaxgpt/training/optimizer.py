"""The optimizer: nanoGPT's schedule and AdamW, or Muon, as an optax chain inside MultiSteps.

MultiSteps is outermost, so that the clip sees the averaged gradient (the other order clips each
micro-batch) and the schedule counts optimizer steps, never micro-batches.

With `state_dtype` bfloat16 a parameter takes 10 bytes instead of 16. Rounded to nearest, AdamW's
second moment would stop moving: at beta2 0.99 a step changes it by less than half of bfloat16's
spacing unless the squared gradient differs from it by a third. It is rounded stochastically
instead, which is unbiased.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxgpt.config.fields import Optimizer, OptimizerConfig

GRAD_NORM = "grad_norm"  # the key in the chain's state of the norm before clipping
DECAYED = ("kernel", "embedding")  # last parts of the paths of matrices and embeddings


def make_schedule(cfg: OptimizerConfig, max_iters: int) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, ...: nanoGPT's warm-up and cosine.

    Step i of the warm-up has (i + 1) / (warmup_iters + 1) of the peak. If lr_decay_iters is not
    after the warm-up, min_lr follows it directly; `decay_lr` False keeps the peak.
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
    """Clip by global norm, then `cfg.optimizer`, on the mean of `accumulation` gradients."""
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    chain = optax.chain(
        optax.snapshot(GRAD_NORM, optax.tree.norm),
        clip,
        OPTIMIZERS[cfg.optimizer].scale(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.MultiSteps(chain, accumulation, accumulator_dtype=cfg.state_dtype)


def scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction, from two moments of the gradient."""
    adam = optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2)
    return stored_in_bfloat16(adam) if cfg.state_dtype == "bfloat16" else adam


def scale_by_muon(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalized momentum for the matrices inside blocks, Adam's direction for the rest."""
    # Rounding to nearest suffices here: a step changes this moment by a twentieth.
    momentum = optax.contrib.scale_by_muon(
        mu_dtype=cfg.state_dtype,
        weight_dimension_numbers=lambda updates: jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(), updates
        ),
    )
    muon = optax.chain(momentum, optax.stateless_with_tree_map(lambda g, _: _scaled_as_adam(g)))
    return optax.partition(
        {"muon": muon, "adam": scale_by_adam(cfg)},
        lambda params: jax.tree.map_with_path(
            lambda path, _: "muon" if is_orthogonalized(_joined(path)) else "adam", params
        ),
    )


def is_orthogonalized(path: str) -> bool:
    """Whether Muon orthogonalizes a parameter, by its path: the matrices inside blocks."""
    return path.endswith("kernel")


def _scaled_as_adam(update_DF: jax.Array) -> jax.Array:
    # Liu et al., "Muon is Scalable for LLM Training" (2025): an orthogonal matrix has a root mean
    # square of 1 / sqrt(its longer side), an Adam step one of about 0.2. Scaled so, one learning
    # rate and one weight decay serve both.
    return 0.2 * math.sqrt(max(update_DF.shape)) * update_DF


class OptimizerKind(NamedTuple):
    """One value of `--optimizer`."""

    scale: Callable[[OptimizerConfig], optax.GradientTransformation]  # gradient -> direction
    moments: Callable[[str], int]  # moments kept for a parameter, by its path


OPTIMIZERS: dict[Optimizer, OptimizerKind] = {
    "adamw": OptimizerKind(scale_by_adam, moments=lambda path: 2),
    "muon": OptimizerKind(scale_by_muon, moments=lambda path: 1 if is_orthogonalized(path) else 2),
}


def make_accumulator(cfg: OptimizerConfig, accumulation: int) -> optax.MultiSteps:
    """Only the accumulating part of `make_optimizer`'s MultiSteps.

    It would step after `accumulation` + 1 gradients, one more than it gets, so the mean is still in
    the accumulator after the last one. Its inner optimizer has no state.
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
    own generator has twenty times as many operations, which for hundreds of leaves take minutes to
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
    return jax.tree.map_with_path(lambda path, _: _joined(path).endswith(DECAYED), params)


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def grad_norm(opt_state: optax.MultiStepsState) -> jax.Array:
    """Global norm () of the last averaged gradient, before clipping."""
    return jnp.asarray(optax.tree.get(opt_state.inner_opt_state, GRAD_NORM))
