"""The step in float32 on the CPU, where results can be compared exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.trees import TINY, assert_trees_equal
from jax.extend.core import jaxprs_in_params

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model, init_params
from jaxgpt.training.evaluation import evaluate
from jaxgpt.training.optimizer import make_accumulator, make_optimizer
from jaxgpt.training.schedule import make_schedule
from jaxgpt.training.step import init_state, make_eval_step, make_train_step

GRAPHDEF = build_model(TINY, "float32", plain_attention)
CFG = OptimizerConfig(learning_rate=1e-2, warmup_iters=2)


@functools.cache
def make(accumulation: int, model: ModelConfig = TINY):
    """(state, step, jitted step) for A micro-batches."""
    graphdef = build_model(model, "float32", plain_attention)
    schedule = make_schedule(CFG, max_iters=20)
    optimizer = make_optimizer(CFG, schedule, accumulation)
    state = init_state(init_params(model, jax.random.key(0)), optimizer, jax.random.key(1))
    step = make_train_step(graphdef, optimizer, make_accumulator(CFG, accumulation), schedule)
    return state, step, jax.jit(step)


def batches(accumulation: int, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.n_vocab, (steps, 8, 9)).astype(np.uint16)
    return list(tokens.reshape(steps, accumulation, 8 // accumulation, 9))


def run(accumulation: int, steps: int = 10):
    state, _, step = make(accumulation)
    losses = []
    for tokens_ABT1 in batches(accumulation, steps):
        state, metrics = step(state, tokens_ABT1)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def one_large_batch():
    return run(1)


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulating_equals_one_large_batch(one_large_batch, accumulation: int) -> None:
    state, losses = run(accumulation)
    expected_state, expected_losses = one_large_batch
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_every_count_is_the_same_integer() -> None:
    state, _ = run(4, steps=5)
    counts = [
        leaf
        for leaf in jax.tree.leaves((state.step, state.opt_state.gradient_step, state.opt_state))
        if jnp.issubdtype(leaf.dtype, jnp.integer) and leaf is not state.opt_state.mini_step
    ]
    assert {int(count) for count in counts} == {5}
    assert int(state.opt_state.mini_step) == 0


def poison(state, where: str):
    """A state that makes some gradient `where`: nan or inf."""
    bad = {"nan": jnp.nan, "inf": jnp.inf}[where]
    params = jax.tree.map(lambda x: x, state.params)
    params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(bad)
    return state._replace(params=params)


@pytest.mark.parametrize("where", ["nan", "inf"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_non_finite_step_is_skipped(where: str, accumulation: int) -> None:
    state, _, step = make(accumulation)
    first, second = batches(accumulation, 2)
    state, _ = step(state, first)
    bad = poison(state, where)
    after, metrics = step(bad, second)
    assert not np.isfinite(float(metrics["loss"]))
    assert int(metrics["skipped_steps"]) == int(after.skipped) == 1
    assert int(after.step) == int(after.opt_state.gradient_step) == 2
    # Only the counts have changed, and training continues once the cause is gone.
    for old, new in zip(jax.tree.leaves(bad), jax.tree.leaves(after), strict=True):
        if jnp.issubdtype(new.dtype, jnp.floating):
            np.testing.assert_array_equal(old, new)
    healed = after._replace(params=state.params)
    healed, metrics = step(healed, second)
    assert np.isfinite(float(metrics["loss"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(healed.params))
    assert int(healed.skipped) == 1


@pytest.mark.parametrize("skip_spikes", [0.0, 6.0])
def test_a_spike_is_skipped_if_enabled_and_enters_the_history(skip_spikes: float) -> None:
    state, _, _ = make(1)
    schedule = make_schedule(CFG, max_iters=20)
    optimizer, accumulator = make_optimizer(CFG, schedule, 1), make_accumulator(CFG, 1)
    step = make_train_step(GRAPHDEF, optimizer, accumulator, schedule, skip_spikes)
    calm = 0.1 + 1e-3 * jnp.tile(jnp.arange(2.0), 64)  # far below an untrained model's
    state = state._replace(recent=jnp.stack([calm, calm]))
    after, metrics = step(state, batches(1, 1)[0])
    assert int(after.skipped) == int(metrics["skipped_steps"]) == bool(skip_spikes)
    assert int(after.step) == 1
    moved = [
        bool((a != b).any())
        for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True)
    ]
    assert any(moved) != bool(skip_spikes)
    np.testing.assert_array_equal(after.recent[:, -1], [metrics["loss"], metrics["grad_norm"]])
    np.testing.assert_array_equal(after.recent[:, :-1], state.recent[:, 1:])


def test_the_inner_optimizer_is_not_in_the_loop() -> None:
    """AdamW's square roots of whole parameters appear outside the scan only."""
    state, step, _ = make(4)
    optimized = jax.jit(step).lower(state, batches(4, 1)[0]).compile().as_text()
    loops = [line for line in optimized.splitlines() if " while(" in line]
    assert loops
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2}
    bodies = {line.split("body=%")[1].split(",")[0].split(")")[0] for line in loops}
    assert not (shapes & sqrt_shapes(optimized, bodies))


def sqrt_shapes(hlo: str, computations: set[str]) -> set[tuple[int, ...]]:
    """Shapes that a square root is taken of in these computations and those they call."""
    texts: dict[str, list[str]] = {}
    for line in hlo.splitlines():
        if line.startswith("%") and line.endswith("{"):
            name = line[1:].split(" ")[0]
            texts[name] = []
        elif line.startswith("  ") and texts:
            texts[name].append(line)
    found: set[tuple[int, ...]] = set()
    todo, seen = set(computations), set()
    while todo:
        current = todo.pop()
        seen.add(current)
        for line in texts.get(current, []):
            if " sqrt(" in line or " rsqrt(" in line:
                dims = line.split("f32[")[1].split("]")[0]
                found.add(tuple(int(d) for d in dims.split(",") if d))
            todo |= {other for other in texts if f"%{other}" in line} - seen
    return found


def test_the_state_is_donated() -> None:
    state, step, _ = make(4)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batches(4, 1)[0]).compile()
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= sum(leaf.nbytes for leaf in floats)


def test_no_array_of_all_logits_exists_in_the_step() -> None:
    state, step, _ = make(1, dataclasses.replace(TINY, vocab_size=320))
    tokens = np.zeros((1, 1200, 9), np.uint16)  # 9,600 tokens: three chunks
    sizes = array_sizes(jax.make_jaxpr(step)(state, tokens).jaxpr)
    assert max(sizes) < 9600 * 320


def array_sizes(jaxpr) -> list[int]:
    sizes = [int(np.prod(v.aval.shape)) for eqn in jaxpr.eqns for v in eqn.outvars]
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            sizes += array_sizes(inner)
    return sizes


def test_the_logged_rate_is_the_schedules() -> None:
    state, _, step = make(1)
    schedule = make_schedule(CFG, max_iters=20)
    for i, tokens in enumerate(batches(1, 3)):
        state, metrics = step(state, tokens)
        assert float(metrics["learning_rate"]) == pytest.approx(float(schedule(i)))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 64])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    windows = np.random.default_rng(1).integers(0, 50, (10, 9)).astype(np.uint16)
    params = init_params(TINY, jax.random.key(0))
    eval_step = jax.jit(make_eval_step(GRAPHDEF))
    expected = np.mean([float(eval_step(params, window[None])[0]) for window in windows])
    assert evaluate(eval_step, params, windows, batch_size) == pytest.approx(expected, rel=1e-6)


def test_training_learns(one_large_batch) -> None:
    state, _, step = make(2)
    (tokens,) = batches(2, 1)
    losses = []
    for _ in range(15):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1
    assert_trees_equal(state.key, make(2)[0].key)
