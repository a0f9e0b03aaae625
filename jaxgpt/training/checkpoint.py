"""Checkpoints of a run, through Orbax: saved in the background, checked, exact.

Orbax's part is to write and read one folder of arrays; which folders count is `retention.py`'s
matter, and whether they are what was written `integrity.py`'s. What is still being saved when a
process ends is lost, with exit code 0: every path out of a run goes through `close`. Orbax's V1
interface is still marked experimental, so it is used here only.
"""

import contextlib
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from jaxgpt.errors import UserError
from jaxgpt.model.gpt import Params
from jaxgpt.training import retention
from jaxgpt.training.integrity import DamagedError, read_manifest, verify, write_manifest
from jaxgpt.training.processes import ALONE, Processes
from jaxgpt.training.step import TrainState
from jaxgpt.training.stored import abstract, all_finite, describe, from_stored, misfits, to_store

# Orbax logs each phase of a save, and a failing one with a thousand lines of tracebacks; what a
# user has to know, the run says itself.
logging.getLogger("absl").setLevel(logging.CRITICAL)
MADE_WITH = ("jax", "flax", "optax", "orbax-checkpoint")


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names it and what can be done."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: TrainState
    config: dict[str, Any]  # flat, as `config.flat_values` wrote it
    data: dict[str, Any]  # what the run's data was


class Checkpoints:
    """The checkpoints of one run, in `<out_dir>/checkpoints/<step>/`.

    The newest `keep` are kept by one rule and the best by validation loss by another, so that a
    best checkpoint never pushes out the newest. A save that fails takes nothing with it: training
    goes on, `on_error` is told, and the checkpoints before it stay.

    Of several `processes` each writes what its devices hold; the main one alone verifies, signs
    with a manifest and deletes. All have to call the same methods in the same order.
    """

    def __init__(
        self,
        out_dir: Path,
        keep: int,
        on_error: Callable[[str], object] = warnings.warn,
        processes: Processes = ALONE,
    ):
        self.folder = (out_dir / retention.FOLDER).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            raise CheckpointError(
                f"{self.folder} cannot be made ({fault.strerror}); choose another --out-dir"
            ) from None
        self._keep, self._on_error, self._processes = keep, on_error, processes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._failure: str | None = None  # of the newest save, if it failed
        self._sound: dict[Path, dict[str, Any]] = {}  # manifests of what has been verified
        self._last_save = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        if self._processes.count > 1:  # the others wait elsewhere
            return
        # The error on its way out says more than one about the save it interrupted.
        with contextlib.suppress(Exception):
            self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest step that is whole on disk, or None."""
        steps = retention.finished_steps(self.folder)
        return steps[-1] if steps else None

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the best checkpoint, or None before the first evaluation."""
        return retention.best_step(self.folder)

    def recover(self, tell: Callable[[str], object], strict: bool = False) -> int | None:
        """The step to go on from, None for a new run; needs the run's lock.

        Removes what killed saves left. Damaged checkpoints are named to `tell` and put aside; if
        `strict`, the newest must be sound.

        Raises:
            UserError: if there are checkpoints and none to go on from.
        """
        step = None
        try:
            if self._processes.is_main:
                retention.remove_unfinished(self.folder)
                step = retention.newest_sound(self.folder, self._verified, tell, strict)
            return self._processes.from_main(step)
        except OSError as fault:
            raise CheckpointError(
                f"{self.folder} cannot be cleaned up ({fault}); see who else owns what is in it"
            ) from None

    def save(
        self,
        state: TrainState,
        *,
        config: Mapping[str, Any],
        data: Mapping[str, Any],
        val_loss: float | None,
    ) -> None:
        """Start to save `state`, whose arrays may be donated as soon as this returns.

        Waits for the save before it. A `val_loss` that is not finite is none.

        Raises:
            CheckpointError: if `state` holds a number that is not finite, or a save failed and
                there is no checkpoint at all.
        """
        self._settle()
        step = int(state.step)
        if step == self._processes.from_main(self.latest_step):
            return
        stored = to_store(state)
        if not all_finite(stored):
            raise CheckpointError(self._not_finite(step))
        self._last_save = time.monotonic()
        notes = _notes(stored, config, data, val_loss)
        try:
            with self._processes.together():
                retention.check_room(self.folder, sum(x.nbytes for x in jax.tree.leaves(stored)))
            written = ocp.save_checkpointables_async(self.folder / str(step), {"state": stored})
        except Exception as fault:
            self._give_room_back(step)
            failed: Future[None] = Future()
            failed.set_exception(fault)
            self._saving = step, failed
            return
        self._saving = step, self._thread.submit(self._finish, written, step, notes)

    def poll(self) -> None:
        """Tell of a save that has failed since it was started; costs next to nothing."""
        # Several processes cannot know that it is done on all without asking.
        if self._processes.count == 1 and self._saving is not None and self._saving[1].done():
            self._settle()

    def restore(self, step: int, like: TrainState) -> Restored:
        """Read a checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: if there is no such step, it is damaged, or it does not fit `like`.
        """
        folder = self.folder / str(step)
        try:
            manifest = self._verified(folder)
        except DamagedError as fault:
            raise CheckpointError(f"checkpoint {step} is missing or damaged: {fault}") from None
        target = to_store(abstract(like))
        if differing := misfits(manifest["arrays"], describe(target)):
            raise CheckpointError(f"checkpoint {folder} is of another model:\n{differing}")
        try:
            stored = ocp.load_checkpointables(folder, {"state": target})["state"]
        except Exception as fault:
            if isinstance(fault, MemoryError) or "RESOURCE_EXHAUSTED" in str(fault):
                raise  # the checkpoint is as good as it was
            made_with = ", ".join(f"{name} {v}" for name, v in manifest["made_with"].items())
            raise CheckpointError(
                f"checkpoint {folder} is whole, and yet cannot be read ({_reason(fault)}); it was "
                f"made with {made_with}: try these versions"
            ) from fault
        return Restored(from_stored(stored, like), manifest["config"], manifest["data"])

    def minutes_since_save(self) -> float:
        """Minutes since a save was started, or since the run was opened."""
        return (time.monotonic() - self._last_save) / 60

    def wait(self) -> None:
        """Return when the newest save is on disk; CheckpointError if it is not."""
        self._settle(tell=False)
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}; then give the same command again")

    def close(self) -> None:
        """Wait for the save under way, and let go of the thread that finishes it."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _verified(self, folder: Path) -> dict[str, Any]:
        if folder not in self._sound:
            # Once is enough, and takes long.
            self._sound[folder] = (verify if self._processes.is_main else read_manifest)(folder)
        return self._sound[folder]

    def _finish(self, written: Any, step: int, notes: Mapping[str, Any]) -> None:
        """On the thread: what makes a commit of Orbax's a checkpoint that can be relied upon."""
        try:
            written.result()  # of several processes when all have written
            if not self._processes.is_main:
                return
            write_manifest(self.folder / str(step), notes)
        except BaseException:
            self._give_room_back(step)
            raise
        try:
            retention.prune(self.folder, self._keep)
        except OSError as fault:
            self._on_error(f"an old checkpoint cannot be deleted: {fault}")

    def _give_room_back(self, step: int) -> None:
        """Delete what was written of a save that failed: it holds the room that is missing."""
        if not self._processes.is_main:
            return
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{step}*"):
                if path.name.partition(".")[0] == str(step) and path.suffix != ".damaged":
                    retention.remove(path)

    def _settle(self, tell: bool = True) -> None:
        saving, self._saving = self._saving, None
        if saving is None:
            return
        step, future = saving
        fault = future.exception()
        if self._processes.any(fault is not None):
            fault = fault or OSError("another process of the run could not write its part")
        self._failure = None
        if fault is not None:
            self._report(step, fault, tell)

    def _report(self, step: int, fault: BaseException, tell: bool = True) -> None:
        latest = self.latest_step
        stays = "there is none before it" if latest is None else f"checkpoint {latest} stays"
        self._failure = (
            f"step {step:,} could not be saved in {self.folder} ({_reason(fault)}); {stays}; make "
            "room there"
        )
        if latest is None:  # nothing is lost yet, and a run that cannot save is not worth its time
            raise CheckpointError(f"{self._failure}, or choose another --out-dir")
        if tell:
            self._on_error(f"{self._failure}: training goes on, and saves again when it is due")

    def _not_finite(self, step: int) -> str:
        latest = self.latest_step
        return (
            f"the parameters or the optimizer's moments of step {step:,} are not finite, so they "
            f"are not saved; checkpoint {latest} in {self.folder} stays: go on from it with a "
            "smaller --learning-rate, or with --grad-clip 1 if that was off"
        )


def load_params(out_dir: Path, step: int, like: Params) -> Params:
    """The parameters of a checkpoint alone, in the shapes and shardings of `like`.

    Reads and writes nothing else, so a run may be training in the same folder.

    Raises:
        CheckpointError: if the checkpoint is damaged, cannot be read or does not fit `like`.
    """
    folder = (out_dir / retention.FOLDER / str(step)).absolute()
    try:
        verify(folder)
    except DamagedError as fault:
        raise CheckpointError(
            f"checkpoint {step} is damaged: {fault}; choose another with --checkpoint"
        ) from None
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            params = ocp.load_checkpointables(folder, {"state": {"params": like}})
        return jax.tree.map(_fitting, params["state"]["params"], like)
    except Exception as fault:  # Orbax raises a dozen kinds for what does not fit
        if "RESOURCE_EXHAUSTED" in str(fault):
            raise
        raise CheckpointError(
            f"checkpoint {folder} cannot be read ({_reason(fault)}); choose another with "
            "--checkpoint, or see whether the config.json beside it is the run's own"
        ) from fault


def _fitting(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    # Orbax hands back what it did not find as it was asked for.
    if not isinstance(leaf, jax.Array) or leaf.shape != like.shape:
        raise ValueError(f"it has no parameter of shape {like.shape} where there must be one")
    return leaf


def _notes(
    stored: Mapping[str, Any],
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    val_loss: float | None,
) -> dict[str, Any]:
    """What can be known of a checkpoint without reading its arrays."""
    return {
        "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
        "config": dict(config),
        "data": dict(data),
        "arrays": describe(stored),
        "made_with": {name: version(name) for name in MADE_WITH},
    }


def _reason(fault: BaseException) -> str:
    """The end of the first line, where file systems say what is wrong, without their numbers."""
    line = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
    by_the_system = re.search(r"([^:]+?) \[os_error_code", line)
    return by_the_system[1].strip() if by_the_system else line[:400]
