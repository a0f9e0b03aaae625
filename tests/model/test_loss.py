import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from jaxgpt.model import loss as loss_module
from jaxgpt.model.loss import mask_padding, mean_cross_entropy, token_scores

N_VOCAB, V, D = 50, 64, 16


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    h_key, w_key, t_key = jax.random.split(jax.random.key(0), 3)
    h_BTD = jax.random.normal(h_key, (3, 10, D))
    wte_VD = jax.random.normal(w_key, (V, D))
    return h_BTD, wte_VD, jax.random.randint(t_key, (3, 10), 0, N_VOCAB)


def plain_loss(h_BTD: jax.Array, wte_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    logits = (h_BTD @ wte_VD.T)[..., :N_VOCAB]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets_BT).mean()


@pytest.mark.parametrize("chunk_rows", [1, 7, 10, 30, 4096])
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_fused_loss_and_gradients_equal_the_plain_ones(
    inputs, chunk_rows: int, as_on_a_gpu: bool, monkeypatch
) -> None:
    h_BTD, wte_VD, targets_BT = inputs
    if as_on_a_gpu:
        monkeypatch.setattr(loss_module, "_logsumexp", loss_module._one_pass_logsumexp)

    def fused(h: jax.Array, w: jax.Array) -> jax.Array:
        return 3 * mean_cross_entropy(h, w, targets_BT, N_VOCAB, chunk_rows)

    loss, (dh, dw) = jax.value_and_grad(fused, argnums=(0, 1))(h_BTD, wte_VD)
    expected, (dh0, dw0) = jax.value_and_grad(plain_loss, argnums=(0, 1))(h_BTD, wte_VD, targets_BT)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(dh, 3 * dh0, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dw, 3 * dw0, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("copies", [1, 2, 6])
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_a_gpus_logsumexp_is_exact_for_huge_and_bad_logits(copies: int, padding: int) -> None:
    rows = [[-jnp.inf, 1.0, 2.0, -jnp.inf], [3e38, -3e38, 0.0, 1.0], [-jnp.inf, -1e4, -1e4, 0.0]]
    x_CN = jnp.tile(jnp.array([*rows, [0.0, jnp.nan, 1.0, 2.0]]), copies)
    x_CV = jnp.pad(x_CN, ((0, 0), (0, padding)), constant_values=2e38)
    found = loss_module._one_pass_logsumexp(x_CV, x_CN.shape[1])
    np.testing.assert_allclose(found, jax.nn.logsumexp(x_CN, axis=-1), rtol=1e-6)


def test_padded_rows_affect_no_loss_and_get_no_gradient(inputs) -> None:
    h_BTD, wte_VD, targets_BT = inputs
    huge = wte_VD.at[N_VOCAB:].set(1e4)
    loss, dw = jax.value_and_grad(mean_cross_entropy, argnums=1)(h_BTD, huge, targets_BT, N_VOCAB)
    np.testing.assert_allclose(loss, plain_loss(h_BTD, wte_VD, targets_BT), rtol=1e-6)
    assert not np.asarray(dw[N_VOCAB:]).any()


def test_token_losses_average_to_the_mean_loss(inputs) -> None:
    h_BTD, wte_VD, targets_BT = inputs
    losses_BT, _ = token_scores(h_BTD, wte_VD, targets_BT, N_VOCAB, 7)
    assert losses_BT.shape == targets_BT.shape
    mean = mean_cross_entropy(h_BTD, wte_VD, targets_BT, N_VOCAB)
    np.testing.assert_allclose(losses_BT.mean(), mean, rtol=1e-6)


def test_the_embedding_gradient_stays_float32_under_bfloat16(inputs) -> None:
    h_BTD, wte_VD, targets_BT = inputs
    dh, dw = jax.grad(mean_cross_entropy, argnums=(0, 1))(
        h_BTD.astype(jnp.bfloat16), wte_VD, targets_BT, N_VOCAB
    )
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_no_array_of_all_logits_exists_in_the_gradient(inputs) -> None:
    h_BTD, wte_VD, targets_BT = inputs
    grad = jax.grad(mean_cross_entropy, argnums=(0, 1))
    jaxpr = jax.make_jaxpr(lambda h, w: grad(h, w, targets_BT, N_VOCAB, 5))(h_BTD, wte_VD)
    assert largest_array(jaxpr.jaxpr) < targets_BT.size * V


def largest_array(jaxpr) -> int:
    sizes = [int(np.prod(v.aval.shape)) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [largest_array(sub) for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return max([*sizes, *inner, 0])


def test_mask_padding_does_not_change_an_unpadded_vocabulary() -> None:
    logits = jnp.ones((2, 4))
    assert mask_padding(logits, None) is logits
    assert mask_padding(logits, 4) is logits
    assert np.isneginf(mask_padding(logits, 3)[:, 3]).all()
