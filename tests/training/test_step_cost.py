"""FLOPs and array sizes of a step, read from its jaxpr: no GPU and no clock needed.

XLA's own cost analysis counts the body of a loop once; here it counts once per iteration.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from helpers.trees import MODELS
from jax.extend.core import jaxprs_in_params

from jaxgpt.config.architecture import ModelConfig, parameter_shapes
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.model.attention import cudnn_attention, plain_attention
from jaxgpt.model.loss import CHUNK_ROWS
from jaxgpt.model.network import build_model, init_params
from jaxgpt.training.optimizer import make_accumulator, make_optimizer
from jaxgpt.training.schedule import make_schedule
from jaxgpt.training.step import init_state, make_train_step

A, B, T, V = 3, 4, 24, 320
SIZES = dict(n_layer=3, n_embd=32, block_size=T, vocab_size=V, n_vocab=257)
CFGS = {arch: dataclasses.replace(cfg, **SIZES) for arch, cfg in MODELS.items()}
BOTH = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
LAST_KERNEL = {"gpt2": "blocks/0/mlp/c_proj/kernel", "qwen3": "blocks/0/mlp/down_proj/kernel"}
EACH = pytest.mark.parametrize("cfg", CFGS.values(), ids=CFGS)


@pytest.fixture
def flash(monkeypatch) -> None:
    """Lets cuDNN's attention be traced, though not run, on a machine without cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)


def step_jaxpr(
    cfg: ModelConfig, remat: str, scan: bool, attend=plain_attention, dtype="float32", batch=(A, B)
):
    graphdef = build_model(cfg, dtype, attend, remat, scan)
    optimizer, schedule = OptimizerConfig(), make_schedule(OptimizerConfig(), 10)
    multi_steps = make_optimizer(optimizer, schedule, batch[0])
    accumulator = make_accumulator(optimizer, batch[0])
    step = make_train_step(graphdef, multi_steps, accumulator, schedule)
    state = jax.eval_shape(
        lambda: init_state(init_params(cfg, jax.random.key(0)), multi_steps, jax.random.key(1))
    )
    tokens = jax.ShapeDtypeStruct((*batch, T + 1), np.uint16)
    return jax.make_jaxpr(step)(state, tokens).jaxpr


def forward_jaxpr(cfg: ModelConfig, head: bool):
    """The forward pass of one micro-batch, with or without head and loss."""
    graphdef = build_model(cfg, "float32", plain_attention)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))

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


def repeated(cfg: ModelConfig) -> dict[str, int]:
    """FLOPs of the forward pass that the backward pass repeats, by remat."""
    scores = 2 * 2 * B * cfg.n_head * T * T * cfg.head_width
    hidden = parameter_shapes(cfg)[LAST_KERNEL[cfg.arch]][0]
    last_product = 2 * B * T * hidden * cfg.n_embd  # its output is not needed again
    return {
        "none": 0,
        # The products of plain attention have batch axes; flash attention keeps its residuals.
        "light": cfg.n_layer * scores,
        "full": flops(forward_jaxpr(cfg, head=False)) - cfg.n_layer * last_product,
    }


@EACH
@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_a_step_costs_three_forward_passes_plus_what_remat_repeats(cfg, remat, scan) -> None:
    forward = flops(forward_jaxpr(cfg, head=True))
    expected = A * (3 * forward + repeated(cfg)[remat])
    assert flops(step_jaxpr(cfg, remat, scan)) == expected


@pytest.mark.usefixtures("flash")
@EACH
@BOTH
def test_light_repeats_no_product_under_flash_attention(cfg, scan) -> None:
    none, light = (
        flops(step_jaxpr(cfg, remat, scan, cudnn_attention, "bfloat16"))
        for remat in ("none", "light")
    )
    assert none == light > 0


@pytest.mark.usefixtures("flash")
@EACH
@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_no_scores_exist_under_flash_attention(cfg, remat, scan) -> None:
    rows = T * cfg.n_head // cfg.kv_heads

    def has_scores(attend, dtype) -> bool:
        found = shapes(step_jaxpr(cfg, remat, scan, attend, dtype))
        return any(shape[-2:] == (rows, T) for shape in found)

    assert not has_scores(cudnn_attention, "bfloat16")
    assert has_scores(plain_attention, "float32")  # so the check can fail


@EACH
@BOTH
@pytest.mark.parametrize("remat", ["none", "light", "full"])
def test_no_array_of_all_logits_exists_in_the_step(cfg, remat, scan) -> None:
    batch = 2 * CHUNK_ROWS // T
    found = shapes(step_jaxpr(cfg, remat, scan, batch=(1, batch)))
    rows = batch * T
    assert max(math.prod(shape) for shape in found if V in shape) <= (rows // 2 + 1) * V
