"""Building blocks that networks share: linear layers, a norm fused into one, dropout."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.model.layer_norm import LayerNorm
from jaxgpt.model.rms_norm import RMSNorm

Norm = LayerNorm | RMSNorm
# GPT-2's, for every matrix and embedding, so that the learning rates known for it apply.
INIT_STD = 0.02


def make_linear(
    cfg: ModelConfig,
    d_in: int,
    d_out: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    residual: bool = False,
) -> nnx.Linear:
    """A linear layer: float32 parameters, products in `dtype`, kernel of shape (d_in, d_out).

    A `residual` layer writes to the residual stream: it starts smaller, as in GPT-2, or at zero.
    """
    std = INIT_STD / math.sqrt(2 * cfg.n_layer) if residual else INIT_STD
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=cfg.bias,
        dtype=dtype,
        param_dtype=jnp.float32,
        kernel_init=nnx.initializers.zeros if residual and cfg.zero_init else init,
        dot_general=dot_general_by_rows,
        rngs=rngs,
    )


def dot_general_by_rows(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`lax.dot_general` of x (..., d_in) and kernel (d_in, d_out), leading axes of x flattened.

    The weight gradient then contracts one axis instead of two, for which XLA:CPU has a fast
    matrix product; this cuts the demo's step time by a third.
    """
    y_MF = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
    return y_MF.reshape(*x.shape[:-1], kernel.shape[-1])


def linears_of_norm(
    linears: Sequence[nnx.Linear], norm: Norm, x_BTD: jax.Array, parts: int = 1
) -> list[jax.Array]:
    """Each linear(norm(x_BTD)), with the norm's scale and bias folded into the linear layer's.

    The last axis of each layer's output is cut into `parts` arrays of equal size.

    The scale's gradient is then a sum over an array as large as the kernel. Without folding it is a
    sum over all tokens, for which XLA writes a float32 array as large as x and reads it back.
    With one token per sequence, as in cached generation, folding would cost more than the layer.
    """
    if x_BTD.shape[1] == 1:
        normed = norm(x_BTD)
        return [y for linear in linears for y in jnp.split(linear(normed), parts, axis=-1)]
    kernels = [norm.scale[...][:, None] * linear.kernel[...] for linear in linears]
    normed = norm.without_gain(x_BTD).astype(linears[0].dtype)
    ys = [
        dot_general_by_rows(normed, part)
        for kernel in kernels
        for part in jnp.split(kernel.astype(normed.dtype), parts, axis=1)
    ]
    if norm.bias is None:
        return ys
    biases = [linear.bias[...] + norm.bias[...] @ linear.kernel[...] for linear in linears]
    cut = [part for bias in biases for part in jnp.split(bias, parts)]
    return [y + bias.astype(y.dtype) for y, bias in zip(ys, cut, strict=True)]


def add_by_rows(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """x + y, both with their leading axes flattened, as `dot_general_by_rows` computed y.

    XLA then fuses the addition into that product. With a reshape in between, it would copy x and
    let cuBLAS accumulate into the copy.
    """
    D = x_BTD.shape[-1]
    return (x_BTD.reshape(-1, D) + y_BTD.reshape(-1, D)).reshape(x_BTD.shape)


def dropout(layer: nnx.Dropout, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Dropout by `key`; without one, x unchanged."""
    return layer(x, deterministic=key is None, rngs=key)
