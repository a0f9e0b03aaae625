"""Muon: momentum, Newton-Schulz iterations and their batches."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.training import muon
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.schedule import make_schedule

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


# ---------------------------------------------------------------- batches of one shape


def random_matrices(*shapes: tuple[int, int]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {f"m{i}": jnp.asarray(rng.normal(size=x), jnp.float32) for i, x in enumerate(shapes)}


SHAPES = ((8, 24), (24, 8), (8, 24), (8, 8), (24, 8), (8, 24))


@pytest.mark.parametrize("batch_elements", [2**26, 2 * 8 * 24, 1])
def test_a_batch_of_one_shape_equals_one_matrix_at_a_time(monkeypatch, batch_elements) -> None:
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", batch_elements)
    matrices = random_matrices(*SHAPES)
    together = muon.orthogonalize(matrices, "float32")
    for name, matrix in matrices.items():
        alone = muon.orthogonalize({name: matrix}, "float32")[name]
        np.testing.assert_allclose(together[name], alone, rtol=0, atol=1e-6)


def test_orthogonalized_matrices_are_optaxs() -> None:
    matrices = random_matrices(*SHAPES)
    each = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), matrices)
    tx = optax.contrib.scale_by_muon(nesterov=False, weight_dimension_numbers=each)
    expected, _ = tx.update(matrices, tx.init(matrices))
    found = muon.orthogonalize(matrices, "float32")
    for name in matrices:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e6])
def test_products_in_half_precision_give_nearly_the_same_matrix(dtype, scale) -> None:
    """Of gradients beyond float16's range, too."""
    matrices = jax.tree.map(lambda x: scale * x, random_matrices(*SHAPES))
    exact, rounded = (muon.orthogonalize(matrices, name) for name in ("float32", dtype))
    for name, matrix in rounded.items():
        assert matrix.dtype == jnp.float32
        distance = jnp.linalg.norm(matrix - exact[name]) / jnp.linalg.norm(exact[name])
        assert 0 < distance < 0.1


# ---------------------------------------------------------------- momentum


def momentum_after(gradients: list[float], warmup: int) -> float:
    """The stored moment of a matrix whose gradients are constant matrices."""
    cfg = dataclasses.replace(MUON, momentum_warmup_iters=warmup)
    params = {"kernel": jnp.zeros((2, 2))}
    tx = muon.scale_by_muon(cfg, "float32")
    state = tx.init(params)
    for gradient in gradients:
        _, state = tx.update({"kernel": jnp.full((2, 2), gradient)}, state)
    return float(optax.tree.get(state, "mu")["kernel"][0, 0])


def test_momentum_rises_from_085_to_095_over_its_warm_up() -> None:
    # A single gradient of 1, whose moment the following zeros multiply by each step's momentum.
    after = [momentum_after([1.0, *[0.0] * n], warmup=4) for n in range(7)]
    assert after[0] == pytest.approx(1 - 0.85)
    factors = [b / a for a, b in itertools.pairwise(after)]
    assert factors == pytest.approx([0.875, 0.9, 0.925, 0.95, 0.95, 0.95])


def test_momentum_without_a_warm_up_is_095() -> None:
    assert momentum_after([1.0, 0.0], warmup=0) == pytest.approx(0.05 * 0.95)


def test_muon_looks_ahead_as_nesterov() -> None:
    """The direction is that of 0.95 of the new moment and 0.05 of the gradient."""
    params = random_matrices((8, 8), (8, 8))
    first, second = params["m0"], params["m1"]
    tx = muon.scale_by_muon(MUON, "float32")
    _, state = tx.update({"kernel": first}, tx.init({"kernel": first}))
    found, _ = tx.update({"kernel": second}, state)
    moment = 0.95 * 0.05 * first + 0.05 * second
    ahead = muon.orthogonalize({"kernel": 0.95 * moment + 0.05 * second}, "float32")["kernel"]
    expected = 0.2 * np.sqrt(8) * ahead
    np.testing.assert_allclose(found["kernel"], expected, rtol=0, atol=2e-5)
