"""Muon: momentum of matrices, orthogonalized by Newton-Schulz iterations.

Keller Jordan, 2024. `optax.contrib.scale_by_muon` does the same for one matrix at a time, in
float32. Here matrices of one shape are multiplied in one batch, which fills a GPU where one matrix
of a small model does not; products are in the run's dtype, as in Jordan's code. The state is
optax's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from jaxgpt.config.optimizer import OptimizerConfig

MOMENTUM, FIRST_MOMENTUM = 0.95, 0.85  # after and at the start of the warm-up
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, (x xT) x and (x xT)^2 x in an iteration
ITERATIONS = 5
# Elements orthogonalized at once: enough to fill any GPU, and no more than 128 MiB in bfloat16.
BATCH_ELEMENTS = 2**26
# (function of a stack that treats each matrix separately, stack_KMN) -> result: `Layout.map_stack`
MapStack = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


def on_one_device(function: Callable[[jax.Array], jax.Array], stack_KMN: jax.Array) -> jax.Array:
    """The `MapStack` of a single device."""
    return function(stack_KMN)


def scale_by_muon(
    cfg: OptimizerConfig, dtype: str, map_stack: MapStack = on_one_device
) -> optax.GradientTransformation:
    """Orthogonalized momentum of a tree of matrices, scaled to the size of Adam's direction.

    `dtype` is that of the products.
    """
    as_adam = optax.stateless_with_tree_map(lambda update_DF, _: _scaled_as_adam(update_DF))
    return optax.chain(_orthogonalized_momentum(cfg, dtype, map_stack), as_adam)


def _orthogonalized_momentum(
    cfg: OptimizerConfig, dtype: str, map_stack: MapStack
) -> optax.GradientTransformation:
    # Rounding to nearest suffices for moments in bfloat16: a step changes them by a twentieth.
    init = optax.contrib.scale_by_muon(mu_dtype=cfg.state_dtype).init
    momentum = optax.constant_schedule(MOMENTUM)
    if cfg.momentum_warmup_iters:
        momentum = optax.linear_schedule(FIRST_MOMENTUM, MOMENTUM, cfg.momentum_warmup_iters)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        beta = jnp.asarray(momentum(state.count), jnp.float32)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        ahead = optax.tree.update_moment(updates, mu, beta, 1)  # Nesterov
        count = optax.safe_increment(state.count)
        new = state._replace(count=count, mu=optax.tree.cast(mu, cfg.state_dtype))
        return orthogonalize(ahead, dtype, map_stack), new

    return optax.GradientTransformation(init, update)


def orthogonalize(matrices: Any, dtype: str, map_stack: MapStack = on_one_device) -> Any:
    """Each matrix of a tree with singular values near 1, float32; those of one shape together."""
    # In float16 small gradients would be zero before they are scaled up.
    stack_dtype = "float32" if dtype == "float16" else dtype
    leaves, treedef = jax.tree.flatten(matrices)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        by_shape.setdefault(leaf.shape, []).append(i)
    for shape, members in by_shape.items():
        at_once = max(1, BATCH_ELEMENTS // math.prod(shape))
        for first in range(0, len(members), at_once):
            batch = members[first : first + at_once]
            stack = jnp.stack([leaves[i].astype(stack_dtype) for i in batch])
            results = map_stack(partial(newton_schulz, dtype=dtype), stack)
            for i, matrix in zip(batch, results, strict=True):
                leaves[i] = matrix.astype(jnp.float32)
    return jax.tree.unflatten(treedef, leaves)


def newton_schulz(x_KMN: jax.Array, dtype: str) -> jax.Array:
    """K matrices in `dtype`, with their singular values brought to between 0.7 and 1.2."""
    tall = x_KMN.shape[1] > x_KMN.shape[2]
    x = x_KMN.mT if tall else x_KMN  # so that x xT is the smaller product
    norm_K11 = jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True)
    x = (x / (norm_K11 + 1e-7)).astype(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _scaled_as_adam(update_DF: jax.Array) -> jax.Array:
    # Liu et al., "Muon is Scalable for LLM Training" (2025): an orthogonal matrix has a root mean
    # square of 1 / sqrt(its longer side), an Adam step one of about 0.2. With this scale the same
    # learning rate and weight decay serve both.
    return 0.2 * math.sqrt(max(update_DF.shape)) * update_DF
