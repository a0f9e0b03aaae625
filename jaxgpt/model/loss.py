"""Next-token cross-entropy fused with the output head, so that [B, T, V] logits never exist.

The rows of a batch are processed in chunks. For each chunk the forward pass computes the logits,
the loss, and the gradients of the hidden state and of the head; the backward pass only scales them.
So the head's matrix product runs once, and the largest array is one chunk's logits.
Padded vocabulary rows (`n_vocab` and up) are excluded from the softmax.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

# Rows in one chunk: logits of 4,096 x 50,304 in bfloat16 take 0.4 GB.
CHUNK_ROWS = 4096


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
        return losses_C, logits_CV.argmax(-1) == targets_C

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
        # A target of -1 marks a padding row, which has no gradient. float16 would round gradients
        # of the mean to zero, so there the backward pass divides by M, with the loss scale.
        weight = 1.0 if h_CD.dtype == jnp.float16 else 1 / M
        weight_C = jnp.where(targets_C >= 0, weight, 0.0)
        is_target_CV = jnp.arange(w_VD.shape[0]) == targets_C[:, None]
        p_CV = jnp.exp(logits_CV.astype(jnp.float32) - lse_C[:, None])
        dlogits_CV = ((p_CV - is_target_CV) * weight_C[:, None]).astype(h_CD.dtype)
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
    """(losses_C, logits_CV, logsumexp_C): logits in the dtype of `h_CD`, the others float32."""
    logits_CV = mask_padding(jnp.einsum("CD,VD->CV", h_CD, w_VD), n_vocab)
    lse_C = _logsumexp(logits_CV.astype(jnp.float32))
    picked_C = jnp.take_along_axis(logits_CV, jnp.maximum(targets_C, 0)[:, None], axis=-1)[:, 0]
    return lse_C - picked_C.astype(jnp.float32), logits_CV, lse_C


def _logsumexp(x_CV: jax.Array) -> jax.Array:
    """logsumexp_C; a GPU reads the logits once for it."""
    plain = partial(jax.nn.logsumexp, axis=-1)
    return jax.lax.platform_dependent(x_CV, cuda=_one_pass_logsumexp, default=plain)


def _one_pass_logsumexp(x_CV: jax.Array) -> jax.Array:
    """logsumexp_C in one reduction: of the maximum, and of the sum of exponentials relative to it.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    lowest = jnp.finfo(x_CV.dtype).min  # not minus infinity: infinity - infinity is NaN

    def join(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        (max_a, sum_a), (max_b, sum_b) = a, b
        scale = jnp.exp(-jnp.abs(max_a - max_b))  # of the sum with the smaller maximum
        total = jnp.where(max_a >= max_b, sum_a + sum_b * scale, sum_a * scale + sum_b)
        return jnp.maximum(max_a, max_b), total

    each = (jnp.maximum(x_CV, lowest), jnp.ones_like(x_CV))
    nothing = (lowest, jnp.zeros((), x_CV.dtype))
    max_C, sum_C = jax.lax.reduce(each, nothing, join, (1,))
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
