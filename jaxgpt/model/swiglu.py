"""SwiGLU with a hand-written gradient: float32 inside, and only its two inputs saved.

With automatic differentiation XLA keeps float32 arrays as wide as the MLP, as with GELU.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in the dtype of gate; silu(x) = x sigmoid(x)."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate, up), (gate, up)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA reuses the forward pass's sigmoid, and so keeps it, in float32.
    gate, up, dy = jax.lax.optimization_barrier((*residuals, dy))
    gate32, up32, dy32 = (x.astype(jnp.float32) for x in (gate, up, dy))
    share = jax.nn.sigmoid(gate32)
    slope = share * (1 + gate32 * (1 - share))
    return (dy32 * up32 * slope).astype(gate.dtype), (dy32 * gate32 * share).astype(up.dtype)


swiglu.defvjp(_forward, _backward)
