"""Rematerialization: which activations are kept for the backward pass and which are recomputed.

Every stock policy of `jax.checkpoint` runs flash attention a second time, because the kernel's
softmax statistics are neither a matrix product nor named. `saves_products` keeps them.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxgpt.config.fields import Remat


def rematerialized(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`block`, which keeps for its backward pass all it computes ('none'), its matrix products and
    attention ('light': norms and GELU are computed again), or its input alone ('full')."""
    if remat == "none":
        return block
    policy = saves_products if remat == "light" else jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(block, policy=policy)


def saves_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """A checkpoint policy: keep linear layers' outputs and what flash attention hands on."""
    is_flash = primitive.name.startswith("dot_product_attention_fwd")
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return is_flash or products(primitive, *args, **params)
