"""GELU, tanh or exact, with a hand-written gradient: float32 inside, and only its input saved.

With automatic differentiation XLA keeps several arrays as wide as the MLP, some of them in float32:
several times a layer's largest activation.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.config.fields import Remat

SCALE = math.sqrt(2 / math.pi)
CUBIC = 0.044715  # Hendrycks and Gimpel 2016, as in GPT-2
Gelu = Callable[[jax.Array], jax.Array]


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in the dtype of x."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + _tanh(x32))).astype(x.dtype)


@jax.custom_vjp
def gelu_of_product(x: jax.Array) -> jax.Array:
    """`gelu` of a matrix product's result x, in bfloat16; on a GPU fused into the product.

    cuBLAS applies it to its float32 sums and writes both x and the GELU.
    """
    return jax.lax.platform_dependent(x, cuda=_gelu_term_by_term, default=gelu)


def _gelu_term_by_term(x: jax.Array) -> jax.Array:
    # The form that XLA fuses. If it were not fused, each term would be rounded to the dtype of x.
    half, one, scale, cubic = (jnp.asarray(c, x.dtype) for c in (0.5, 1.0, SCALE, CUBIC))
    return x * (half * (one + jnp.tanh(scale * (x + cubic * (x * (x * x))))))


def _tanh(x32: jax.Array) -> jax.Array:
    return jnp.tanh(SCALE * (x32 + CUBIC * x32**3))


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x Phi(x) = 0.5 x (1 + erf(x / sqrt(2))), in the dtype of x; torch's default."""
    x32 = x.astype(jnp.float32)
    return (x32 * _phi(x32)).astype(x.dtype)


def _phi(x32: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x32 / math.sqrt(2)))


def _tanh_slope(x32: jax.Array) -> jax.Array:
    t = _tanh(x32)
    inner = SCALE * (1 + 3 * CUBIC * x32**2)
    return 0.5 * (1 + t) + 0.5 * x32 * (1 - t * t) * inner


def _sigmoid_slope(x32: jax.Array) -> jax.Array:
    """`_tanh_slope` by 0.5 (1 + tanh u) = sigmoid(2 u): a fifth fewer instructions on a GPU."""
    squared = x32 * x32
    s = 1 / (1 + jnp.exp(x32 * (-2 * SCALE - 2 * SCALE * CUBIC * squared)))
    inner = 2 * SCALE + 6 * SCALE * CUBIC * squared
    return s + x32 * inner * (s - s * s)


def _exact_slope(x32: jax.Array) -> jax.Array:
    return _phi(x32) + x32 * jnp.exp(-0.5 * x32 * x32) / math.sqrt(2 * math.pi)


def _define_gradient(gelu: jax.custom_vjp, slope: Callable[[jax.Array], jax.Array]) -> None:
    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gelu(x), x

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        # Without the barrier XLA reuses the forward pass's tanh, and so keeps it, in float32.
        x, dy = jax.lax.optimization_barrier((x, dy))
        return ((dy.astype(jnp.float32) * slope(x.astype(jnp.float32))).astype(x.dtype),)

    gelu.defvjp(forward, backward)


def _slope(x32: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x32, cuda=_sigmoid_slope, default=_tanh_slope)


_define_gradient(gelu, _slope)
_define_gradient(gelu_of_product, _slope)
_define_gradient(exact_gelu, _exact_slope)
GELUS = {"tanh": gelu, "erf": exact_gelu}


def pick_gelu(name: str, dtype: jnp.dtype, remat: Remat) -> Gelu:
    """The GELU of a matrix product's result in `dtype`."""
    # `light` keeps the product and recomputes the GELU by itself.
    if name == "tanh" and dtype == jnp.bfloat16 and remat != "light":
        return gelu_of_product
    return GELUS[name]
