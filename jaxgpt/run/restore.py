"""Reading checkpoints back, the whole state or the parameters only, through Orbax.

Orbax casts from one dtype to another and loads flipped bits without an error, so everything is
checked first. For a tree that does not fit it raises a dozen kinds of exceptions, which become one.
"""

import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import PyTreeCheckpointHandler, RestoreArgs
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.args import PyTreeRestore

from jaxgpt.errors import UserError, device_is_full, first_line
from jaxgpt.model.blocks import Params
from jaxgpt.run import retention
from jaxgpt.run.checkpoint_state import (
    array_specs,
    differences,
    from_stored,
    to_stored,
    with_loss_scale_as,
)
from jaxgpt.run.integrity import DamagedError, Manifest
from jaxgpt.run.orbax_path import orbax_path
from jaxgpt.run.processes import is_lost_connection
from jaxgpt.training.step import TrainState

# Orbax logs each phase of a save, and a failed one with a thousand lines of tracebacks; we report
# what a user has to know.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def _without_failed_saves(unraisable: Any) -> None:
    # After a failed save TensorStore still reports to Orbax's event loop, which has ended.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = _without_failed_saves


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names it and the remedy."""


def load_state(folder: Path, path: Path, manifest: Manifest, like: TrainState) -> TrainState:
    """Read a verified checkpoint into the shapes, dtypes and shardings of `like`.

    `path` leads to `folder`, and Orbax takes it literally.

    Raises:
        CheckpointError: if it does not fit `like`, or Orbax cannot read it.
    """
    target = to_stored(with_loss_scale_as(manifest.arrays, like))
    if differing := differences(manifest.arrays, array_specs(target)):
        raise CheckpointError(
            f"checkpoint {folder} is of another model; if the run's config.json was edited, delete "
            f"it: the run then takes its configuration from the checkpoint\n{differing}"
        )
    try:
        stored = ocp.load_checkpointables(path, {"state": target})["state"]
    except Exception as error:
        if _is_out_of_memory(error) or is_lost_connection(error):
            raise
        raise _unreadable(folder, _other_versions(manifest, error)) from error
    return from_stored(stored, like)


def load_params(out_dir: Path, step: int, like: Params) -> Params:
    """The parameters of a verified checkpoint, in the shapes and shardings of `like`.

    Reads only them and writes nothing, so a run may be training in the same folder.

    Raises:
        CheckpointError: if the checkpoint cannot be read or does not fit `like`.
    """
    folder = (out_dir / retention.FOLDER / str(step)).absolute()
    try:
        with orbax_path(folder.parent) as path:
            params = _load_part(path / folder.name, {"params": like})["params"]
        return jax.tree.map(_check_shape, params, like)
    except Exception as error:  # see the top of the file
        if _is_out_of_memory(error):
            raise
        why = f"cannot be read ({reason_of(error)}); choose another with --checkpoint, or check "
        why += "that the config.json beside it is the run's own"
        raise _unreadable(folder, why) from error


def check_arrays(folder: Path, arrays: Mapping[str, str]) -> None:
    """Raises DamagedError unless a checkpoint has these arrays: dtype and shape by path.

    An error of Orbax's, which cannot read the checkpoint at all, is raised as it is.
    """
    found = array_specs(ocp.checkpointables_metadata(folder).metadata.get("state", {}))
    # A key is stored as integers.
    keys = {name: found.get(name, "") for name in arrays if arrays[name].startswith("key<")}
    if differing := differences(found, {**arrays, **keys}):
        raise DamagedError(f"{folder} holds other arrays than its manifest says: {differing}")


def check_readable(folder: Path, manifest: Manifest) -> None:
    """`check_arrays` for a finished checkpoint, and its step, which older manifests do not name.

    Raises:
        CheckpointError: if Orbax cannot read it.
    """
    try:
        check_arrays(folder, manifest.arrays)
        if jax.process_index() == 0:  # which decides for all
            _check_step(folder)
    except (UserError, OSError):
        raise
    except Exception as error:  # see the top of the file
        if _is_out_of_memory(error):
            raise
        raise _unreadable(folder, _other_versions(manifest, error)) from error


def _check_step(folder: Path) -> None:
    # The older interface waits for no other process, as `ocp` would.
    as_int = PyTreeRestore({"step": 0}, {"step": RestoreArgs(int)}, partial_restore=True)
    step = PyTreeCheckpointHandler().restore(folder / "state", args=as_int)["step"]
    if step != int(folder.name):
        raise DamagedError(f"checkpoint {folder} holds step {step:,}; rename or delete the folder")


def _load_part(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(folder, {"state": like})["state"]


def _unreadable(folder: Path, why: str) -> CheckpointError:
    if not folder.exists():  # by now
        why = "has been deleted since this command started; run it again"
    return CheckpointError(f"checkpoint {folder} {why}")


def _other_versions(manifest: Manifest, error: Exception) -> str:
    """The reason for a checkpoint whose files are as they were written, but Orbax fails."""
    made_with = ", ".join(f"{name} {version}" for name, version in manifest.made_with.items())
    return (
        f"is intact, but cannot be read ({reason_of(error)}); it was written with {made_with}: "
        "install these versions"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host is full, which does not make the checkpoint damaged."""
    return isinstance(error, MemoryError) or device_is_full(error)


def _check_shape(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    # Orbax returns the target's leaf for an array that it did not find.
    if not isinstance(leaf, jax.Array) or leaf.shape != like.shape:
        raise ValueError(f"a parameter of shape {like.shape} is missing")
    return leaf


def reason_of(error: BaseException) -> str:
    """The reason a file system gives in the first line of Orbax's error, without error codes."""
    line = first_line(error, 4000)
    by_the_system = re.search(r"([^:]+?) \[os_error_code", line)
    return by_the_system[1].strip() if by_the_system else line[:400]
