import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.trees import TINY

from jaxgpt.config.fields import OptimizerConfig
from jaxgpt.config.presets import load_preset
from jaxgpt.model.network import init_params
from jaxgpt.training.optimizer import (
    OPTIMIZERS,
    decay_mask,
    grad_norm,
    make_optimizer,
    make_schedule,
    random_bits,
    stochastic_round,
    stored_in_bfloat16,
)


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


def test_matrices_and_embeddings_decay_and_nothing_else_does() -> None:
    params = init_params(TINY, jax.random.key(0))
    mask = decay_mask(params)
    for path, decayed in jax.tree.leaves_with_path(mask):
        assert decayed == (not jax.tree_util.keystr(path).endswith("['scale']")), path
    assert mask["wte"]["embedding"]
    assert mask["wpe"]["embedding"]


def test_the_clip_sees_the_average_and_not_each_micro_batch() -> None:
    cfg = OptimizerConfig(grad_clip=1.0, weight_decay=0.0)
    params = {"kernel": jnp.zeros(2)}
    tx = make_optimizer(cfg, optax.constant_schedule(1e-3), accumulation=2)
    state = tx.init(params)
    for gradient in ([10.0, 0.0], [-10.0, 0.2]):
        _, state = tx.update({"kernel": jnp.array(gradient)}, state, params)
    assert float(grad_norm(state)) == pytest.approx(0.1)
    first_moment = optax.tree.get(state.inner_opt_state, "mu")["kernel"]
    np.testing.assert_allclose(first_moment, [0.0, 0.1 * 0.1], atol=1e-7)


def test_a_grad_clip_of_zero_turns_clipping_off() -> None:
    cfg = OptimizerConfig(grad_clip=0.0, beta1=0.0)
    params = {"kernel": jnp.zeros(1)}
    tx = make_optimizer(cfg, optax.constant_schedule(1e-3), accumulation=1)
    _, state = tx.update({"kernel": jnp.array([7.0])}, tx.init(params), params)
    assert float(optax.tree.get(state.inner_opt_state, "mu")["kernel"][0]) == 7.0


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
    mask, sizes = jax.tree.leaves(decay_mask(params)), [x.size for x in jax.tree.leaves(params)]
    groups = [
        [n for n, m in zip(sizes, mask, strict=True) if m is chosen] for chosen in (True, False)
    ]
    assert [(len(group), sum(group)) for group in groups] == [decayed, spared]


def test_state_in_bfloat16_takes_ten_bytes_a_parameter() -> None:
    cfg = OptimizerConfig(state_dtype="bfloat16")
    params = init_params(TINY, jax.random.key(0))
    state = make_optimizer(cfg, make_schedule(cfg, 10), 2).init(params)
    floats = [x for x in jax.tree.leaves(state) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    assert sum(x.nbytes for x in floats) == 6 * sum(x.size for x in jax.tree.leaves(params))


MUON = OptimizerConfig(optimizer="muon", weight_decay=0.0, warmup_iters=0, decay_lr=False)


def muon_updates(grads, cfg: OptimizerConfig = MUON):
    params = jax.tree.map(jnp.ones_like, grads)
    tx = make_optimizer(cfg, make_schedule(cfg, 10), accumulation=1)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32)])
def test_muon_updates_every_direction_of_a_matrix_about_equally(shape) -> None:
    """Though the gradient's differ tenfold; and about as much as AdamW, whatever the shape."""
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=shape), full_matrices=False)
    gradient = jnp.asarray((u * np.logspace(-1, 0, min(shape))) @ v, jnp.float32)
    update = muon_updates({"kernel": gradient})["kernel"]
    singular = np.linalg.svd(np.asarray(update), compute_uv=False)
    assert singular[0] < 2 * singular[-1]
    root_mean_square = float(jnp.sqrt(jnp.mean(update**2))) / MUON.learning_rate
    assert 0.1 < root_mean_square < 0.25
    assert float(jnp.vdot(update, gradient)) < 0  # downhill


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    gradients = {"kernel": jnp.ones((8, 8)), "embedding": jnp.ones((8, 8)), "scale": jnp.ones(8)}
    adam = muon_updates(gradients, dataclasses.replace(MUON, optimizer="adamw"))
    muon = muon_updates(gradients)
    for name in ("embedding", "scale"):
        np.testing.assert_array_equal(muon[name], adam[name])
    assert not np.allclose(muon["kernel"], adam["kernel"])


def test_muon_decays_what_adamw_does_at_the_same_rate() -> None:
    zeros = {"kernel": jnp.zeros((8, 8)), "embedding": jnp.zeros((8, 8)), "scale": jnp.zeros(8)}
    for optimizer in ("adamw", "muon"):
        cfg = dataclasses.replace(MUON, optimizer=optimizer, weight_decay=0.1)
        updates = muon_updates(zeros, cfg)
        for name, decayed in {"kernel": True, "embedding": True, "scale": False}.items():
            expected = -0.1 * cfg.learning_rate if decayed else 0.0
            np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


def test_stochastic_rounding_is_unbiased_and_rounds_to_a_neighbour() -> None:
    x = jnp.array([1.0, 1.001, -3.14159, 1e-30, 0.0, 255.9], jnp.float32)
    draws = jnp.stack(
        [
            stochastic_round(x, random_bits(x.shape, jnp.int32(i), salt=3)).astype(jnp.float32)
            for i in range(400)
        ]
    )
    below, above = x * (1 - 2**-7), x * (1 + 2**-7)
    low, high = jnp.minimum(below, above), jnp.maximum(below, above)
    assert ((draws >= low) & (draws <= high)).all()
    assert (draws[:, 0] == 1).all()  # exact in bfloat16: not rounded
    # Four standard deviations of a mean of 400 draws between neighbours 2^-7 apart.
    np.testing.assert_allclose(draws.mean(0), x, rtol=4 * 2**-7 / 2 / 20)


def test_a_second_moment_in_bfloat16_reaches_its_value() -> None:
    """Rounded to nearest, it would stop at a third below the square of a constant gradient."""
    adam = stored_in_bfloat16(optax.scale_by_adam(b1=0.9, b2=0.99))
    grads = {"kernel": jnp.full((64, 64), 0.1)}
    state = adam.init(grads)
    update = jax.jit(adam.update)
    for _ in range(1000):
        _, state = update(grads, state)
    assert state.nu["kernel"].dtype == jnp.bfloat16
    assert float(state.nu["kernel"].astype(jnp.float32).mean()) == pytest.approx(0.01, rel=0.02)


def test_the_random_bits_differ_between_steps_leaves_and_elements() -> None:
    draws = [
        np.asarray(random_bits((1000,), jnp.int32(c), salt)) for c in (1, 2) for salt in (0, 1)
    ]
    assert len({draw.tobytes() for draw in draws}) == 4
    assert all(len(set(draw.tolist())) > 990 for draw in draws)
    assert abs(np.mean([draw.mean() for draw in draws]) / 2**31 - 1) < 0.05


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_declared_moments_are_those_in_the_state(name: str) -> None:
    cfg = OptimizerConfig(optimizer=name)
    params = jax.eval_shape(lambda: init_params(TINY, jax.random.key(0)))
    optimizer = make_optimizer(cfg, make_schedule(cfg, 10), accumulation=1)
    state = jax.eval_shape(optimizer.init, params).inner_opt_state

    def path_of(path) -> str:
        return jax.tree_util.keystr(path, simple=True, separator="/")

    found = [path_of(path) for path, _ in jax.tree.leaves_with_path(state)]
    for path, _ in jax.tree.leaves_with_path(params):
        count = sum(leaf.endswith("/" + path_of(path)) for leaf in found)
        assert count == OPTIMIZERS[name].moments(path_of(path)), path_of(path)
