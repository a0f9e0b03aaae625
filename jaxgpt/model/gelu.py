"""tanh-GELU with its own gradient: float32 inside, and only its input saved.

Left to automatic differentiation XLA keeps several arrays as wide as the MLP, some of them in
float32: the largest activations of a layer, several times over.
"""

import math

import jax
import jax.numpy as jnp

SCALE = math.sqrt(2 / math.pi)
CUBIC = 0.044715  # Hendrycks and Gimpel 2016, as in GPT-2


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in the dtype of x."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + _tanh(x32))).astype(x.dtype)


def _tanh(x32: jax.Array) -> jax.Array:
    return jnp.tanh(SCALE * (x32 + CUBIC * x32**3))


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    # Without the barrier XLA finds the same tanh in the forward pass and keeps it, in float32.
    x, dy = jax.lax.optimization_barrier((x, dy))
    x32 = x.astype(jnp.float32)
    t = _tanh(x32)
    inner = SCALE * (1 + 3 * CUBIC * x32**2)
    slope = 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * inner
    return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
