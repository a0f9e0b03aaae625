"""The optimizer: nanoGPT's schedule and AdamW as an optax chain, accumulating in MultiSteps.

MultiSteps is outermost, so the clip sees the averaged gradient (the other order clips each
micro-batch), and the schedule counts optimizer steps, never micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import OptimizerConfig

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
    """AdamW behind a clip by global norm, fed the mean of `accumulation` gradients."""
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    chain = optax.chain(
        optax.snapshot(GRAD_NORM, optax.tree.norm),
        clip,
        optax.adamw(
            schedule, b1=cfg.beta1, b2=cfg.beta2, weight_decay=cfg.weight_decay, mask=decay_mask
        ),
    )
    return optax.MultiSteps(chain, accumulation)


def decay_mask(params: Any) -> Any:
    """True for each leaf that weight decay applies to: matrices and embeddings, by path."""
    return jax.tree.map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) in DECAYED, params
    )


def grad_norm(opt_state: optax.MultiStepsState) -> jax.Array:
    """Global norm () of the last averaged gradient, before clipping."""
    return jnp.asarray(optax.tree.get(opt_state.inner_opt_state, GRAD_NORM))
