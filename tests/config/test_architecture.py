import dataclasses

import pytest

from jaxgpt.config.architecture import ARCHITECTURES, ModelConfig, first_axes, parameter_shapes

QWEN3 = ModelConfig(arch="qwen3", n_layer=2, n_head=4, n_embd=48, vocab_size=64)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"arch": "gpt2", "n_kv_head": 2}, "n_kv_head 2: arch gpt2 has no such option; drop it"),
        ({"arch": "gpt2", "tied_head": False}, "or choose arch qwen3 or llama"),
        (
            {"bias": True},
            "bias True: arch qwen3 has no such option; set it to False, or choose arch gpt2",
        ),
        ({"n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3; the nearest that is: 3"),
        ({"head_dim": 7}, "heads of width 7: rotary positions need an even width; set head_dim to"),
        ({"n_embd": 50}, "n_embd 50 is not a multiple of n_head 4"),
        ({"mlp_width": 0}, "mlp_width 0 must be at least 1"),
        ({"rope_theta": 0.0}, "rope_theta 0 must be finite and above 0"),
        ({"norm_eps": float("nan")}, "norm_eps nan must be finite"),
        ({"embedding_norm": True}, "embedding_norm needs an untied head: set tied_head to"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(changes: dict, error: str) -> None:
    (found,) = dataclasses.replace(QWEN3, **changes).errors()
    assert error in found
    assert QWEN3.errors() == []


def test_a_head_may_have_any_even_width_if_it_is_given() -> None:
    cfg = dataclasses.replace(QWEN3, n_embd=50, head_dim=18, n_kv_head=2)
    assert cfg.errors() == []
    assert parameter_shapes(cfg)["blocks/1/attn/q_proj/kernel"] == (50, 72)
    assert parameter_shapes(cfg)["blocks/1/attn/k_proj/kernel"] == (50, 36)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_of_one_width_have_as_many_parameters(arch) -> None:
    gpt2 = ModelConfig(vocab_size=50304)
    count = dataclasses.replace(gpt2, arch=arch).parameter_count()
    assert count == pytest.approx(gpt2.parameter_count(), rel=0.01)


def test_what_fsdp_divides_is_the_first_axis_of_each_matrix() -> None:
    assert first_axes(ModelConfig(vocab_size=64)) == {
        "n_embd": 768,
        "vocab_size": 64,
        "block_size": 1024,
    }
    cfg = dataclasses.replace(QWEN3, head_dim=10, mlp_width=96)
    sizes = {"n_embd": 48, "vocab_size": 64, "mlp_width": 96, "n_head x head_dim": 40}
    assert first_axes(cfg) == sizes
