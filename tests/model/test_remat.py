import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import textbook
from helpers.trees import MODELS, TINY
from jax.extend.core import jaxprs_in_params

from jaxgpt.model.attention import cudnn_attention, plain_attention
from jaxgpt.model.gelu import GELUS, gelu_of_product
from jaxgpt.model.network import build_model, init_params

CFG = dataclasses.replace(TINY, n_layer=3)


def loss_and_grads(
    remat: str, params, tokens_BT1, attend=plain_attention, dtype="float32", scan=False, cfg=CFG
):
    graphdef = build_model(cfg, dtype, attend, remat, scan)

    def loss_fn(params):
        return nnx.merge(graphdef, params).loss(tokens_BT1)

    return jax.jit(jax.value_and_grad(loss_fn))(params)


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def expected(request, tokens_BT1):
    """(configuration, parameters, textbook loss, textbook gradients)."""
    cfg = dataclasses.replace(request.param, n_layer=3)
    params = init_params(cfg, jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(partial(textbook.loss, cfg)))
    return cfg, params, *loss(params, tokens_BT1)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_loss_and_gradients_equal_the_textbook_ones(
    expected, remat: str, scan: bool, tokens_BT1
) -> None:
    cfg, params, expected_loss, expected = expected
    loss, grads = loss_and_grads(remat, params, tokens_BT1, scan=scan, cfg=cfg)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        # Relative to the largest element: some elements are sums that nearly cancel.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_scanning_draws_the_same_dropout(tokens_BT1) -> None:
    cfg = dataclasses.replace(CFG, dropout=0.3)
    params = init_params(cfg, jax.random.key(0))
    tokens, key = tokens_BT1[:, :-1], jax.random.key(1)
    unrolled, scanned = (
        nnx.merge(build_model(cfg, "float32", plain_attention, "none", scan), params).features(
            tokens, key
        )
        for scan in (False, True)
    )
    np.testing.assert_allclose(unrolled, scanned, rtol=1e-5, atol=1e-6)


def primitives(jaxpr) -> list[str]:
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            names += primitives(inner)
    return names


def count(remat: str, what: str) -> int:
    """How often a primitive appears in the gradient of the loss."""
    params = init_params(CFG, jax.random.key(0))
    tokens = np.zeros((2, 9), np.uint16)
    jaxpr = jax.make_jaxpr(lambda p: loss_and_grads(remat, p, tokens)[1])(params)
    return primitives(jaxpr.jaxpr).count(what)


def test_light_recomputes_no_linear_layer_and_full_recomputes_all_but_the_last() -> None:
    none, light, full = (count(remat, "dot_general") for remat in ("none", "light", "full"))
    # Plain attention's two products have batch axes, so light recomputes the scores.
    assert none < light <= none + 2 * CFG.n_layer
    assert full >= light + 3 * CFG.n_layer


def test_light_keeps_the_residuals_of_flash_attention(monkeypatch) -> None:
    """Every stock policy of jax.checkpoint runs the kernel's forward pass a second time."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    params = init_params(CFG, jax.random.key(0))
    tokens = np.zeros((2, 9), np.uint16)

    def forward_calls(remat: str) -> int:
        jaxpr = jax.make_jaxpr(
            lambda p: loss_and_grads(remat, p, tokens, cudnn_attention, "bfloat16")[1]
        )(params)
        return primitives(jaxpr.jaxpr).count("dot_product_attention_fwd_wrapper")

    assert forward_calls("none") == forward_calls("light") == CFG.n_layer
    assert forward_calls("full") == 2 * CFG.n_layer


@pytest.mark.usefixtures("either_platform")
@pytest.mark.parametrize("name", ["tanh", "erf", "tanh, of a product"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_equal_jax_nn_gelu(dtype, name) -> None:
    ours = GELUS.get(name, gelu_of_product)
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    # In float32 1 + tanh is off by up to 4.4e-6 in JAX's slope, where the sigmoid is exact.
    tolerance = {"rtol": 1e-5, "atol": 5e-6} if dtype == jnp.float32 else {"atol": 0.02}
    got, vjp = jax.vjp(ours, x)
    expected, expected_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=name != "erf"), x)
    assert got.dtype == dtype
    as32 = [np.asarray(y, np.float32) for y in (got, expected)]
    np.testing.assert_allclose(*as32, **tolerance)
    dx, expected_dx = (np.asarray(f(jnp.ones_like(x))[0], np.float32) for f in (vjp, expected_vjp))
    np.testing.assert_allclose(dx, expected_dx, **tolerance)
