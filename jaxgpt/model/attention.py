"""Causal self-attention: the kernel for a device, chosen once at start, and the key-value cache.

`jax.nn.dot_product_attention` never chooses cuDNN by itself, and raises instead of falling back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.config.resolved import BFLOAT16_FROM
from jaxgpt.model.chunked_attention import CHUNK, chunked_attention

# q_BTNH, k_BTKH, v_BTKH -> out_BTNH; N / K adjacent heads share keys and values
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def cudnn_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """cuDNN's flash attention, which stores no T x T scores; out_BTNH in the inputs' dtype."""
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn"
    )


def portable_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Attention on any device, in chunks of queries if the sequence is longer than one chunk."""
    attend = plain_attention if q_BTNH.shape[1] <= CHUNK else chunked_attention
    return attend(q_BTNH, k_BTKH, v_BTKH)


def plain_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Softmax over T x T scores in float32, on any device; out_BTNH in the inputs' dtype."""
    T = q_BTNH.shape[1]
    return masked_attention(q_BTNH, k_BTKH, v_BTKH, jnp.tril(jnp.ones((T, T), bool)))


class LayerCache(NamedTuple):
    """One layer's keys and values, S = block_size; token p is in slot p % S."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


Cache = list[LayerCache]  # one per block


def attention(
    attend: Attend,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache | None,
    start: jax.Array | int,
) -> tuple[jax.Array, LayerCache | None]:
    """(out_BTNH, cache): by `attend`, or by `cached_attention` if there is a cache."""
    if cache is None:
        return attend(q_BTNH, k_BTKH, v_BTKH), None
    return cached_attention(q_BTNH, k_BTKH, v_BTKH, cache, start)


def cached_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache: LayerCache,
    start: jax.Array | int,
) -> tuple[jax.Array, LayerCache]:
    """(out_BTNH, cache with these keys and values) for T tokens that follow `start` cached ones.

    Either start + T <= S, or T is 1 and the token replaces the oldest: each token attends to the
    last S, itself included. Learned positions do not allow that: all of them change when the first
    token is dropped.
    """
    T, S = q_BTNH.shape[1], cache.k_BSKH.shape[1]
    k_BSKH = jax.lax.dynamic_update_slice_in_dim(cache.k_BSKH, k_BTKH, start % S, axis=1)
    v_BSKH = jax.lax.dynamic_update_slice_in_dim(cache.v_BSKH, v_BTKH, start % S, axis=1)
    # Masks the slots that are not yet written; beyond S tokens all are.
    visible_TS = jnp.arange(S) <= (start + jnp.arange(T))[:, None]
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, visible_TS), LayerCache(k_BSKH, v_BSKH)


def masked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_TS: jax.Array
) -> jax.Array:
    """Softmax over the visible scores in float32; out_BTNH in the dtype of v."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    if K == N:
        return _attention(q_BTNH, k_BSKH, v_BSKH, visible_TS)
    # The G queries that share a key become G rows, so that no key is repeated.
    G = N // K
    q_BXKH = q_BTNH.reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)
    out_BXKH = _attention(q_BXKH, k_BSKH, v_BSKH, jnp.repeat(visible_TS, G, axis=0))
    return out_BXKH.reshape(B, T, G, K, H).swapaxes(2, 3).reshape(B, T, N, H)


def _attention(
    q_BTNH: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, visible_TS: jax.Array
) -> jax.Array:
    H = q_BTNH.shape[-1]
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32
    ) / jnp.sqrt(jnp.float32(H))
    weights_BNTS = jax.nn.softmax(jnp.where(visible_TS, scores_BNTS, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


def pick_attention(
    platform: str, compute_capability: tuple[int, int], dtype: str, head_width: int
) -> tuple[Attend, str]:
    """(kernel for a device, a text that names it and says why it was chosen).

    cuDNN's flash attention needs compute capability 8.0, bfloat16, and a head width that is a
    multiple of 8 and at most 128.
    """
    obstacles = {
        f"not on {platform}": platform != "gpu",
        "needs compute capability 8.0": compute_capability < BFLOAT16_FROM,
        f"not in {dtype}": dtype != "bfloat16",
        f"head width {head_width} is not a multiple of 8 up to 128": head_width % 8 > 0
        or head_width > 128,
    }
    for obstacle, applies in obstacles.items():
        if applies:
            return portable_attention, f"in chunks of queries (cuDNN flash attention: {obstacle})"
    return cudnn_attention, "cuDNN flash attention"


def compute_capability(device: Any) -> tuple[int, int]:
    """CUDA compute capability of a `jax.Device`, (0, 0) if it has none."""
    major, _, minor = str(getattr(device, "compute_capability", "0.0")).partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else (0, 0)


def attention_on(device: Any, dtype: str, head_width: int) -> tuple[Attend, str]:
    """`pick_attention` for a `jax.Device`."""
    return pick_attention(device.platform, compute_capability(device), dtype, head_width)
