"""From a configuration to the compiled functions of a run, for whichever command needs them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import ModelConfig, OptimizerConfig, Remat
from jaxgpt.model.attention import compute_capability, pick_attention
from jaxgpt.model.gpt import build_gpt, init_params
from jaxgpt.training.optim import make_accumulator, make_optimizer, make_schedule
from jaxgpt.training.step import (
    TrainState,
    init_state,
    make_eval_step,
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
    """What a run computes; each function is jitted for one device."""

    graphdef: nnx.GraphDef
    attention: str  # which kernel was chosen, and why
    init: Callable[[], TrainState]  # the state before the first step
    state_like: TrainState  # its shapes, dtypes and shardings
    train_step: Any  # a jitted TrainStep, which donates its state
    eval_step: Any  # a jitted EvalStep


def build_training(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    max_iters: int,
    accumulation: int,
    dtype: str,
    seed: int,
    device: Any,
    remat: Remat = "none",
    scan_layers: bool = False,
    skip_spikes: float = 0.0,
    compiler_options: Mapping[str, Any] | None = None,
) -> Training:
    """Build everything that is compiled; nothing is computed or allocated yet.

    `compiler_options` come on top of those that every GPU gets.
    """
    attend, attention = pick_attention(
        device.platform, compute_capability(device), dtype, model.n_embd // model.n_head
    )
    graphdef = build_gpt(model, dtype, attend, remat, scan_layers)
    schedule = make_schedule(optimizer, max_iters)
    multi_steps = make_optimizer(optimizer, schedule, accumulation)
    options = {**(GPU_OPTIONS if device.platform == "gpu" else {}), **(compiler_options or {})}

    def init() -> TrainState:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return init_state(init_params(model, init_key), multi_steps, run_key)

    sharding = jax.sharding.SingleDeviceSharding(device)
    return Training(
        graphdef=graphdef,
        attention=attention,
        init=jax.jit(init, out_shardings=sharding),
        state_like=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(init),
        ),
        train_step=jax.jit(
            make_train_step(
                graphdef,
                multi_steps,
                make_accumulator(optimizer, accumulation),
                schedule,
                skip_spikes,
            ),
            donate_argnums=0,
            compiler_options=options,
        ),
        eval_step=jax.jit(make_eval_step(graphdef), compiler_options=options),
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
    sharding = training.state_like.step.sharding
    return jax.ShapeDtypeStruct((*leading, T + 1), jnp.uint16, sharding=sharding)
