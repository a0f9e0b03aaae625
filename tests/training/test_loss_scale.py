"""float16 with loss scaling: how the scale moves, and what an overflow may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoints import build, save
from helpers.trees import assert_trees_equal

from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.training.build import Training
from jaxgpt.training.loss_scale import GROWTH_INTERVAL, LARGEST, LossScale


@pytest.fixture(scope="module")
def training() -> Training:
    return build(dtype="float16")


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (2, 3, 9)).astype(np.uint16)


def scaled(state, scale: float):
    return state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(scale)))


def numbers(scale: LossScale) -> tuple[float, int, int]:
    return float(scale.scale), int(scale.good_steps), int(scale.overflows)


@pytest.mark.parametrize(
    ("scale", "good_steps", "overflowed", "finite", "expected"),
    [
        (1024, 5, False, True, (1024, 6, 0)),
        (1024, 5, True, False, (512, 0, 1)),
        (1024, GROWTH_INTERVAL - 1, False, True, (2048, 0, 0)),
        (1024, GROWTH_INTERVAL - 1, True, False, (512, 0, 1)),
        (1024, GROWTH_INTERVAL - 1, False, False, (1024, 0, 0)),  # the loss is not finite
        (LARGEST, GROWTH_INTERVAL - 1, False, True, (LARGEST, GROWTH_INTERVAL, 0)),
    ],
)
def test_the_scale_halves_at_an_overflow_and_doubles_after_many_good_steps(
    scale, good_steps, overflowed, finite, expected
) -> None:
    before = LossScale(jnp.float32(scale), jnp.int32(good_steps), jnp.int32(0))
    assert numbers(before.after(jnp.bool(overflowed), jnp.bool(finite))) == expected


def test_an_overflow_halves_the_scale_and_changes_nothing_else(training) -> None:
    before = scaled(training.init(), 2.0**40)
    kept = jax.tree.map(jnp.copy, before)
    after, metrics = training.train_step(before, tokens())
    assert numbers(after.loss_scale) == (2.0**39, 0, 1)
    assert (int(metrics["overflows"]), int(metrics["skipped_steps"])) == (1, 0)
    assert np.isfinite(metrics["loss"])
    assert int(after.step) == int(after.opt_state.gradient_step) == 1
    for name in ("params", "opt_state", "recent"):
        for old, new in zip(
            *(jax.tree.leaves(getattr(s, name)) for s in (kept, after)), strict=True
        ):
            if jnp.issubdtype(new.dtype, jnp.floating):
                np.testing.assert_array_equal(old, new)


def test_a_loss_that_is_not_finite_is_a_bad_step_and_no_overflow(training) -> None:
    state = training.init()
    params = jax.tree.map(jnp.copy, state.params)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(jnp.nan)
    after, metrics = training.train_step(state._replace(params=params), tokens())
    assert (int(metrics["overflows"]), int(metrics["skipped_steps"])) == (0, 1)
    assert float(after.loss_scale.scale) == float(LossScale.initial().scale)


def test_the_scale_changes_no_gradient_that_fits(training) -> None:
    """A power of two moves exponents only; so the step is bit-equal at every scale that fits."""
    states = [
        training.train_step(scaled(training.init(), scale), tokens())[0] for scale in (2**12, 2**14)
    ]
    assert_trees_equal(*(state.params for state in states))


def test_float16_follows_float32(training) -> None:
    reference = build(dtype="float32")
    losses = {}
    for name, built in {"float16": training, "float32": reference}.items():
        state, losses[name] = built.init(), []
        for step in range(30):
            state, metrics = built.train_step(state, tokens(step % 3))
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["float16"], losses["float32"], atol=5e-3)
    assert losses["float32"][-1] < losses["float32"][0] - 0.05  # it learns, so the check can fail


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resumed_run_continues_bit_for_bit_with_its_scale(training, dropout, tmp_path) -> None:
    if dropout:
        training = build(dtype="float16", dropout=dropout)
    state = scaled(training.init(), 2.0**40)  # overflows, then halves for some steps
    for step in range(3):
        state, _ = training.train_step(state, tokens(step))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, state)
    expected, _ = training.train_step(state, tokens(3))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(3, training.state_like)
    assert numbers(restored.loss_scale)[2] == 3
    assert_trees_equal(training.train_step(restored, tokens(3))[0], expected)


@pytest.mark.parametrize(("before", "after"), [("float32", "float16"), ("float16", "float32")])
def test_a_run_may_change_its_dtype(before: str, after: str, tmp_path) -> None:
    old, new = build(dtype=before), build(dtype=after)
    state, _ = old.train_step(old.init(), tokens())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        save(checkpoints, state)
        checkpoints.wait()
        restored = checkpoints.restore(1, new.state_like)
    assert_trees_equal(restored.params, state.params)
    assert jax.tree.structure(restored) == jax.tree.structure(new.state_like)
    resumed, metrics = new.train_step(restored, tokens(1))
    assert np.isfinite(metrics["loss"])
    assert int(resumed.step) == 2
