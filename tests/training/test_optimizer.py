import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.trees import TINY, assert_trees_equal

from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.model.network import init_params
from jaxgpt.training.groups import joined
from jaxgpt.training.optimizer import (
    OPTIMIZERS,
    grad_norm,
    make_optimizer,
    random_bits,
    stochastic_round,
    stored_in_bfloat16,
)
from jaxgpt.training.schedule import make_schedule


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


def test_state_in_bfloat16_takes_ten_bytes_a_parameter() -> None:
    cfg = OptimizerConfig(state_dtype="bfloat16")
    params = init_params(TINY, jax.random.key(0))
    state = make_optimizer(cfg, make_schedule(cfg, 10), 2).init(params)
    floats = [x for x in jax.tree.leaves(state) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    assert sum(x.nbytes for x in floats) == 6 * sum(x.size for x in jax.tree.leaves(params))


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

    found = [joined(path) for path, _ in jax.tree.leaves_with_path(state)]
    for path, _ in jax.tree.leaves_with_path(params):
        count = sum(leaf.endswith("/" + joined(path)) for leaf in found)
        assert count == OPTIMIZERS[name].moments(joined(path)), joined(path)


# ---------------------------------------------------------------- decay and learning rates by group

PARAMS = {
    "blocks": {"0": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]])}},
    "wte": {"embedding": jnp.array([[-1.0, 2.0]])},
    "lm_head": {"embedding": jnp.array([[4.0, -1.0]])},
    "norm": {"scale": jnp.array([1.0, 1.5])},
}
GRADIENTS = jax.tree.map(lambda x: jnp.flip(x) * 0.1, PARAMS)


def updates_of(cfg: OptimizerConfig, steps: int = 1):
    """The update of the last of some steps with the same gradients and parameters."""
    tx = make_optimizer(cfg, make_schedule(cfg, 10), accumulation=1)
    state = tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADIENTS, state, PARAMS)
    return updates


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_adamw_without_new_settings_is_optaxs_chain_to_the_bit(weight_decay: float) -> None:
    cfg = OptimizerConfig(warmup_iters=2, weight_decay=weight_decay)
    mask = jax.tree.map(lambda _: True, PARAMS) | {"norm": {"scale": False}}
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.99),
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.scale_by_learning_rate(make_schedule(cfg, 10)),
    )
    steps = optax.MultiSteps(chain, 1)
    state = steps.init(PARAMS)
    for _ in range(4):
        expected, state = steps.update(GRADIENTS, state, PARAMS)
    assert_trees_equal(updates_of(cfg, steps=4), expected)


def test_each_group_has_its_own_rate_and_decay_follows_it() -> None:
    cfg = OptimizerConfig(learning_rate=0.01, min_lr=0.0, warmup_iters=0)
    same = updates_of(cfg)
    own = updates_of(dataclasses.replace(cfg, embedding_lr=0.05, head_lr=0.002, vector_lr=0.03))
    for name, ratio in {"blocks": 1, "wte": 5, "lm_head": 0.2, "norm": 3}.items():
        for a, b in zip(jax.tree.leaves(own[name]), jax.tree.leaves(same[name]), strict=True):
            np.testing.assert_allclose(a, ratio * b, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cautious_weight_decay_spares_what_moves_away_from_zero(optimizer: str) -> None:
    cfg = OptimizerConfig(optimizer=optimizer, warmup_iters=0, weight_decay=0.0)
    plain = updates_of(cfg)
    cautious = updates_of(dataclasses.replace(cfg, weight_decay=0.5, cautious_weight_decay=True))
    spared = 0
    for group in ("blocks", "wte", "lm_head"):
        p, u, v = (jax.tree.leaves(tree[group])[0] for tree in (PARAMS, plain, cautious))
        towards_zero = p * u < 0
        expected = u - cfg.learning_rate * 0.5 * jnp.where(towards_zero, p, 0)
        np.testing.assert_allclose(v, expected, rtol=1e-5)
        spared += int((~towards_zero).sum())
    assert 0 < spared < 8
    np.testing.assert_array_equal(plain["norm"]["scale"], cautious["norm"]["scale"])


def test_weight_decay_may_fall_with_the_learning_rate() -> None:
    cfg = OptimizerConfig(schedule="wsd", cooldown_fraction=0.5, warmup_iters=0, min_lr=0.0)

    def decay(schedule: str, steps: int) -> float:
        with_decay = dataclasses.replace(cfg, weight_decay=0.5, weight_decay_schedule=schedule)
        without = dataclasses.replace(cfg, weight_decay=0.0)
        pairs = (updates_of(c, steps)["blocks"]["0"]["kernel"] for c in (with_decay, without))
        a, b = pairs
        return float((a - b)[0, 0]) / (-cfg.learning_rate * 0.5)

    # Of ten steps the first six have the whole rate, the ninth 2/5.
    assert decay("constant", 9) == pytest.approx(2 / 5, rel=1e-3)
    assert decay("lr", 9) == pytest.approx((2 / 5) ** 2, rel=1e-3)
    assert decay("lr", 3) == pytest.approx(1, rel=1e-3)


def test_the_state_is_the_same_whatever_is_set() -> None:
    """So that a resumed run may set it, and checkpoints of earlier versions load."""
    everything = OptimizerConfig(
        **dict(optimizer="muon", schedule="wsd", cautious_weight_decay=True, head_lr=0.1),
        **dict(weight_decay_schedule="lr", momentum_warmup_iters=5),
    )
    states = []
    for cfg in (OptimizerConfig(optimizer="muon"), everything):
        state = make_optimizer(cfg, make_schedule(cfg, 10), accumulation=1).init(PARAMS)
        states.append(jax.tree.map(lambda x: (x.shape, x.dtype), state))
    assert states[0] == states[1]
    paths = [joined(path) for path, _ in jax.tree.leaves_with_path(states[0])]
    assert "inner_opt_state/4/count" in " ".join(paths)  # of the schedule
