"""From a configuration to the compiled functions of a run, for whichever command needs them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.fields import OptimizerConfig, Remat
from jaxgpt.model.attention import compute_capability, pick_attention
from jaxgpt.model.gpt import build_gpt, init_params
from jaxgpt.training.layout import OneDevice
from jaxgpt.training.optimizer import make_accumulator, make_optimizer, make_schedule
from jaxgpt.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_score_step,
    make_train_step,
)

GPU_OPTIONS = {
    # It overlaps collectives, of which one GPU has none, and to that end moves recomputation
    # forward again, so that memory saved by it is spent after all.
    "xla_gpu_enable_latency_hiding_scheduler": False,
    # With products left to cuBLAS a step's memory is what the planner reads without the card
    # (fused into Triton kernels they took 5.0 GiB for 3.7 in the 24gb preset with full remat).
    "xla_gpu_enable_triton_gemm": False,
}


class Training(NamedTuple):
    """What a run computes, jitted for the devices of one layout."""

    graphdef: nnx.GraphDef
    attention: str  # which kernel was chosen, and why
    init: Callable[[], TrainState]  # the state before the first step
    state_like: TrainState  # its shapes, dtypes and shardings
    train_step: Any  # a jitted TrainStep, which donates its state
    eval_step: Any  # a jitted EvalStep
    score_step: Any  # a jitted ScoreStep
    tokens_sharding: Callable[[int], Any]


def build_training(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    max_iters: int,
    accumulation: int,
    dtype: str,
    seed: int,
    device: Any,
    layout: OneDevice | None = None,
    remat: Remat = "none",
    scan_layers: bool = False,
    skip_spikes: float = 0.0,
    compiler_options: Mapping[str, Any] | None = None,
) -> Training:
    """Build everything that is compiled; nothing is computed or allocated yet.

    `layout` says where everything lies: on `device` alone, if unset. `compiler_options` come on top
    of those that every GPU gets.
    """
    layout = layout or OneDevice(device)
    attend, attention = pick_attention(
        device.platform, compute_capability(device), dtype, model.n_embd // model.n_head
    )
    graphdef = build_gpt(model, dtype, attend, remat, scan_layers)
    schedule = make_schedule(optimizer, max_iters)
    multi_steps = make_optimizer(optimizer, schedule, accumulation)
    for_gpu = {**GPU_OPTIONS, **layout.gpu_options} if device.platform == "gpu" else {}
    options = {**for_gpu, **(compiler_options or {})}

    def init() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return init_state(init_params(model, init_key), multi_steps, run_key)

    like = jax.eval_shape(init)
    shardings = layout.state_shardings(like)
    train_step = make_train_step(
        graphdef,
        multi_steps,
        make_accumulator(optimizer, accumulation),
        schedule,
        skip_spikes,
        layout.gather,
        layout.spread_gradients,
    )

    def by_rows(step: Callable[..., Any]) -> Any:
        # Each row's result is wanted on the host of each process.
        out = layout.results(None)
        return jax.jit(layout.spread_rows(step), compiler_options=options, **out)

    return Training(
        graphdef=graphdef,
        attention=attention,
        init=jax.jit(init, out_shardings=shardings),
        state_like=jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            shardings,
        ),
        train_step=jax.jit(
            train_step,
            donate_argnums=0,
            compiler_options=options,
            **layout.results((shardings, None)),
        ),
        eval_step=by_rows(make_eval_step(graphdef, layout.gather)),
        score_step=by_rows(make_score_step(graphdef, layout.gather)),
        tokens_sharding=layout.tokens_sharding,
    )


def compile_train_step(training: Training, accumulation: int, batch_size: int) -> Any:
    """The train step compiled for tokens_ABT1 of one shape: to be called, and asked for memory."""
    return training.train_step.lower(
        training.state_like, _tokens_like(training, accumulation, batch_size)
    ).compile()


def compile_eval_step(training: Training, batch_size: int) -> Any:
    """The evaluation step compiled for tokens_BT1 of one shape."""
    return training.eval_step.lower(
        training.state_like.params, _tokens_like(training, batch_size)
    ).compile()


def _tokens_like(training: Training, *leading: int) -> jax.ShapeDtypeStruct:
    T, _ = training.state_like.params["wpe"]["embedding"].shape
    sharding = training.tokens_sharding(len(leading) - 1)
    return jax.ShapeDtypeStruct((*leading, T + 1), jnp.uint16, sharding=sharding)
