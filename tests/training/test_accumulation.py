"""Accumulating through optax.MultiSteps changes no bit and costs no time."""

import functools
import os
import runpy
import statistics
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.trees import TINY, assert_trees_equal

import jaxgpt

ROOT = Path(jaxgpt.__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "measure_accumulation.py"))


# No fusion: in a different program XLA fuses the same sums and products differently, which rounds
# them differently.
AS_WRITTEN: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if "use_fusion_emitters" in os.environ.get("XLA_FLAGS", ""):  # conftest.py turns them off
    AS_WRITTEN["xla_cpu_use_fusion_emitters"] = True


@functools.cache
def trained(name: str, accumulation: int, steps: int = 2):
    """(params, state of MultiSteps) after `steps` steps on the same tokens."""
    step, init = SCRIPT["build"](TINY, accumulation)[name]
    step, state = jax.jit(step, compiler_options=AS_WRITTEN), init()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens_ABT1 = rng.integers(0, TINY.n_vocab, (accumulation, 2, 9)).astype(np.uint16)
        state, _ = step(state, tokens_ABT1)
    return (state.params, state.opt_state) if name == "ours" else state


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_equals_a_plain_loop_over_multisteps_bit_for_bit(accumulation: int) -> None:
    params, opt_state = trained("ours", accumulation)
    expected_params, expected_opt_state = trained("plain loop", accumulation)
    assert_trees_equal(params, expected_params)
    assert_trees_equal(opt_state.inner_opt_state, expected_opt_state.inner_opt_state)
    assert int(opt_state.gradient_step) == int(expected_opt_state.gradient_step) == 2


def test_the_sum_by_hand_trains_the_same() -> None:
    params, _ = trained("ours", 4)
    by_hand, _ = trained("by hand", 4)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_step_takes_no_longer_than_one_with_a_sum_written_by_hand() -> None:
    """Within 10 %, in the best of three attempts, because the machine may be busy."""
    ratios = []
    for _ in range(3):
        seconds = SCRIPT["measure"](SCRIPT["MODEL"], 8, 2, 15, ("ours", "by hand"))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        ratios.append(medians["ours"] / medians["by hand"])
        if ratios[-1] < 1.1:
            return
    raise AssertionError(f"ours over by hand: {ratios}")
