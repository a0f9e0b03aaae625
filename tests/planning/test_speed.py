import dataclasses
import json
import math
from pathlib import Path

import pytest
from gpu.shapes import ABLATIONS
from helpers.configs import resolved

import jaxgpt
from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.presets import load_preset
from jaxgpt.planning import speed
from jaxgpt.planning.gpus import GPUS, find_gpu

RESULTS = Path(jaxgpt.__file__).parents[1] / "benchmarks" / "results"
GPT2 = ModelConfig(vocab_size=50304, n_vocab=50257)


def on(gpu: str, **fields) -> float | None:
    cfg = resolved(load_preset("24gb-plus"), "bfloat16", **fields)
    return speed.tokens_per_second(cfg, find_gpu(gpu))


def test_flops_of_gpt2_are_nanogpts() -> None:
    assert speed.model_flops_per_token(GPT2) == 6 * 123_587_328 + 12 * 12 * 768 * 1024
    assert speed.model_flops_per_token(GPT2) == 854_770_176


def test_flops_of_wide_and_grouped_heads_are_those_of_their_matrices() -> None:
    cfg = dataclasses.replace(
        GPT2, arch="qwen3", n_head=8, n_kv_head=2, head_dim=128, mlp_width=2048, tied_head=False
    )
    matrices = 768 * (2 * 8 + 2 * 2) * 128 + 3 * 768 * 2048
    gains = 2 * 768 + 2 * 128
    N = 12 * (matrices + gains) + 768 + 50304 * 768
    assert speed.model_flops_per_token(cfg) == 6 * N + 12 * 12 * 8 * 128 * 1024
    # A lookup costs nothing: two matrices of the vocabulary, the FLOPs of one.
    tied = dataclasses.replace(cfg, tied_head=True)
    assert speed.model_flops_per_token(tied) == speed.model_flops_per_token(cfg)


def test_an_a100_trains_gpt2_as_fast_as_llm_c_published() -> None:
    assert on("a100-80gb", batch_size=64) == pytest.approx(218_000, rel=0.03)


def test_a_4090_trains_gpt2_as_fast_as_was_published() -> None:
    assert on("rtx4090", batch_size=32) == pytest.approx(106_000, rel=0.05)


def test_an_h200_trains_as_fast_as_was_measured() -> None:
    recorded = [json.loads(path.read_text()) for path in RESULTS.glob("*-h200.json")]
    rows = [
        r for part in recorded for made in part.get("results", {"": [part]}).values() for r in made
    ]
    steps = [r for r in rows if "mfu" in r and r.get("attention") == "cuDNN flash attention"]
    steps = [r for r in steps if r.get("item") not in ABLATIONS[1:]]
    measured = {(r["preset"], r["batch_size"]) for r in steps}
    assert measured == {
        *(("demo", 32), ("demo", 64), ("24gb", 32)),
        *(("24gb-774m", 4), ("80gb-350m", 64), ("124m-modern", 32)),
    }
    for r in steps:
        asked = load_preset("gpt2-124m" if r["preset"] == "demo" else r["preset"])
        batch = r["batch_size"] * r["gradient_accumulation_steps"]
        cfg = resolved(asked, "bfloat16", batch_size=r["batch_size"], effective_batch_size=batch)
        found = speed.tokens_per_second(cfg, find_gpu("h200"))
        assert found == pytest.approx(r["tokens_per_second"], rel=0.11), r["preset"]


def test_what_computes_twice_or_little_at_a_time_is_slower() -> None:
    none, light, full = (on("rtx4090", remat=remat) for remat in ("none", "light", "full"))
    assert none > light > full
    assert on("rtx4090", batch_size=2, effective_batch_size=512) < none


def test_a_card_has_a_speed_if_and_only_if_it_has_a_peak() -> None:
    for gpu in GPUS:
        mfu = speed.mfu_of(gpu)
        assert (mfu is None) == (gpu.half_flops is None), gpu.key
        assert mfu is None or mfu.source.startswith(("measured: ", "published: ", "assumed: "))


def test_no_speed_is_made_up_for_float32() -> None:
    cfg = resolved(load_preset("12gb"), "float32")
    assert speed.tokens_per_second(cfg, find_gpu("rtx4090")) is None


def test_the_scaling_law_is_the_published_one() -> None:
    # Besiroglu et al. 2024: 1.8172 + 482.01 / N^0.3478 + 2085.43 / D^0.3658.
    N, D = 70e9, 1.4e12  # Chinchilla itself
    expected = 1.8172 + 482.01 / math.exp(0.3478 * math.log(N)) + 2085.43 / D**0.3658
    assert speed.predicted_loss(70_000_000_000, D) == pytest.approx(expected)


def test_learning_rates_fall_with_size_and_meet_the_rule() -> None:
    sizes = [10e6, 30e6, 82e6, 124e6, 200e6, 355e6, 774e6, 1.56e9, 7e9]
    rates = [speed.suggested_learning_rate(int(size)) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert speed.suggested_learning_rate(124_000_000) == 6e-4
    assert 5e-4 <= speed.suggested_learning_rate(350_000_000) <= 6e-4
    assert speed.suggested_learning_rate(774_000_000) == 3e-4


def test_the_rates_of_a_muon_preset_fall_with_the_square_root_of_the_width() -> None:
    cfg = resolved(load_preset("124m-modern"), n_embd=3072, n_head=24, warmup_iters=7)
    found, base = speed.at_suggested_rates(cfg).optimizer, load_preset("124m-modern").optimizer
    assert (found.learning_rate, found.embedding_lr) == (2.7e-3, 7e-3)
    assert (found.head_lr, found.vector_lr, found.min_lr) == (2e-3, 7.5e-3, 0.0)
    assert (found.warmup_iters, found.beta2) == (7, base.beta2)


@pytest.mark.parametrize(("preset", "optimizer"), [("24gb", "muon"), ("24gb-modern", "adamw")])
def test_other_rates_follow_the_rule_for_the_size(preset: str, optimizer: str) -> None:
    cfg = resolved(load_preset(preset), optimizer=optimizer)
    found = speed.at_suggested_rates(cfg).optimizer
    assert found.learning_rate == speed.suggested_learning_rate(cfg.model.parameter_count())
    assert found.min_lr == pytest.approx(found.learning_rate / 10)
