import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from jaxgpt.model.attention import plain_attention
from jaxgpt.model.generate import make_generate
from jaxgpt.model.gpt import build_gpt, init_params

GRAPHDEF = build_gpt(TINY, "float32", plain_attention)


@pytest.fixture(scope="module")
def params():
    params = init_params(TINY, jax.random.key(0))
    return jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)  # decided opinions


def greedy(params, prompt: list[int], new: int) -> list[int]:
    """The likeliest continuation, one whole forward pass a token, cropped as nanoGPT does."""
    model = nnx.merge(GRAPHDEF, params)
    tokens = list(prompt)
    for _ in range(new):
        window = np.array([tokens[-TINY.block_size :]], np.int32)
        tokens.append(int(model(window)[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], list(range(8)), list(range(12))])
def test_top_1_is_the_likeliest_continuation_past_the_context(params, prompt: list[int]) -> None:
    generate = make_generate(GRAPHDEF, 10, top_k=1)
    tokens_BL = generate(params, np.array([prompt, prompt]), jax.random.key(0))
    expected = greedy(params, prompt, 10)
    assert tokens_BL.tolist() == [expected, expected]


def test_a_seed_gives_the_same_text_and_another_seed_another(params) -> None:
    generate = make_generate(GRAPHDEF, 20, temperature=2.0)
    a, b, c = (generate(params, np.array([[1]]), jax.random.key(k)).tolist() for k in (0, 0, 1))
    assert a == b
    assert a != c


def test_padded_ids_are_never_drawn(params) -> None:
    cfg = dataclasses.replace(TINY, n_vocab=3)
    generate = make_generate(build_gpt(cfg, "float32", plain_attention), 50, temperature=50.0)
    tokens = generate(params, np.zeros((4, 1), np.int32), jax.random.key(0))
    assert set(np.unique(tokens)) == {0, 1, 2}
