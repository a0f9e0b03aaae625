"""Reading checkpoints back, whole or the parameters alone, through Orbax.

Orbax casts from one dtype to another and loads flipped bits without a word, and raises a dozen
kinds of error for what does not fit: everything is checked first, and errors become a sentence.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxgpt.errors import UserError, first_line
from jaxgpt.model.blocks import Params
from jaxgpt.run import retention
from jaxgpt.run.checkpoint_state import abstract, describe, from_stored, misfits, to_store
from jaxgpt.run.integrity import DamagedError, verify
from jaxgpt.run.orbax_path import OrbaxPath
from jaxgpt.training.step import TrainState


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names it and what can be done."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: TrainState
    config: dict[str, Any]  # flat, as `config.flat_values` wrote it
    data: dict[str, Any]  # what the run's data was


def load_state(folder: Path, manifest: dict[str, Any], like: TrainState) -> Restored:
    """Read a checkpoint that was verified into the shapes, dtypes and shardings of `like`.

    Raises:
        CheckpointError: if it does not fit `like`, or Orbax cannot read it.
    """
    target = to_store(abstract(like))
    if differing := misfits(manifest["arrays"], describe(target)):
        raise CheckpointError(
            f"checkpoint {folder} is of another model; if the run's config.json was edited, delete "
            f"it: the one in the checkpoint counts then\n{differing}"
        )
    try:
        with OrbaxPath(folder.parent, jax.process_count()) as orbax:
            stored = ocp.load_checkpointables(orbax.path / folder.name, {"state": target})["state"]
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # the checkpoint is as good as it was
        made_with = ", ".join(f"{name} {v}" for name, v in manifest["made_with"].items())
        raise CheckpointError(
            f"checkpoint {folder} is whole, and yet cannot be read ({reason_of(error)}); it was "
            f"made with {made_with}: try these versions"
        ) from error
    return Restored(from_stored(stored, like), manifest["config"], manifest["data"])


def load_params(out_dir: Path, step: int, like: Params) -> Params:
    """The parameters of a checkpoint alone, in the shapes and shardings of `like`.

    Reads and writes nothing else, so a run may be training in the same folder.

    Raises:
        CheckpointError: if the checkpoint is damaged, cannot be read or does not fit `like`.
    """
    folder = (out_dir / retention.FOLDER / str(step)).absolute()
    try:
        verify(folder)
    except DamagedError as error:
        raise CheckpointError(
            f"checkpoint {step} is damaged: {error}; choose another with --checkpoint"
        ) from None
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context, OrbaxPath(folder.parent) as orbax:
            saved = orbax.path / folder.name
            params = ocp.load_checkpointables(saved, {"state": {"params": like}})
        return jax.tree.map(_fitting, params["state"]["params"], like)
    except Exception as error:  # Orbax raises a dozen kinds for what does not fit
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise CheckpointError(
            f"checkpoint {folder} cannot be read ({reason_of(error)}); choose another with "
            "--checkpoint, or see whether the config.json beside it is the run's own"
        ) from error


def _fitting(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    # Orbax hands back what it did not find as it was asked for.
    if not isinstance(leaf, jax.Array) or leaf.shape != like.shape:
        raise ValueError(f"it has no parameter of shape {like.shape} where there must be one")
    return leaf


def reason_of(error: BaseException) -> str:
    """The end of the first line, where file systems say what is wrong, without their numbers."""
    line = first_line(error, 4000)
    by_the_system = re.search(r"([^:]+?) \[os_error_code", line)
    return by_the_system[1].strip() if by_the_system else line[:400]
