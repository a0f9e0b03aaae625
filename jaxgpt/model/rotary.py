"""Rotary positions: rotates queries and keys, so that scores depend on position differences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """Cosines and sines of the angles of T positions, float32; I is H / 2."""

    cos_TI: jax.Array
    sin_TI: jax.Array


def rotation(positions_T: jax.Array, head_width: int, theta: float) -> Rotation:
    """For angles position * theta^(-2i / head_width), i < head_width / 2 (Su et al. 2021)."""
    exponents_I = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles_TI = positions_T.astype(jnp.float32)[:, None] / theta**exponents_I
    return Rotation(jnp.cos(angles_TI), jnp.sin(angles_TI))


def rotate(x_BTNH: jax.Array, by: Rotation) -> jax.Array:
    """x with its elements i and i + H/2 rotated by angle i, in the dtype of x."""
    first_BTNI, second_BTNI = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos_T1I, sin_T1I = by.cos_TI[:, None], by.sin_TI[:, None]
    rotated = (
        first_BTNI * cos_T1I - second_BTNI * sin_T1I,
        second_BTNI * cos_T1I + first_BTNI * sin_T1I,
    )
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
