"""Builds the jitted functions of a run from its configuration."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import Remat
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.data.token_file import token_dtype
from jaxgpt.model.attention import attention_on
from jaxgpt.model.network import build_model, init_params
from jaxgpt.training.layout import Layout
from jaxgpt.training.loss_scale import LossScale
from jaxgpt.training.optimizer import make_accumulator, make_optimizer
from jaxgpt.training.schedule import make_schedule
from jaxgpt.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_score_step,
    make_train_step,
)

GPU_OPTIONS: dict[str, bool | int | str] = {
    # The scheduler hides the latency of collectives, which one GPU does not have, and moves
    # recomputation forward, which undoes what rematerialization saves.
    "xla_gpu_enable_latency_hiding_scheduler": False,
    # With cuBLAS a step takes the memory that the planner finds by compiling without the card. With
    # Triton the 24gb preset with full remat took 5.0 GiB instead of 3.7.
    "xla_gpu_enable_triton_gemm": False,
    # XLA may otherwise skip roundings to bfloat16, which keeps the residual stream's gradient in
    # float32: on cards before Hopper two such arrays are written in each layer.
    "xla_allow_excess_precision": False,
    # Merging products of one input (q, k and v; gate and up) costs copies that split the result.
    "xla_gpu_dot_merger_threshold_mb": 0,
    # XLA's own limit is 80 % of the card; above it XLA rematerializes by itself, for instance the
    # head's products. 112 % of that is 90 %: JAX's pool has 92 %, of which `plan` keeps a reserve.
    "xla_gpu_memory_limit_slop_factor": 112,
}


class Training(NamedTuple):
    """The functions of a run, jitted for the devices of one layout."""

    graphdef: nnx.GraphDef
    block_size: int
    tokens_dtype: np.dtype  # of the batches
    attention: str  # the kernel's name and why it was chosen
    init: Callable[[], TrainState]  # the state before the first step
    state_like: TrainState  # its shapes, dtypes and shardings
    train_step: Any  # a jitted TrainStep, which donates its state
    eval_step: Any  # a jitted EvalStep
    score_step: Any  # a jitted ScoreStep
    tokens_sharding: Callable[[int], Any]  # `Layout.tokens_sharding`


def build_training(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    max_iters: int,
    accumulation: int,
    dtype: str,
    seed: int,
    device: Any,
    layout: Layout | None = None,
    remat: Remat = "none",
    scan_layers: bool = False,
    skip_spikes: float = 0.0,
    compiler_options: Mapping[str, Any] | None = None,
) -> Training:
    """Build the functions of a run; nothing is compiled, computed or allocated yet.

    Without `layout` everything is on `device`. `compiler_options` are added to GPU_OPTIONS.
    """
    layout = layout or Layout(device)
    attend, attention = attention_on(device, dtype, model.head_width)
    graphdef = build_model(model, dtype, attend, remat, scan_layers)
    schedule = make_schedule(optimizer, max_iters)
    multi_steps = make_optimizer(optimizer, schedule, accumulation, dtype, layout.map_stack)
    for_gpu = {**GPU_OPTIONS, **layout.gpu_options} if device.platform == "gpu" else {}
    jit = partial(jax.jit, compiler_options={**for_gpu, **(compiler_options or {})})

    def init() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        loss_scale = LossScale.initial() if dtype == "float16" else ()
        return init_state(init_params(model, init_key), multi_steps, run_key, loss_scale)

    like = jax.eval_shape(init)
    shardings = layout.state_shardings(like)
    eval_step = layout.data_parallel_rows(make_eval_step(graphdef, layout.all_gather))
    score_step = layout.data_parallel_rows(make_score_step(graphdef, layout.all_gather))
    train_step = make_train_step(
        graphdef,
        multi_steps,
        make_accumulator(optimizer, accumulation),
        schedule,
        skip_spikes,
        layout.all_gather,
        layout.data_parallel_gradients,
    )

    return Training(
        graphdef=graphdef,
        block_size=model.block_size,
        tokens_dtype=token_dtype(model.n_vocab or 1),
        attention=attention,
        init=jax.jit(init, out_shardings=shardings),
        state_like=jax.tree.map(_with_sharding, like, shardings),
        train_step=jit(train_step, donate_argnums=0, **layout.jit_options((shardings, None))),
        # Outputs are replicated, because every process reads those of all rows.
        eval_step=jit(eval_step, **layout.jit_options()),
        score_step=jit(score_step, **layout.jit_options()),
        tokens_sharding=layout.tokens_sharding,
    )


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def lower_train_step(training: Training, accumulation: int, batch_size: int) -> Any:
    """The train step lowered for A = `accumulation` and B = `batch_size` (of all devices)."""
    return training.train_step.lower(
        training.state_like, _tokens_like(training, accumulation, batch_size)
    )


def compile_train_step(training: Training, accumulation: int, batch_size: int) -> Any:
    """The train step compiled for A = `accumulation` and B = `batch_size` (of all devices)."""
    return lower_train_step(training, accumulation, batch_size).compile()


def compile_eval_step(training: Training, batch_size: int) -> Any:
    """The evaluation step compiled for B = `batch_size` (of all devices)."""
    return training.eval_step.lower(
        training.state_like.params, _tokens_like(training, batch_size)
    ).compile()


def _tokens_like(training: Training, *leading: int) -> jax.ShapeDtypeStruct:
    shape = (*leading, training.block_size + 1)
    sharding = training.tokens_sharding(len(leading) - 1)
    return jax.ShapeDtypeStruct(shape, training.tokens_dtype, sharding=sharding)
