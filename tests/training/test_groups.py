from collections import defaultdict

import jax
import pytest

from jaxgpt.config.architecture import ModelConfig, parameter_shapes
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.config.presets import load_preset
from jaxgpt.model.network import init_params
from jaxgpt.training.groups import group_of, is_vector, joined, peak_rates

SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=64)
GPT2 = {
    "matrix": {"attn/c_attn/kernel", "attn/c_proj/kernel", "mlp/c_fc/kernel", "mlp/c_proj/kernel"},
    "embedding": {"wte/embedding", "wpe/embedding"},
    "vector": {"ln_1/scale", "ln_1/bias", "ln_2/scale", "ln_2/bias", "ln_f/scale", "ln_f/bias"}
    | {"attn/c_attn/bias", "attn/c_proj/bias", "mlp/c_fc/bias", "mlp/c_proj/bias"},
}
QWEN3 = {
    "matrix": {f"attn/{name}_proj/kernel" for name in "qkvo"}
    | {f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")},
    "embedding": {"embed_tokens/embedding"},
    "vector": {"input_layernorm/scale", "post_attention_layernorm/scale", "norm/scale"}
    | {"attn/q_norm/scale", "attn/k_norm/scale"},
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ModelConfig(**SHAPE, bias=True), GPT2),
        (ModelConfig(**SHAPE, arch="qwen3"), QWEN3),
        (
            ModelConfig(**SHAPE, arch="qwen3", tied_head=False),
            QWEN3 | {"head": {"lm_head/embedding"}},
        ),
    ],
    ids=["gpt2", "qwen3-tied", "qwen3"],
)
def test_every_parameter_is_in_its_group(model: ModelConfig, expected) -> None:
    found = defaultdict(set)
    for path in parameter_shapes(model):
        found[group_of(path)].add(path.removeprefix("blocks/0/"))
    assert found == expected


@pytest.mark.parametrize(
    ("preset", "decayed", "spared"),
    [
        # (tensors, numbers) in the two groups of nanoGPT's configure_optimizers.
        ("80gb", (50, 124_354_560), (25, 19_200)),
        ("24gb", (42, 82_001_920), (21, 13_440)),
        ("gpt2-124m", (50, 124_354_560), (98, 121_344)),
    ],
)
def test_the_decayed_tensors_are_those_of_nanogpt(preset: str, decayed, spared) -> None:
    cfg = load_preset(preset).model
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for path, leaf in jax.tree.leaves_with_path(params):
        sizes[not is_vector(joined(path))].append(leaf.size)
    assert [(len(group), sum(group)) for group in sizes.values()] == [decayed, spared]


def test_a_group_without_a_rate_of_its_own_has_the_common_one() -> None:
    rates = peak_rates(OptimizerConfig(learning_rate=0.01, head_lr=0.004, min_lr=0))
    assert rates == {"matrix": 0.01, "embedding": 0.01, "head": 0.004, "vector": 0.01}
