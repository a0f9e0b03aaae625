import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxgpt.model.attention import cudnn_attention, plain_attention
from jaxgpt.model.gelu import GELUS
from jaxgpt.model.gpt import build_gpt, init_params
from jaxgpt.model.loss import mean_cross_entropy

CFG = dataclasses.replace(TINY, n_layer=3)


def loss_and_grads(remat: str, params, tokens_BT1, attend=plain_attention, dtype="float32"):
    graphdef = build_gpt(CFG, dtype, attend, remat)

    def loss_fn(params):
        model = nnx.merge(graphdef, params)
        h_BTD = model.features(tokens_BT1[:, :-1])
        wte_VD = model.wte.embedding[...]
        return mean_cross_entropy(h_BTD, wte_VD, tokens_BT1[:, 1:], CFG.n_vocab)

    return jax.value_and_grad(loss_fn)(params)


@pytest.mark.parametrize("remat", ["light", "full"])
def test_recomputing_changes_no_gradient(remat: str, tokens_BT1) -> None:
    params = init_params(CFG, jax.random.key(0))
    expected, got = (loss_and_grads(r, params, tokens_BT1) for r in ("none", remat))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def primitives(jaxpr) -> list[str]:
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            names += primitives(inner)
    return names


def count(remat: str, what: str) -> int:
    """How often a primitive appears when the linear layers and attention are differentiated."""
    params = init_params(CFG, jax.random.key(0))
    tokens = np.zeros((2, 9), np.uint16)
    jaxpr = jax.make_jaxpr(lambda p: loss_and_grads(remat, p, tokens)[1])(params)
    return primitives(jaxpr.jaxpr).count(what)


def test_light_recomputes_no_linear_layer_and_full_recomputes_all_but_the_last() -> None:
    none, light, full = (count(remat, "dot_general") for remat in ("none", "light", "full"))
    # Plain attention's two products have batch axes, so that light computes the scores again.
    assert none < light <= none + 2 * CFG.n_layer
    assert full >= light + 3 * CFG.n_layer


def test_light_keeps_what_flash_attention_hands_to_its_backward_pass(monkeypatch) -> None:
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


@pytest.mark.parametrize("name", ["tanh", "erf"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_are_those_of_jax(dtype, name) -> None:
    x = jnp.linspace(-6, 6, 1001).astype(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == jnp.float32 else {"atol": 0.02}
    got, vjp = jax.vjp(GELUS[name], x)
    expected, expected_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=name == "tanh"), x)
    assert got.dtype == dtype
    as32 = [np.asarray(y, np.float32) for y in (got, expected)]
    np.testing.assert_allclose(*as32, **tolerance)
    dx, expected_dx = (np.asarray(f(jnp.ones_like(x))[0], np.float32) for f in (vjp, expected_vjp))
    np.testing.assert_allclose(dx, expected_dx, **tolerance)
