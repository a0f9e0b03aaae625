"""From a configuration to the compiled functions of a run, for whichever command needs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxgpt.config import ModelConfig, OptimizerConfig, Remat
from jaxgpt.hardware.device import compute_capability
from jaxgpt.model.attention import pick_attention
from jaxgpt.model.gpt import build_gpt, init_params
from jaxgpt.training.optim import make_optimizer, make_schedule
from jaxgpt.training.step import (
    EvalStep,
    TrainState,
    TrainStep,
    init_state,
    make_eval_step,
    make_train_step,
)

# The latency-hiding scheduler overlaps collectives, of which one GPU has none, and to that end
# moves recomputation forward again, so that memory saved by it is spent after all.
GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": False}


class Training(NamedTuple):
    """What a run computes; each function is jitted for one device."""

    graphdef: nnx.GraphDef
    attention: str  # which kernel was chosen, and why
    init: Callable[[], TrainState]  # the state before the first step
    state_like: TrainState  # its shapes, dtypes and shardings
    train_step: TrainStep  # donates its state
    eval_step: EvalStep


def build_training(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    max_iters: int,
    accumulation: int,
    dtype: str,
    remat: Remat,
    seed: int,
    device: Any,
    skip_spikes: float = 0.0,
) -> Training:
    """Build everything that is compiled; nothing is computed or allocated yet."""
    attend, attention = pick_attention(
        device.platform, compute_capability(device), dtype, model.n_embd // model.n_head
    )
    graphdef = build_gpt(model, dtype, attend, remat)
    schedule = make_schedule(optimizer, max_iters)
    multi_steps = make_optimizer(optimizer, schedule, accumulation)
    options = GPU_OPTIONS if device.platform == "gpu" else None

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
            make_train_step(graphdef, multi_steps, schedule, skip_spikes),
            donate_argnums=0,
            compiler_options=options,
        ),
        eval_step=jax.jit(make_eval_step(graphdef), compiler_options=options),
    )
