"""A tiny training and its saves, and checkpoints without arrays."""

import dataclasses
from pathlib import Path

import jax

from helpers.trees import TINY
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.run.checkpoint import Checkpoints
from jaxgpt.run.integrity import Manifest, checksum_files, write_manifest
from jaxgpt.training.build import Training, build_training


def build(dtype: str = "float32", dropout: float = 0.0) -> Training:
    return build_training(
        dataclasses.replace(TINY, dropout=dropout),
        OptimizerConfig(warmup_iters=2),
        max_iters=20,
        accumulation=2,
        dtype=dtype,
        seed=0,
        device=jax.devices("cpu")[0],
    )


def save(checkpoints: Checkpoints, state, val_loss: float | None = None, **notes) -> None:
    """Begin and finish at once, as a run does between its evaluations."""
    checkpoints.begin(state, **{"config": {}, "data": {}, **notes})
    checkpoints.finish(val_loss)


def sign(folder: Path, val_loss: float | None = None, step: int | None = None, **config) -> None:
    """Make a finished checkpoint of the files in `folder`; older ones do not know their step."""
    notes = {"config": config, "data": {}, "arrays": {}, "made_with": {}}
    files = checksum_files(folder)
    write_manifest(folder, Manifest(**notes, val_loss=val_loss, files=files, step=step))
