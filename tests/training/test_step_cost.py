"""FLOPs and array sizes of a step, read from its jaxpr: no GPU and no clock needed.

XLA's own cost analysis counts the body of a loop once; here it counts once per iteration.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.trees import TINY
from jax.extend.core import jaxprs_in_params

from jaxgpt.config.fields import OptimizerConfig
from jaxgpt.model.attention import cudnn_attention, plain_attention
from jaxgpt.model.loss import CHUNK_ROWS
from jaxgpt.model.network import build_model, init_params
from jaxgpt.training.optimizer import make_accumulator, make_optimizer, make_schedule
from jaxgpt.training.step import init_state, make_train_step

CFG = dataclasses.replace(TINY, n_layer=3, n_embd=32, block_size=24, vocab_size=320, n_vocab=257)
A, B, T = 3, 4, CFG.block_size
BOTH = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@pytest.fixture
def flash(monkeypatch) -> None:
    """Lets cuDNN's attention be traced, though not run, on a machine without cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)


def step_jaxpr(remat: str, scan: bool, attend=plain_attention, dtype="float32", batch=(A, B)):
    graphdef = build_model(CFG, dtype, attend, remat, scan)
    optimizer, schedule = OptimizerConfig(), make_schedule(OptimizerConfig(), 10)
    multi_steps = make_optimizer(optimizer, schedule, batch[0])
    accumulator = make_accumulator(optimizer, batch[0])
    step = make_train_step(graphdef, multi_steps, accumulator, schedule)
    state = jax.eval_shape(
        lambda: init_state(init_params(CFG, jax.random.key(0)), multi_steps, jax.random.key(1))
    )
    tokens = jax.ShapeDtypeStruct((*batch, T + 1), np.uint16)
    return jax.make_jaxpr(step)(state, tokens).jaxpr


def forward_jaxpr(head: bool):
    """The forward pass of one micro-batch, with or without head and loss."""
    graphdef = build_model(CFG, "float32", plain_attention)
    params = jax.eval_shape(lambda: init_params(CFG, jax.random.key(0)))

    def forward(params, tokens_BT1):
        model = nnx.merge(graphdef, params)
        return model.token_scores(tokens_BT1)[0] if head else model.features(tokens_BT1[:, :-1])

    tokens = jax.ShapeDtypeStruct((B, T + 1), np.uint16)
    return jax.make_jaxpr(forward)(params, tokens).jaxpr


def flops(jaxpr) -> int:
    """FLOPs of all matrix products; those in a loop count once per iteration."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
            )
        assert eqn.primitive.name != "while", "a loop of unknown length"
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += times * sum(flops(inner) for inner in jaxprs_in_params(eqn.params))
    return total


def shapes(jaxpr) -> set[tuple[int, ...]]:
    found = {tuple(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars}
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            found |= shapes(inner)
    return found


# FLOPs of the forward pass that the backward pass repeats.
SCORES = 2 * 2 * B * CFG.n_head * T * T * (CFG.n_embd // CFG.n_head)
LAST_PRODUCT = 2 * B * T * 4 * CFG.n_embd * CFG.n_embd  # its output is not needed again
BLOCKS = flops(forward_jaxpr(head=False))
AGAIN = {
    "none": 0,
    # The products of plain attention have batch axes; flash attention keeps its residuals.
    "light": CFG.n_layer * SCORES // 2,
    "full": BLOCKS - CFG.n_layer * LAST_PRODUCT,
}


@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_a_step_costs_three_forward_passes_plus_what_remat_repeats(remat, scan) -> None:
    forward = flops(forward_jaxpr(head=True))
    expected = A * (3 * forward + AGAIN[remat])
    assert flops(step_jaxpr(remat, scan)) == pytest.approx(expected, rel=0.02)


@pytest.mark.usefixtures("flash")
@BOTH
def test_light_repeats_no_product_under_flash_attention(scan) -> None:
    none, light = (
        flops(step_jaxpr(remat, scan, cudnn_attention, "bfloat16")) for remat in ("none", "light")
    )
    assert none == light > 0


@pytest.mark.usefixtures("flash")
@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_no_scores_exist_under_flash_attention(remat, scan) -> None:
    def has_scores(attend, dtype) -> bool:
        found = shapes(step_jaxpr(remat, scan, attend, dtype))
        return any(shape[-2:] == (T, T) for shape in found)

    assert not has_scores(cudnn_attention, "bfloat16")
    assert has_scores(plain_attention, "float32")  # so the check can fail


@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_no_array_of_all_logits_exists_in_the_step(remat, scan) -> None:
    batch = 2 * CHUNK_ROWS // T
    found = shapes(step_jaxpr(remat, scan, batch=(1, batch)))
    V, rows = CFG.vocab_size, batch * T
    assert max(math.prod(shape) for shape in found if V in shape) <= (rows // 2 + 1) * V
