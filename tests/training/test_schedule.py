import dataclasses
import math

import pytest

from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.training.schedule import make_schedule


def nanogpt_lr(it: int, cfg: OptimizerConfig, decay_iters: int) -> float:
    """The learning rate as nanoGPT's README and paper define it, written from the formula."""
    W, peak, floor = cfg.warmup_iters, cfg.learning_rate, cfg.min_lr
    if it < W:
        return peak * (it + 1) / (W + 1)
    if it > decay_iters:
        return floor
    along = (it - W) / (decay_iters - W)
    return floor + 0.5 * (1 + math.cos(math.pi * along)) * (peak - floor)


def test_learning_rates_are_nanogpts() -> None:
    cfg = OptimizerConfig(learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000)
    schedule = make_schedule(cfg, max_iters=50000)
    for it in (0, 1, 1999, 2000, 2001, 26000, 49999, 50000, 60000):
        expected = nanogpt_lr(it, cfg, 50000)
        assert float(schedule(it)) == pytest.approx(expected, abs=1e-6 * cfg.learning_rate), it


def test_lr_decay_iters_outlives_a_longer_run() -> None:
    cfg = OptimizerConfig(warmup_iters=10, lr_decay_iters=100)
    assert float(make_schedule(cfg, max_iters=1000)(100)) == pytest.approx(cfg.min_lr)


def test_a_run_may_be_shorter_than_its_warm_up() -> None:
    cfg = OptimizerConfig(warmup_iters=2000)
    schedule = make_schedule(cfg, max_iters=100)
    rates = [float(schedule(it)) for it in (0, 50, 99)]
    assert rates == pytest.approx(
        [cfg.learning_rate * (it + 1) / 2001 for it in (0, 50, 99)], abs=1e-9
    )
    assert float(schedule(2500)) == pytest.approx(cfg.min_lr)


@pytest.mark.parametrize("warmup", [0, 5])
def test_decay_lr_false_keeps_the_peak(warmup: int) -> None:
    schedule = make_schedule(OptimizerConfig(warmup_iters=warmup, decay_lr=False), max_iters=100)
    assert [float(schedule(it)) for it in (warmup, 99, 1000)] == pytest.approx([6e-4] * 3)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert float(make_schedule(OptimizerConfig(warmup_iters=0), 100)(0)) == pytest.approx(6e-4)


WSD = OptimizerConfig(
    schedule="wsd", learning_rate=1.0, min_lr=0.0, warmup_iters=10, lr_decay_iters=100
)


@pytest.mark.parametrize(
    ("fraction", "rates"),
    [
        # By step; the warm-up of 10 steps begins at 1/11.
        (0.4, {0: 1 / 11, 9: 10 / 11, 10: 1, 60: 1, 61: 39 / 40, 80: 0.5, 99: 1 / 40, 100: 0}),
        (0.9, {9: 10 / 11, 10: 1, 55: 0.5, 100: 0}),
        (1.0, {9: 10 / 11, 10: 1, 55: 0.5, 100: 0}),  # from the end of the warm-up at the earliest
        (0.001, {99: 1, 100: 0}),
    ],
)
def test_wsd_is_constant_and_then_linear(fraction: float, rates: dict[int, float]) -> None:
    cfg = dataclasses.replace(WSD, cooldown_fraction=fraction)
    schedule = make_schedule(cfg, max_iters=500)
    assert {step: float(schedule(step)) for step in rates} == pytest.approx(rates, abs=1e-6)
    assert float(schedule(300)) == 0


def test_wsd_falls_to_min_lr_at_the_end_of_the_run() -> None:
    cfg = dataclasses.replace(WSD, min_lr=0.1, lr_decay_iters=None)
    schedule = make_schedule(cfg, max_iters=50)
    assert [float(schedule(step)) for step in (50, 51)] == pytest.approx([0.1, 0.1])
    assert float(make_schedule(dataclasses.replace(cfg, decay_lr=False), 50)(50)) == 1


def test_a_run_that_goes_on_keeps_the_rates_it_has_had() -> None:
    """With a later end, up to the step at which the shorter run began to decay."""
    short, long = (
        make_schedule(dataclasses.replace(WSD, lr_decay_iters=end), end) for end in (100, 200)
    )
    assert [float(short(i)) for i in range(30)] == [float(long(i)) for i in range(30)]
    assert float(short(31)) < float(long(31)) == 1
