"""Keys and values of the tokens seen so far, so that a new token costs one position and not all.

Positions are learned, so the cache holds only as long as no token moves: when the context is full
and its first token drops out, every position changes and nothing kept is of use.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.model.attention import attention_over
from jaxgpt.model.gpt import GPT, Block


class LayerCache(NamedTuple):
    """One layer's keys and values, S = block_size; what lies beyond the tokens seen is unread."""

    k_BSNH: jax.Array
    v_BSNH: jax.Array


Cache = list[LayerCache]


def empty_cache(model: GPT, batch: int) -> Cache:
    """A cache of no tokens for `batch` sequences."""
    cfg = model.cfg
    shape = (batch, cfg.block_size, cfg.n_head, cfg.n_embd // cfg.n_head)
    return [
        LayerCache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))
        for _ in range(cfg.n_layer)
    ]


def cached_features(
    model: GPT, tokens_BT: jax.Array, start: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """`model.features` of T tokens that follow `start` cached ones, and the cache with them in it.

    start + T must not exceed block_size.
    """
    T = tokens_BT.shape[1]
    positions_T = start + jnp.arange(T)
    x_BTD = (model.wte(tokens_BT) + model.wpe(positions_T)).astype(model.dtype)
    visible_TS = jnp.arange(model.cfg.block_size) <= positions_T[:, None]
    new_cache = []
    for block, layer in zip(model.blocks, cache, strict=True):
        x_BTD, layer = _through_block(block, x_BTD, start, visible_TS, layer)
        new_cache.append(layer)
    return model.ln_f(x_BTD), new_cache


def _through_block(
    block: Block, x_BTD: jax.Array, start: jax.Array, visible_TS: jax.Array, layer: LayerCache
) -> tuple[jax.Array, LayerCache]:
    q_BTNH, k_BTNH, v_BTNH = block.attn.heads(block.attn.c_attn(block.ln_1(x_BTD)))
    k_BSNH = jax.lax.dynamic_update_slice_in_dim(layer.k_BSNH, k_BTNH, start, axis=1)
    v_BSNH = jax.lax.dynamic_update_slice_in_dim(layer.v_BSNH, v_BTNH, start, axis=1)
    out_BTNH = attention_over(q_BTNH, k_BSNH, v_BSNH, visible_TS)
    x_BTD = x_BTD + block.attn.c_proj(out_BTNH.reshape(x_BTD.shape))
    h_BTF = block.mlp.c_fc(block.ln_2(x_BTD))
    return x_BTD + block.mlp.narrowed(h_BTF), LayerCache(k_BSNH, v_BSNH)
