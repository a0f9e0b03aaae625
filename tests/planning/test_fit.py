import dataclasses

import pytest
from helpers.configs import resolved

from jaxgpt.config.presets import load_preset
from jaxgpt.planning import fit
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.memory import estimate

CFG = resolved(load_preset("24gb"), "bfloat16")


def test_what_fits_easily_is_not_recomputed_and_keeps_its_effective_batch() -> None:
    found = fit.best_fit(CFG, 80 * GIB)
    assert found.cfg.remat == "none"
    assert found.cfg.batch.effective == CFG.batch.effective == 512


def test_less_memory_means_a_smaller_micro_batch_or_more_recomputed() -> None:
    needs = [fit.best_fit(CFG, capacity * GIB).need.peak_bytes for capacity in (20, 8, 4, 3)]
    assert needs == sorted(needs, reverse=True)
    for capacity, peak in zip((20, 8, 4, 3), needs, strict=True):
        assert peak < capacity * GIB
    assert fit.best_fit(CFG, GIB) is None


def test_only_what_is_free_is_chosen() -> None:
    fixed_remat = dataclasses.replace(CFG, remat="full")
    assert fit.best_fit(fixed_remat, 80 * GIB, free={"batch_size"}).cfg.remat == "full"
    found = fit.best_fit(CFG, 8 * GIB, free={"remat"}).cfg
    assert (found.batch.batch_size, found.remat) == (32, "light")


def test_the_compiler_has_the_last_word() -> None:
    asked = []

    def twice_as_much(cfg):
        asked.append(cfg)
        need = estimate(cfg)
        return type(need)(**{**vars(need), "peak_bytes": 2 * need.peak_bytes, "method": "compiled"})

    found = fit.best_fit(CFG, 20 * GIB, twice_as_much)
    assert 2 * estimate(found.cfg).peak_bytes < 20 * GIB
    assert len(asked) > 1
    assert asked[-1] == found.cfg


def test_the_largest_model_fills_the_card() -> None:
    small, large = (fit.largest_model(CFG, capacity * GIB) for capacity in (8, 22))
    count = large.cfg.model.parameter_count()
    assert count > small.cfg.model.parameter_count()
    assert count > 1.5e9  # GPT-2 XL on 24 GB
    assert large.need.peak_bytes < 22 * GIB


@pytest.mark.parametrize(("arch", "width"), [("gpt2", 64), ("qwen3", 128)])
def test_the_ladder_goes_up_and_keeps_the_width_of_heads(arch, width) -> None:
    model = dataclasses.replace(CFG.model, arch=arch)
    models = [cfg.model for cfg in fit.ladder(dataclasses.replace(CFG, model=model))]
    sizes = [model.parameter_count() for model in models]
    assert sizes == sorted(sizes, reverse=True)
    assert all(not model.errors() and model.head_width == width for model in models)


@pytest.mark.parametrize("capacity", [GIB, 6 * GIB])
def test_advice_names_flags_that_fit_or_says_that_none_do(capacity) -> None:
    text = fit.flags_that_fit(CFG, capacity, estimate(CFG))
    assert ("--batch-size" in text) == (capacity > GIB)
    assert ("does not fit" in text) == (capacity == GIB)


def test_advice_does_not_name_what_was_compiled_and_did_not_fit() -> None:
    """The estimate of the same step may be smaller, and fit."""
    guess = estimate(CFG)
    compiled = dataclasses.replace(guess, peak_bytes=int(1.2 * guess.peak_bytes), method="compiled")
    text = fit.flags_that_fit(CFG, int(1.15 * guess.peak_bytes) + fit.RESERVE_BYTES, compiled)
    same = f"--batch-size {CFG.batch.batch_size} --remat {CFG.remat} "
    assert "--batch-size" in text
    assert same not in text


def test_after_running_out_of_memory_less_is_tried() -> None:
    text = fit.flags_after_out_of_memory(CFG)
    words = text.split()
    B, remat = int(words[words.index("--batch-size") + 1]), words[words.index("--remat") + 1]
    assert 512 % B == 0
    tried = CFG.with_choice(B, remat)
    assert estimate(tried).peak_bytes < 0.85 * estimate(CFG).peak_bytes
    assert "smaller model" in fit.flags_after_out_of_memory(CFG.with_choice(1, "full"))
