import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.model.attention import plain_attention, portable_attention
from jaxgpt.model.chunked_attention import CHUNK, chunked_attention, parts_of


def inputs(B: int, T: int, N: int, K: int, H: int) -> list[jax.Array]:
    """q, k, v and the gradient of the output."""
    keys = jax.random.split(jax.random.key(T), 4)
    return [
        jax.random.normal(key, (B, T, heads, H))
        for key, heads in zip(keys, (N, K, K, N), strict=True)
    ]


def plain_with_groups(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    groups = q.shape[2] // k.shape[2]
    return plain_attention(q, jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2))


# One chunk, an odd last chunk, several chunks in each part, grouped and single key heads.
SHAPES = [(2, 3, 2, 2, 4), (2, CHUNK + 1, 4, 2, 8), (1, 1000, 3, 3, 12), (1, 2050, 2, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_equal_plain_attention(shape: tuple[int, ...]) -> None:
    q, k, v, dout = inputs(*shape)
    expected, pull_back = jax.vjp(jax.jit(plain_with_groups), q, k, v)
    got, chunked_pull_back = jax.vjp(jax.jit(chunked_attention), q, k, v)
    for a, b in zip((got, *chunked_pull_back(dout)), (expected, *pull_back(dout)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("T", [1, CHUNK, 1000, 1024, 1025, 5000])
def test_parts_cover_every_query_once(T: int) -> None:
    parts = list(parts_of(T))
    assert len(parts) <= 8
    ends = [part.first + part.chunks * CHUNK for part in parts]
    assert [0, *ends[:-1]] == [part.first for part in parts]
    assert ends[-1] >= T == parts[-1].keys


@pytest.mark.parametrize("T", [512, 2048])
def test_no_scores_of_all_queries_are_kept(T: int) -> None:
    """The memory of the compiled gradient grows as T, not as T * T."""

    def temporary_bytes(attend, T: int) -> int:
        q, k, v, dout = inputs(1, T, 2, 2, 8)
        gradient = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
        memory = gradient.lower(q, k, v, dout).compile().memory_analysis()
        return memory.temp_size_in_bytes

    def growth(attend) -> float:
        return temporary_bytes(attend, 2 * T) / temporary_bytes(attend, T)

    assert growth(portable_attention) < 2.5
    assert growth(plain_attention) > 3.5  # so the check can fail
