"""A tiny training and its saves, and checkpoints without arrays."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

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


def take_steps(training: Training, state, steps: int):
    """The state after some steps on the same batch."""
    tokens = np.random.default_rng(0).integers(0, 50, (2, 3, 9)).astype(np.uint16)
    for _ in range(steps):
        state, _ = training.train_step(state, tokens)
    return state


def steps_on_disk(out_dir: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder."""
    return sorted(int(p.name) for p in (out_dir / "checkpoints").iterdir() if p.name.isdigit())


def sign(folder: Path, val_loss: float | None = None, step: int | None = None, **config) -> None:
    """Make a finished checkpoint of the files in `folder`; older ones do not know their step."""
    notes = {"config": config, "data": {}, "arrays": {}, "made_with": {}}
    files = checksum_files(folder)
    write_manifest(folder, Manifest(**notes, val_loss=val_loss, files=files, step=step))
