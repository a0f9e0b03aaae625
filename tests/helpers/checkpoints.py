"""A tiny training and its saves."""

import jax

from helpers.trees import TINY
from jaxgpt.config.fields import OptimizerConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.training.build import Training, build_training


def build() -> Training:
    return build_training(
        TINY,
        OptimizerConfig(warmup_iters=2),
        max_iters=20,
        accumulation=2,
        dtype="float32",
        seed=0,
        device=jax.devices("cpu")[0],
    )


def save(checkpoints: Checkpoints, state, val_loss: float | None = None, **notes) -> None:
    """Begin and finish at once, as a run does between its evaluations."""
    checkpoints.begin(state, **{"config": {}, "data": {}, **notes})
    checkpoints.finish(val_loss)
