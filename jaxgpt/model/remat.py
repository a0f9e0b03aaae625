"""Rematerialization: what is kept for the backward pass, what is recomputed, and what that costs.

Imports JAX only when a block is built, because the planner reads the costs without it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgpt.config.fields import Remat

# The `checkpoint_name` of what `chunked_attention` saves for its backward pass.
ATTENTION_RESIDUAL = "attention_residual"


class Kept(NamedTuple):
    """Activation memory at a step's peak, fitted to benchmarks/results/memory.json.

    In bytes per token and unit of width, in bfloat16.
    """

    per_layer: float  # until the layer's backward pass
    at_the_head: float  # in addition, while the loss is computed
    in_a_block: float  # in addition, while one block's backward pass runs
    copies: float  # share of the weights that exist a second time, in the dtype of the products
    dropout: float  # per layer, if there is dropout


class RematSetting(NamedTuple):
    """One value of `--remat`."""

    policy: Callable[..., bool] | None  # of `jax.checkpoint`; None: no checkpoint, all is kept
    work: float  # of a step, relative to one that recomputes nothing
    kept: Kept


def saves_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Checkpoint policy: keep outputs of linear layers and the residuals of flash attention.

    Every stock policy of `jax.checkpoint` runs flash attention a second time, because the kernel's
    softmax statistics are neither a matrix product nor named.
    """
    import jax

    is_flash = primitive.name.startswith("dot_product_attention_fwd")
    is_flash |= params.get("name") == ATTENTION_RESIDUAL
    is_product = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return is_flash or is_product(primitive, *args, **params)


def saves_nothing(primitive: Any, *args: Any, **params: Any) -> bool:
    """Checkpoint policy: keep the block's input only."""
    return False


# From the fastest to the one that needs the least memory; `fit.py` orders candidates by their time.
REMATS: dict[Remat, RematSetting] = {
    "none": RematSetting(policy=None, work=1.0, kept=Kept(33.1, 0, 0, copies=0.6, dropout=4.0)),
    # Recomputes norms, rotations and the MLP's activation: many bytes for little work.
    "light": RematSetting(
        policy=saves_products, work=1.05, kept=Kept(21, 0, 0, copies=0, dropout=0.6)
    ),
    # Recomputes each block's forward pass except its last product.
    "full": RematSetting(
        policy=saves_nothing, work=1.2, kept=Kept(2, 10, 38, copies=0.2, dropout=0.0)
    ),
}


def rematerialized(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`block`, keeping for its backward pass what the policy of `remat` saves."""
    import jax

    policy = REMATS[remat].policy
    return block if policy is None else jax.checkpoint(block, policy=policy)
