import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.trees import TINY

from jaxgpt.model.attention import plain_attention
from jaxgpt.model.generate import Generator, Sampling, draw
from jaxgpt.model.network import build_model, init_params

GRAPHDEF = build_model(TINY, "float32", plain_attention)
T = TINY.block_size
DRAWS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(temperature=2.0, top_k=None),
    "top-k": Sampling(temperature=2.0, top_k=5),
    "top-p": Sampling(temperature=2.0, top_k=None, top_p=0.8),
    "top-k and top-p": Sampling(temperature=2.0, top_k=20, top_p=0.8),
}


@pytest.fixture(scope="module")
def params():
    params = init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)  # peaked distributions


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return {name: Generator(GRAPHDEF, T, sampling, chunk=4) for name, sampling in DRAWS.items()}


@pytest.fixture(scope="module")
def uncached() -> dict[str, Generator]:
    return {
        name: Generator(GRAPHDEF, T, sampling, chunk=13, cached=False)
        for name, sampling in DRAWS.items()
    }


@jax.jit
def next_logits(params, window_1T: jax.Array, count: int) -> jax.Array:
    return nnx.merge(GRAPHDEF, params)(window_1T)[0, count - 1]


def greedy(params, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding by one full forward pass per token, cropped as in nanoGPT."""
    tokens = list(prompt)
    for _ in range(new):
        seen = tokens[-T:]
        window_1T = np.array([seen + [0] * (T - len(seen))], np.int32)
        tokens.append(int(next_logits(params, window_1T, len(seen)).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(T)), list(range(T + 4))])
def test_greedy_decoding_equals_full_forward_passes_beyond_the_context_too(
    params, generators, prompt: list[int]
) -> None:
    tokens = generators["greedy"].generate(params, prompt, 10, jax.random.key(0), samples=2)
    expected = greedy(params, prompt, 10)
    assert tokens.tolist() == [expected, expected]


@pytest.mark.parametrize("prompt", [[3], list(range(T - 3)), list(range(T + 4))])
@pytest.mark.parametrize("name", DRAWS)
def test_the_cache_changes_no_token(
    params, generators, uncached, name: str, prompt: list[int]
) -> None:
    a, b = (
        generator.generate(params, prompt, 13, jax.random.key(5), samples=3)
        for generator in (generators[name], uncached[name])
    )
    assert a.shape == (3, 13)
    np.testing.assert_array_equal(a, b)


def test_a_seed_gives_the_same_text_and_another_seed_another(params, generators) -> None:
    a, b, c = (
        generators["temperature"].generate(params, [1], 20, jax.random.key(k), 1).tolist()
        for k in (0, 0, 1)
    )
    assert a == b
    assert a != c


def test_each_position_uses_other_random_bits(params, generators) -> None:
    undecided = jax.tree.map(jnp.zeros_like, params)  # all ids equally likely
    tokens = generators["temperature"].generate(undecided, [1], 40, jax.random.key(0), samples=2)
    assert all(len(set(row)) > 20 for row in tokens.tolist())
    assert (tokens[0] == tokens[1]).mean() < 0.2


def test_a_sample_does_not_depend_on_how_many_there_are(params, generators) -> None:
    few, many = (
        generators["temperature"].generate(params, [1], 20, jax.random.key(0), samples=n)
        for n in (2, 5)
    )
    np.testing.assert_array_equal(few, many[:2])
    assert len(np.unique(many, axis=0)) == 5


def test_padded_ids_are_never_drawn(params) -> None:
    cfg = dataclasses.replace(TINY, n_vocab=3)
    graphdef = build_model(cfg, "float32", plain_attention)
    for top_k, top_p in ((200, None), (None, None), (None, 0.99)):
        sampling = Sampling(temperature=50.0, top_k=top_k, top_p=top_p)
        generator = Generator(graphdef, T, sampling, chunk=50)
        tokens = generator.generate(params, [0], 50, jax.random.key(0), samples=4)
        assert set(np.unique(tokens)) == {0, 1, 2}


def test_stream_yields_chunks_of_the_requested_total_length(params, generators) -> None:
    stream = generators["top-k"].stream(params, [1], 10, jax.random.key(0), samples=2)
    parts = list(stream)
    assert [part.shape for part in parts] == [(2, 4), (2, 4), (2, 2)]
    in_one = Generator(GRAPHDEF, T, DRAWS["top-k"], chunk=10)
    expected = in_one.generate(params, [1], 10, jax.random.key(0), samples=2)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    assert generators["top-k"].generate(params, [1], 0, jax.random.key(0), 2).shape == (2, 0)


def test_a_sample_ends_with_its_stop_token(params, generators) -> None:
    free = generators["temperature"].generate(params, [1], 40, jax.random.key(3), samples=2)
    stop_at = int(free[0, 5])
    firsts = [row.tolist().index(stop_at) if stop_at in row else 40 for row in free]
    sampling = dataclasses.replace(DRAWS["temperature"], stop_at=stop_at)
    generator = Generator(GRAPHDEF, T, sampling, chunk=4)
    tokens = generator.generate(params, [1], 40, jax.random.key(3), samples=2)
    for row, first, expected in zip(tokens, firsts, free, strict=True):
        assert row[: first + 1].tolist() == expected[: first + 1].tolist()
        assert set(row[first + 1 :]) <= {stop_at}
    single = generator.generate(params, [1], 40, jax.random.key(3), samples=1)
    assert firsts[0] < single.shape[1] <= firsts[0] + 4  # the loop ends early, too


def frequencies(sampling: Sampling, probabilities: list[float]) -> np.ndarray:
    n = 4000
    logits_BV = jnp.log(jnp.tile(jnp.array(probabilities), (n, 1)))
    tokens = draw(logits_BV, jax.random.split(jax.random.key(0), n), sampling)
    return np.bincount(tokens, minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0, top_k=None), [0.1, 0.2, 0.4, 0.3]),
        (Sampling(temperature=0), [0, 0, 1, 0]),
        (Sampling(temperature=0.5, top_k=None), [1 / 30, 4 / 30, 16 / 30, 9 / 30]),
        (Sampling(temperature=1e-50, top_k=None), [0, 0, 1, 0]),
        (Sampling(temperature=1e-50, top_p=0.9), [0, 0, 1, 0]),
        (Sampling(temperature=1.0, top_k=2), [0, 0, 4 / 7, 3 / 7]),
        (Sampling(temperature=1.0, top_k=1), [0, 0, 1, 0]),
        (Sampling(temperature=1.0, top_k=99), [0.1, 0.2, 0.4, 0.3]),
        (Sampling(temperature=1.0, top_k=None, top_p=0.65), [0, 0, 4 / 7, 3 / 7]),
        (Sampling(temperature=1.0, top_k=None, top_p=0.75), [0, 2 / 9, 4 / 9, 3 / 9]),
        (Sampling(temperature=1.0, top_k=None, top_p=1e-9), [0, 0, 1, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [0, 0, 4 / 7, 3 / 7]),
    ],
)
def test_tokens_are_drawn_with_the_right_frequencies(sampling, expected) -> None:
    np.testing.assert_allclose(frequencies(sampling, [0.1, 0.2, 0.4, 0.3]), expected, atol=0.03)
