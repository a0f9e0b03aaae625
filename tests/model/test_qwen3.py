import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import textbook
from helpers.trees import TINY_QWEN3, random_params

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.model.attention import masked_attention, plain_attention
from jaxgpt.model.generate import Generator, Sampling
from jaxgpt.model.network import build_model, init_params
from jaxgpt.model.qwen3 import Qwen3
from jaxgpt.model.rms_norm import rms_normalize
from jaxgpt.model.swiglu import swiglu

SHAPES = [
    dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32),
    dict(n_layer=3, n_head=6, n_kv_head=2, n_embd=48, head_dim=10, mlp_width=100, tied_head=False),
    dict(n_layer=1, n_head=4, n_kv_head=1, n_embd=40, head_dim=22, rope_theta=1e6),
    dict(n_layer=2, n_head=3, n_embd=36, norm_eps=1e-2, tied_head=False, embedding_norm=True),
    dict(n_layer=2, n_head=8, n_kv_head=4, n_embd=64, head_dim=6, arch="llama"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']}")
def test_logits_are_the_textbooks(shape: dict) -> None:
    cfg = ModelConfig(**{"arch": "qwen3", "block_size": 12, "vocab_size": 64, **shape})
    params = random_params(cfg)
    tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 12))
    graphdef = build_model(cfg, "float32", plain_attention)
    expected = jax.jit(partial(textbook.qwen3_logits, cfg))(params, tokens_BT)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens_BT))(params)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("zero_init", [False, True])
def test_a_block_that_starts_with_zeros_passes_its_input_on(zero_init: bool) -> None:
    cfg = dataclasses.replace(TINY_QWEN3, zero_init=zero_init)
    params = init_params(cfg, jax.random.key(0))
    zero = [
        path[-2].key
        for path, leaf in jax.tree.leaves_with_path(params)
        if not np.asarray(leaf).any()
    ]
    assert sorted(set(zero)) == (["down_proj", "lm_head", "o_proj"] if zero_init else [])
    model = nnx.merge(build_model(cfg, "float32", plain_attention), params)
    x_BTD = jax.random.normal(jax.random.key(2), (2, 5, cfg.n_embd))
    block = jax.jit(lambda x_BTD: model.blocks[0](x_BTD)[0])
    assert (block(x_BTD) == x_BTD).all() == zero_init


def textbook_rms_norm(x, scale):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


@pytest.mark.parametrize(
    ("function", "textbook", "shapes"),
    [
        (lambda x, s: rms_normalize(x, s, 1e-5), textbook_rms_norm, [(3, 5, 16), (16,)]),
        (swiglu, lambda g, u: jax.nn.silu(g) * u, [(3, 5, 16), (3, 5, 16)]),
    ],
    ids=["rms_normalize", "swiglu"],
)
@pytest.mark.usefixtures("either_platform")
def test_hand_written_gradients_are_those_of_the_formula(function, textbook, shapes) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [2 * jax.random.normal(*args) for args in zip(keys[1:], shapes, strict=True)]
    dy = jax.random.normal(keys[0], shapes[0])
    y, vjp = jax.vjp(jax.jit(function), *inputs)
    expected, expected_vjp = jax.vjp(jax.jit(textbook), *inputs)
    for a, b in zip((y, *vjp(dy)), (expected, *expected_vjp(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    half = function(*(x.astype(jnp.bfloat16) for x in inputs))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("prompt", [[3], list(range(TINY_QWEN3.block_size + 4))])
def test_the_cache_serves_for_ever(monkeypatch, prompt: list[int]) -> None:
    """Greedy text, one position a token, is what one pass with a sliding-window mask predicts."""
    S = TINY_QWEN3.block_size
    params = random_params(TINY_QWEN3)

    def sliding(q_BTNH, k_BTKH, v_BTKH):
        T = q_BTNH.shape[1]
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, np.tri(T) > np.tri(T, k=-S))

    generator = Generator(
        build_model(TINY_QWEN3, "float32", plain_attention), S, Sampling(temperature=0), chunk=10
    )
    monkeypatch.setattr(Qwen3, "features", None)  # no pass over a whole window
    tokens = generator.generate(params, prompt, 4 * S, jax.random.key(0), samples=2)
    monkeypatch.undo()
    text = [*prompt[-S:], *tokens[0].tolist()]
    graphdef = build_model(TINY_QWEN3, "float32", sliding)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(np.array([text])))(params)
    expected = np.asarray(logits[0]).argmax(-1)[-len(tokens[0]) - 1 : -1]
    assert tokens.tolist() == [expected.tolist()] * 2
    assert len(set(text)) > 5
