"""Causal attention over chunks of queries: memory linear in T on devices without a flash kernel.

A chunk's scores are computed against the keys up to the end of its `Part`, and recomputed in the
backward pass: only the output and each row's log-sum-exp are saved. So T x T scores never exist.

Axes besides those of gpt.py: K key heads, G query heads per key head (N = K * G), C queries in a
chunk, S keys that they can see, L chunks with the same S.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.model.remat import ATTENTION_RESIDUAL

CHUNK = 128  # on a CPU the fastest of 64 to 512 at T = 1024
PARTS = 8  # at most; each is a loop over its chunks, so that the program does not grow with T


class Part(NamedTuple):
    """L consecutive chunks, each scored against all keys that the last of them can see."""

    first: int  # index of the first query
    chunks: int  # L
    keys: int  # S


def parts_of(T: int) -> Iterator[Part]:
    """The parts of T queries; the last may reach beyond T, where queries are padding."""
    # At least two: without a loop XLA would merge a chunk's forward and backward pass, keeping its
    # scores.
    chunks = max(2, math.ceil(T / (CHUNK * PARTS)))
    for first in range(0, T, chunks * CHUNK):
        yield Part(first, chunks, min(first + chunks * CHUNK, T))


@jax.custom_vjp
def chunked_attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """out_BTNH in the inputs' dtype, softmax in float32; query head n reads key head n // G."""
    return _forward(q_BTNH, k_BTKH, v_BTKH)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, Any]:
    T, K = k_BTKH.shape[1:3]
    q_BKGTH, k_BKTH, v_BKTH = _by_head(q_BTNH, K), _by_head(k_BTKH), _by_head(v_BTKH)

    def chunk(
        part: Part, _: None, start: jax.Array, q_BKGCH: jax.Array
    ) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores = _masked_scores(start, q_BKGCH, k_BKTH[:, :, : part.keys])
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        out = _product("BKGCS,BKSH->BKGCH", weights.astype(v_BKTH.dtype), v_BKTH[:, :, : part.keys])
        return None, ((out / total).astype(q_BTNH.dtype), largest + jnp.log(total))

    results = [_scan_chunks(chunk, part, None, q_BKGTH)[1] for part in parts_of(T)]
    outs, lses = zip(*results, strict=True)
    out_BTNH = checkpoint_name(_by_time(_joined(outs, T)), ATTENTION_RESIDUAL)
    lse_BKGT1 = checkpoint_name(_joined(lses, T), ATTENTION_RESIDUAL)
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, out_BTNH, lse_BKGT1)


def _backward(residuals: Any, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTNH, k_BTKH, v_BTKH, out_BTNH, lse_BKGT1 = residuals
    T, K = k_BTKH.shape[1:3]
    q_BKGTH, k_BKTH, v_BKTH = _by_head(q_BTNH, K), _by_head(k_BTKH), _by_head(v_BTKH)
    out_dot_dout = (out_BTNH.astype(jnp.float32) * dout_BTNH).sum(axis=-1, keepdims=True)

    def chunk(
        part: Part,
        carry: tuple[jax.Array, jax.Array],
        start: jax.Array,
        q_BKGCH: jax.Array,
        dout_BKGCH: jax.Array,
        lse_BKGC1: jax.Array,
        delta_BKGC1: jax.Array,
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array]]:
        k_BKSH, v_BKSH = k_BKTH[:, :, : part.keys], v_BKTH[:, :, : part.keys]
        weights = jnp.exp(_masked_scores(start, q_BKGCH, k_BKSH) - lse_BKGC1)
        dweights = _product("BKGCH,BKSH->BKGCS", dout_BKGCH, v_BKSH)
        dscores = (weights * (dweights - delta_BKGC1)).astype(q_BKGCH.dtype)
        dk = _product("BKGCS,BKGCH->BKSH", dscores, q_BKGCH)
        dv = _product("BKGCS,BKGCH->BKSH", weights.astype(v_BKSH.dtype), dout_BKGCH)
        return (carry[0] + dk, carry[1] + dv), (_product("BKGCS,BKSH->BKGCH", dscores, k_BKSH),)

    dk_BKTH = dv_BKTH = jnp.zeros(k_BKTH.shape, jnp.float32)
    dq_parts = []
    by_query = (q_BKGTH, _by_head(dout_BTNH, K), lse_BKGT1, _by_head(out_dot_dout, K))
    for part in parts_of(T):
        zeros = jnp.zeros_like(dk_BKTH[:, :, : part.keys])
        (dk, dv), (dq,) = _scan_chunks(chunk, part, (zeros, zeros), *by_query)
        dk_BKTH = dk_BKTH.at[:, :, : part.keys].add(dk)
        dv_BKTH = dv_BKTH.at[:, :, : part.keys].add(dv)
        dq_parts.append(dq)
    scale = _scale(q_BTNH.shape[-1])
    dq_BTNH = _by_time(_joined(dq_parts, T)) * scale
    dk_BTKH, dv_BTKH = _by_time(dk_BKTH) * scale, _by_time(dv_BKTH)
    dtype = q_BTNH.dtype
    return dq_BTNH.astype(dtype), dk_BTKH.astype(dtype), dv_BTKH.astype(dtype)


chunked_attention.defvjp(_forward, _backward)


def _scan_chunks(
    chunk: Callable[..., Any], part: Part, carry: Any, *arrays: jax.Array
) -> tuple[Any, tuple[jax.Array, ...]]:
    """(carry, outputs (B, K, G, L * C, ...)) of `chunk(part, carry, start, *slices)` in order.

    `arrays` are (B, K, G, T, ...); `start` is the index of a chunk's first query.
    """
    end = part.first + part.chunks * CHUNK
    arrays = tuple(x[:, :, :, part.first : end] for x in arrays)

    def split(x: jax.Array) -> jax.Array:
        missing = part.chunks * CHUNK - x.shape[3]
        x = jnp.pad(x, [(0, missing if axis == 3 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:3], part.chunks, CHUNK, *x.shape[4:]), 3, 0)

    starts_L = part.first + CHUNK * jnp.arange(part.chunks)
    carry, outputs = jax.lax.scan(
        lambda carry, xs: chunk(part, carry, *xs), carry, (starts_L, *map(split, arrays))
    )
    return carry, tuple(
        jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, *x.shape[5:]) for x in outputs
    )


def _joined(parts: Sequence[jax.Array], T: int) -> jax.Array:
    """The results of all parts, without padding queries."""
    return jnp.concatenate(parts, axis=3)[:, :, :, :T]


def _masked_scores(start: jax.Array, q_BKGCH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    C, S = q_BKGCH.shape[3], k_BKSH.shape[2]
    scores = _product("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH) * _scale(q_BKGCH.shape[-1])
    return jnp.where(jnp.arange(S) <= (start + jnp.arange(C))[:, None], scores, -jnp.inf)


def _scale(H: int) -> float:
    return 1 / math.sqrt(H)


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _by_head(x_BTNH: jax.Array, key_heads: int | None = None) -> jax.Array:
    """(B, N, T, H), or (B, K, G, T, H) with the number of key heads."""
    x_BNTH = jnp.moveaxis(x_BTNH, 1, 2)
    if key_heads is None:
        return x_BNTH
    B, N, T, H = x_BNTH.shape
    return x_BNTH.reshape(B, key_heads, N // key_heads, T, H)


def _by_time(x: jax.Array) -> jax.Array:
    """`_by_head` undone: (B, T, N, H)."""
    B, *heads, T, H = x.shape
    return jnp.moveaxis(x.reshape(B, math.prod(heads), T, H), 1, 2)
