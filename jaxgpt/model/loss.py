"""Next-token cross-entropy fused with the output head, so that [B, T, V] logits never exist.

The rows of a batch are processed in chunks of C. For each chunk the forward pass computes the
logits, the loss, and the gradients of the hidden state and of the head; the backward pass only
scales them. So the head's matrix product runs once, and the largest array is one chunk's logits.
Padded vocabulary rows (`n_vocab` and up) are excluded from the softmax.
"""

import math
from functools import partial, reduce

import jax
import jax.numpy as jnp

# Rows in one chunk: logits of 4,096 x 50,304 in bfloat16 take 0.4 GB.
CHUNK_ROWS = 4096
# Columns that share a maximum in a GPU's logsumexp. With 6 or 8 XLA computes the maxima in a kernel
# of their own on most cards, which reads the logits once more.
GROUP = 4


def mask_padding(logits_V: jax.Array, n_vocab: int | None) -> jax.Array:
    """Logits (..., V) with minus infinity for ids that the tokenizer cannot produce."""
    V = logits_V.shape[-1]
    if n_vocab is None or n_vocab == V:
        return logits_V
    return jnp.where(jnp.arange(V) < n_vocab, logits_V, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_cross_entropy(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    n_vocab: int | None,
    chunk_rows: int = CHUNK_ROWS,
) -> jax.Array:
    """Mean loss () in nats over B * T tokens, float32, of logits h_BTD @ head_VD.T.

    Matrix products run in the dtype of `h_BTD`; logsumexp, loss and the head's gradient are
    float32. Differentiable in `h_BTD` and `head_VD`.
    """
    return token_scores(h_BTD, head_VD, targets_BT, n_vocab, chunk_rows)[0].mean()


def token_scores(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    n_vocab: int | None,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[jax.Array, jax.Array]:
    """(losses_BT, hits_BT): each token's loss in nats, float32, and whether it is the likeliest.

    Not to be differentiated: that would keep the logits of every chunk.
    """
    head_VD = head_VD.astype(h_BTD.dtype)

    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_CD, targets_C = chunk
        losses_C, logits_CV, _ = _log_softmax_parts(h_CD, head_VD, targets_C, n_vocab)
        return losses_C, mask_padding(logits_CV, n_vocab).argmax(-1) == targets_C

    chunks, M = _in_chunks(h_BTD, targets_BT, chunk_rows)
    losses, hits = jax.lax.map(one_chunk, chunks)
    shape = targets_BT.shape
    return losses.reshape(-1)[:M].reshape(shape), hits.reshape(-1)[:M].reshape(shape)


def _forward(
    h_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    n_vocab: int | None,
    chunk_rows: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    chunks, M = _in_chunks(h_BTD, targets_BT, chunk_rows)
    w_VD = head_VD.astype(h_BTD.dtype)

    def one_chunk(
        dw_VD: jax.Array, chunk: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        h_CD, targets_C = chunk
        losses_C, logits_CV, lse_C = _log_softmax_parts(h_CD, w_VD, targets_C, n_vocab)
        # A target of -1 marks a padding row, which has no gradient. One comparison masks these rows
        # and the padded ids: XLA would read a mask of the ids alone from memory, for each row.
        ids_V = jnp.arange(w_VD.shape[0])
        possible_CV = ids_V < jnp.where(targets_C >= 0, n_vocab or len(ids_V), 0)[:, None]
        p_CV = jnp.exp(logits_CV.astype(jnp.float32) - lse_C[:, None])
        dlogits_CV = jnp.where(possible_CV, p_CV, 0) - (ids_V == targets_C[:, None])
        # In float16, dlogits / M would underflow: there the backward pass divides by M, when it
        # applies the loss scale.
        weight = 1.0 if h_CD.dtype == jnp.float16 else 1 / M
        dlogits_CV = (dlogits_CV * weight).astype(h_CD.dtype)
        dh_CD = dlogits_CV @ w_VD
        dw_VD += jnp.einsum("CV,CD->VD", dlogits_CV, h_CD, preferred_element_type=jnp.float32)
        return dw_VD, (losses_C, dh_CD)

    zeros_VD = jnp.zeros(head_VD.shape, jnp.float32)
    dw_VD, (losses, dh) = jax.lax.scan(one_chunk, zeros_VD, chunks)
    loss = losses.reshape(-1)[:M].mean()
    return loss, (dh.reshape(-1, h_BTD.shape[-1])[:M].reshape(h_BTD.shape), dw_VD)


def _backward(
    n_vocab: int | None,
    chunk_rows: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
    dh_BTD, dw_VD = gradients
    if dh_BTD.dtype == jnp.float16:
        cotangent = cotangent / math.prod(dh_BTD.shape[:-1])
        dh32_BTD = dh_BTD.astype(jnp.float32) * cotangent
        return (dh32_BTD.astype(jnp.float16), dw_VD * cotangent, None)
    return (dh_BTD * cotangent.astype(dh_BTD.dtype), dw_VD * cotangent, None)


mean_cross_entropy.defvjp(_forward, _backward)


def _log_softmax_parts(
    h_CD: jax.Array, w_VD: jax.Array, targets_C: jax.Array, n_vocab: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(losses_C, logits_CV, logsumexp_C): logits in the dtype of `h_CD`, the others float32.

    The logits of padded ids are not masked.
    """
    logits_CV = jnp.einsum("CD,VD->CV", h_CD, w_VD)
    lse_C = _logsumexp(logits_CV, n_vocab)
    picked_C = jnp.take_along_axis(logits_CV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
    return lse_C - picked_C.astype(jnp.float32), logits_CV, lse_C


def _logsumexp(logits_CV: jax.Array, n_vocab: int | None) -> jax.Array:
    """logsumexp_C, float32, without padded ids; a GPU reads the logits once for it."""

    def plain(logits_CV: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(mask_padding(logits_CV, n_vocab).astype(jnp.float32), axis=-1)

    one_pass = partial(_one_pass_logsumexp, n_vocab=n_vocab or logits_CV.shape[-1])
    return jax.lax.platform_dependent(logits_CV, cuda=one_pass, default=plain)


def _one_pass_logsumexp(logits_CV: jax.Array, n_vocab: int) -> jax.Array:
    """logsumexp_C in one reduction: of the maximum, and of the sum of exponentials relative to it.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. Their recurrence
    waits for each exponential, so GROUP columns, equally far apart, share a maximum first.
    """
    V = logits_CV.shape[-1]
    width = V // math.gcd(V, GROUP)
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # minus infinity minus itself is NaN

    def part(first: int) -> jax.Array:
        columns = logits_CV[:, first : first + width].astype(jnp.float32)
        return mask_padding(columns, min(n_vocab - first, width))

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (max_a, sum_a), (max_b, sum_b) = a, b
        scale = jnp.exp(-jnp.abs(max_a - max_b))  # of the sum with the smaller maximum
        total = jnp.where(max_a >= max_b, sum_a + sum_b * scale, sum_a * scale + sum_b)
        return jnp.maximum(max_a, max_b), total

    parts = [part(first) for first in range(0, V, width)]
    max_ = reduce(jnp.maximum, parts, lowest)
    sum_ = sum(jnp.exp(part - max_) for part in parts)
    max_C, sum_C = jax.lax.reduce((max_, sum_), (lowest, jnp.float32(0)), join, (1,))
    return max_C + jnp.log(sum_C)


def _in_chunks(
    h_BTD: jax.Array, targets_BT: jax.Array, chunk_rows: int
) -> tuple[tuple[jax.Array, jax.Array], int]:
    """Flattened rows in n chunks: (h (n, C, D), targets (n, C), -1 for padding rows), and B * T."""
    h_MD, targets_M = h_BTD.reshape(-1, h_BTD.shape[-1]), targets_BT.reshape(-1).astype(jnp.int32)
    M, D = h_MD.shape
    n = -(-M // chunk_rows)
    C = -(-M // n)
    if padding := n * C - M:
        h_MD = jnp.pad(h_MD, ((0, padding), (0, 0)))
        targets_M = jnp.pad(targets_M, (0, padding), constant_values=-1)
    return (h_MD.reshape(n, C, D), targets_M.reshape(n, C)), M
