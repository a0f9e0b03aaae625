"""LayerNorm with a hand-written gradient that saves only x and two float32 numbers per row.

With automatic differentiation XLA keeps float32 copies of x and reduces over it more often, which
costs memory on a GPU and about a tenth of the demo's step on a CPU.
"""

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5  # GPT-2's; Flax's default is 1e-6


class LayerNorm(nnx.Module):
    """Normalizes the last axis; float32 parameters, output in the input's dtype."""

    def __init__(self, width: int, use_bias: bool):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32)) if use_bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = normalize(x_BTD, self.scale[...])
        return y_BTD if self.bias is None else y_BTD + self.bias[...].astype(y_BTD.dtype)

    def without_gain(self, x_BTD: jax.Array) -> jax.Array:
        """x with a mean of zero and a variance of one."""
        return normalize(x_BTD, jnp.ones_like(self.scale[...]))  # XLA removes a factor of one


@jax.custom_vjp
def normalize(x: jax.Array, scale_D: jax.Array) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * scale over the last axis, in the dtype of x."""
    return _forward(x, scale_D)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array, scale_D: jax.Array) -> tuple[jax.Array, Residuals]:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    inverse_std = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + EPSILON)
    y = (centred * inverse_std * scale_D).astype(x.dtype)
    return y, (x, mean, inverse_std, scale_D)


def _backward(residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, mean, inverse_std, scale_D = residuals
    dy = dy.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * inverse_std
    dnormed = dy * scale_D
    along_one = dnormed.mean(-1, keepdims=True)
    along_normed = (dnormed * normed).mean(-1, keepdims=True)
    dx = inverse_std * (dnormed - along_one - normed * along_normed)
    dscale_D = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.astype(x.dtype), dscale_D


normalize.defvjp(_forward, _backward)
