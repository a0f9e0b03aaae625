"""Causal self-attention: which kernel runs on which device, chosen once at start.

`jax.nn.dot_product_attention` never chooses cuDNN by itself, and raises instead of falling back.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# q_BTNH, k_BTNH, v_BTNH -> out_BTNH
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cudnn_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    """Flash attention by cuDNN: no T x T scores. Out_BTNH in the inputs' dtype."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn"
    )


def plain_attention(q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array) -> jax.Array:
    """Softmax over T x S scores in float32, on any device. Out_BTNH in the inputs' dtype."""
    T = q_BTNH.shape[1]
    return attention_over(q_BTNH, k_BTNH, v_BTNH, jnp.tril(jnp.ones((T, T), bool)))


def attention_over(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_TS: jax.Array
) -> jax.Array:
    """Attention of T positions to those of S keys that `visible_TS` marks; out as above."""
    H = q_BTNH.shape[-1]
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32
    ) / jnp.sqrt(jnp.float32(H))
    weights_BNTS = jax.nn.softmax(jnp.where(visible_TS, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


def pick_attention(
    platform: str, compute_capability: tuple[int, int], dtype: str, head_width: int
) -> tuple[Attend, str]:
    """The kernel for a device and a sentence that says which one and why.

    cuDNN's flash attention wants compute capability 8.0, bfloat16, and a head width that is a
    multiple of 8 and at most 128.
    """
    obstacles = {
        f"not on {platform}": platform != "gpu",
        "needs compute capability 8.0": compute_capability < (8, 0),
        f"not in {dtype}": dtype != "bfloat16",
        f"head width {head_width} is not a multiple of 8 up to 128": head_width % 8 > 0
        or head_width > 128,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            return plain_attention, f"plain (cuDNN flash attention: {obstacle})"
    return cudnn_attention, "cuDNN flash attention"


def compute_capability(device: Any) -> tuple[int, int]:
    """CUDA compute capability of a `jax.Device`, (0, 0) for one that has none."""
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else (0, 0)
