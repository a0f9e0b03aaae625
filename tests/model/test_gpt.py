import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.trees import MODELS, TINY, TINY_QWEN3, assert_trees_equal
from jax.extend.core import jaxprs_in_params

from jaxgpt.config.architecture import ModelConfig, parameter_shapes, parameter_sizes
from jaxgpt.config.presets import load_preset
from jaxgpt.model import gpt
from jaxgpt.model.attention import (
    cudnn_attention,
    pick_attention,
    plain_attention,
    portable_attention,
)
from jaxgpt.model.blocks import make_blocks
from jaxgpt.model.gelu import gelu
from jaxgpt.model.language_model import LanguageModel
from jaxgpt.model.layer_norm import LayerNorm, normalize
from jaxgpt.model.layers import linears_of_norm, make_linear
from jaxgpt.model.network import build_model, init_params, shorten_context
from jaxgpt.model.rms_norm import RMSNorm
from jaxgpt.training.groups import joined


def make_model(cfg: ModelConfig) -> LanguageModel:
    graphdef = build_model(cfg, "float32", plain_attention)
    return nnx.merge(graphdef, init_params(cfg, jax.random.key(0)))


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request) -> LanguageModel:
    return make_model(request.param)


def test_no_position_sees_a_later_token(model, tokens_BT1) -> None:
    tokens_BT = jnp.asarray(tokens_BT1[:2, :8], jnp.int32)
    changed = tokens_BT.at[:, 5].add(1)
    before, after = model(tokens_BT), model(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:, : TINY.n_vocab] - after[:, 5:, : TINY.n_vocab]) > 0).any()


def test_logits_of_padded_rows_are_minus_infinity(model, tokens_BT1) -> None:
    logits_BTV = model(tokens_BT1[:, :8])
    assert logits_BTV.shape == (6, 8, 64)
    assert logits_BTV.dtype == jnp.float32
    assert np.isneginf(logits_BTV[..., 50:]).all()
    assert np.isfinite(logits_BTV[..., :50]).all()


def test_an_untrained_model_predicts_uniformly(tokens_BT1) -> None:
    cfg = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=8, vocab_size=64, n_vocab=50)
    model = nnx.merge(
        build_model(cfg, "float32", plain_attention), init_params(cfg, jax.random.key(0))
    )
    log_probs = jax.nn.log_softmax(model(tokens_BT1[:, :8]))
    picked = np.take_along_axis(np.asarray(log_probs), tokens_BT1[:, 1:, None].astype(int), -1)
    assert -picked.mean() == pytest.approx(np.log(50), abs=0.1)


@pytest.mark.parametrize(
    ("preset", "bias", "count"),
    [
        # Counted on nanoGPT's own model: sum(p.numel() for p in GPT(config).parameters()).
        ("80gb", False, 124_373_760),
        ("48gb", False, 99_537_312),
        ("24gb", False, 82_015_360),
        ("16gb", False, 51_454_464),
        ("12gb", False, 30_331_776),
        ("gpt2-124m", True, 124_475_904),
    ],
)
def test_presets_have_the_documented_size(preset: str, bias: bool, count: int) -> None:
    cfg = load_preset(preset).model
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    assert cfg.bias == bias
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == cfg.parameter_count() == count


@pytest.mark.parametrize(
    "cfg",
    [
        *(TINY, dataclasses.replace(TINY, bias=True), TINY_QWEN3),
        dataclasses.replace(TINY_QWEN3, arch="llama", tied_head=True, embedding_norm=False),
    ],
    ids=lambda cfg: f"{cfg.arch}-{cfg.bias}",
)
@pytest.mark.parametrize(
    "changes", [{}, {"n_layer": 3, "n_head": 1}, {"n_embd": 24, "block_size": 11, "vocab_size": 90}]
)
def test_the_declared_shapes_are_those_of_the_parameters(cfg: ModelConfig, changes: dict) -> None:
    cfg = dataclasses.replace(cfg, **changes)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    shapes = {joined(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}
    assert parameter_shapes(cfg) == shapes
    assert sum(parameter_sizes(cfg).values()) == sum(map(math.prod, shapes.values()))


def test_a_shorter_context_keeps_the_first_positions(model, tokens_BT1) -> None:
    cfg = dataclasses.replace(model.cfg, block_size=5)
    params, shorter = (init_params(c, jax.random.key(0)) for c in (model.cfg, cfg))
    cut = shorten_context(params, shorter)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, shorter)
    got = nnx.merge(build_model(cfg, "float32", plain_attention), cut)(tokens_BT1[:, :5])
    np.testing.assert_array_equal(got, model(tokens_BT1[:, :5]))


def test_initialization_is_nanogpts() -> None:
    cfg = ModelConfig(n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=320, bias=True)
    params = init_params(cfg, jax.random.key(0))
    for path, leaf in jax.tree.leaves_with_path(params):
        name = joined(path)
        expected = {"scale": 0.0, "bias": 0.0}.get(name.rsplit("/", 1)[-1], 0.02)
        if "c_proj/kernel" in name:
            expected = 0.02 / np.sqrt(2 * cfg.n_layer)
        assert float(leaf.std()) == pytest.approx(expected, rel=0.05), name
        mean = 1.0 if name.endswith("scale") else 0.0
        assert float(leaf.mean()) == pytest.approx(mean, abs=2e-3), name
    first, second = params["blocks"][0], params["blocks"][1]
    assert not np.array_equal(first["mlp"]["c_fc"]["kernel"], second["mlp"]["c_fc"]["kernel"])


def test_initialization_is_a_function_of_the_key() -> None:
    a, b = (init_params(TINY, jax.random.key(3)) for _ in range(2))
    assert_trees_equal(a, b)


def test_blocks_are_drawn_as_if_made_one_after_the_other() -> None:
    def make(rngs: nnx.Rngs) -> gpt.GPTBlock:
        return gpt.GPTBlock(TINY, jnp.dtype("float32"), plain_attention, gelu, rngs)

    def draw(make_all) -> tuple:
        @jax.jit
        def drawn() -> tuple:
            rngs = nnx.Rngs(params=jax.random.key(3))
            params = [nnx.to_pure_dict(nnx.state(b, nnx.Param)) for b in make_all(rngs)]
            return params, jax.random.key_data(rngs.params())

        return drawn()

    together = draw(lambda rngs: make_blocks(3, make, rngs))
    assert_trees_equal(together, draw(lambda rngs: [make(rngs) for _ in range(3)]))


def test_the_program_that_draws_the_parameters_does_not_grow_with_depth() -> None:
    """Each array drawn by its own kernel costs half a second of compiling for a GPU."""

    def arrays_drawn(n_layer: int) -> int:
        cfg = dataclasses.replace(TINY, n_layer=n_layer)
        jaxpr = jax.make_jaxpr(lambda key: init_params(cfg, key))(jax.random.key(0))
        return draws(jaxpr.jaxpr)

    def draws(jaxpr) -> int:
        inner = sum(draws(j) for eqn in jaxpr.eqns for j in jaxprs_in_params(eqn.params))
        return inner + sum(eqn.primitive.name == "random_bits" for eqn in jaxpr.eqns)

    assert arrays_drawn(2) == arrays_drawn(9) > 0


def test_layer_norm_and_its_gradients_equal_the_formula() -> None:
    norm = LayerNorm(16, use_bias=False)
    x_key, g_key, s_key = jax.random.split(jax.random.key(0), 3)
    x = 3 * jax.random.normal(x_key, (4, 5, 16)) + 1
    dy = jax.random.normal(g_key, x.shape)
    norm.scale[...] = scale = jax.random.normal(s_key, (16,))

    def formula(x: jax.Array, scale: jax.Array) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale

    expected, expected_vjp = jax.vjp(formula, x, scale)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)
    _, vjp = jax.vjp(normalize, x, scale)
    for a, b in zip(vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "use_bias"),
    [(LayerNorm(16, False), False), (LayerNorm(16, True), True), (RMSNorm(16, 1e-6), False)],
)
def test_a_norm_folded_into_a_linear_layer_equals_one_after_the_other(norm, use_bias) -> None:
    """In value and in the gradients of input, norm and linear layer."""
    cfg = ModelConfig(bias=use_bias)
    modules = (norm, make_linear(cfg, 16, 48, jnp.dtype(jnp.float32), nnx.Rngs(0)))
    graphdefs = [nnx.graphdef(module) for module in modules]
    like = [nnx.to_pure_dict(nnx.state(module)) for module in modules]
    keys = iter(jax.random.split(jax.random.key(0), 6))
    params = jax.tree.map(lambda leaf: 1 + jax.random.normal(next(keys), leaf.shape), like)
    x, dy = (jax.random.normal(next(keys), (3, 5, width)) for width in (16, 48))

    def together(params, x):
        norm, linear = map(nnx.merge, graphdefs, params)
        return linears_of_norm([linear], norm, x)[0]

    def one_after_the_other(params, x):
        norm, linear = map(nnx.merge, graphdefs, params)
        return linear(norm(x))

    y, vjp = jax.vjp(together, params, x)
    expected, expected_vjp = jax.vjp(one_after_the_other, params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(vjp(dy)), jax.tree.leaves(expected_vjp(dy)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_of_three_products_equal_those_of_one(
    bias, tokens_BT1, monkeypatch
) -> None:
    """As cuDNN's attention gets them: equal gradients; in bfloat16, equally large errors."""
    cfg = dataclasses.replace(TINY, bias=bias)
    params = init_params(cfg, jax.random.key(0))

    def loss_and_gradients(dtype: str) -> list[np.ndarray]:
        graphdef = build_model(cfg, dtype, plain_attention)
        found = jax.value_and_grad(lambda p: nnx.merge(graphdef, p).loss(tokens_BT1))(params)
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]

    expected, rounded = loss_and_gradients("float32"), loss_and_gradients("bfloat16")
    monkeypatch.setattr(gpt, "cudnn_attention", plain_attention)
    model = nnx.merge(build_model(cfg, "float32", plain_attention), params)
    assert model.blocks[0].attn.parts == 3
    for a, b in zip(loss_and_gradients("float32"), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

    def error(found: list[np.ndarray]) -> float:
        pairs = zip(found, expected, strict=True)
        return math.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs))

    # Measured: 0.998 times as large, in six layers of width 128, over four seeds.
    assert error(loss_and_gradients("bfloat16")) < 1.03 * error(rounded)


def test_dropout_is_a_function_of_its_key(tokens_BT1) -> None:
    cfg = ModelConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=64, n_vocab=50, dropout=0.5
    )
    model = nnx.merge(
        build_model(cfg, "float32", plain_attention), init_params(cfg, jax.random.key(0))
    )
    a, b, c = (model.features(tokens_BT1[:, :8], jax.random.key(k)) for k in (1, 1, 2))
    off = model.features(tokens_BT1[:, :8])
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    assert not np.allclose(a, off)


@pytest.mark.parametrize(
    ("platform", "capability", "dtype", "width", "kernel", "why"),
    [
        ("gpu", (8, 9), "bfloat16", 64, cudnn_attention, "cuDNN"),
        ("cpu", (0, 0), "float32", 64, portable_attention, "not on cpu"),
        ("gpu", (7, 5), "float16", 64, portable_attention, "8.0"),
        ("gpu", (8, 9), "float32", 64, portable_attention, "float32"),
        ("gpu", (8, 9), "bfloat16", 60, portable_attention, "head width 60"),
        ("gpu", (8, 9), "bfloat16", 160, portable_attention, "head width 160"),
    ],
)
def test_attention_is_chosen_for_the_device(
    platform, capability, dtype, width, kernel, why
) -> None:
    chosen, sentence = pick_attention(platform, capability, dtype, width)
    assert chosen is kernel
    assert why in sentence
