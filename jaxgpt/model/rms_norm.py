"""RMSNorm with a hand-written gradient that saves only x and one float32 number per row."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """Scales the last axis to a root mean square of one, then multiplies it by a float32 scale."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = None  # `linears_of_norm` folds the bias of a LayerNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalize(x, self.scale[...], self.epsilon)

    def without_gain(self, x: jax.Array) -> jax.Array:
        """x scaled to a root mean square of one."""
        return rms_normalize(x, jnp.ones_like(self.scale[...]), self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_normalize(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in float32; * scale in the dtype of x."""
    return _forward(x, scale, epsilon)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, scale: jax.Array, epsilon: float) -> tuple[jax.Array, Residuals]:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt((x32 * x32).mean(-1, keepdims=True) + epsilon)
    normed = (x32 * inverse_rms).astype(x.dtype)
    return normed * scale.astype(x.dtype), (x, inverse_rms, scale)


def _backward(epsilon: float, residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, inverse_rms, scale = residuals
    dy = dy.astype(jnp.float32)
    normed = x.astype(jnp.float32) * inverse_rms
    dnormed = jax.lax.platform_dependent(
        dy * scale, cuda=_match_softmax_rewriter, default=lambda x: x
    )
    dx = inverse_rms * (dnormed - normed * (dnormed * normed).mean(-1, keepdims=True))
    dscale = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.astype(x.dtype), dscale


def _match_softmax_rewriter(x: jax.Array) -> jax.Array:
    """x, written as x - 0 * mean(x), so that XLA fuses the backward pass into one kernel.

    XLA's softmax rewriter begins such a kernel at x - mean(x), which LayerNorm has and RMSNorm does
    not; without it, a second kernel reads the same arrays once more. XLA may not drop 0 * mean(x),
    which is NaN for an infinite mean.
    """
    return x - 0 * x.mean(-1, keepdims=True)


rms_normalize.defvjp(_forward, _backward)
