"""Checkpoints of a run, through Orbax: saved in the background, checked, exact.

Orbax's part is to write and read one folder of arrays; which folders count is `retention.py`'s
matter, and whether they are what was written `integrity.py`'s. What is still being saved when a
process ends is lost, with exit code 0: every path out of a run goes through `close`. Orbax's V1
interface is still marked experimental, so it is used here and in `loading.py` only.
"""

import contextlib
import logging
import math
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

from jaxgpt.run import retention
from jaxgpt.run.checkpoint_state import all_finite, describe, to_store
from jaxgpt.run.integrity import (
    DamagedError,
    measure,
    read_manifest,
    verify,
    write_manifest,
)
from jaxgpt.run.orbax_path import OrbaxPath
from jaxgpt.run.processes import ALONE, Processes
from jaxgpt.run.restore import CheckpointError, Restored, load_state, reason_of
from jaxgpt.training.step import TrainState

# Orbax logs each phase of a save, and a failing one with a thousand lines of tracebacks; what a
# user has to know, the run says itself.
logging.getLogger("absl").setLevel(logging.CRITICAL)
MADE_WITH = ("jax", "flax", "optax", "orbax-checkpoint")


class _Save(NamedTuple):
    """One that has begun and has not been settled."""

    step: int
    val_loss: Future[float | None]  # known when the evaluation has ended
    done: Future[None]


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
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be made ({error.strerror}); choose another --out-dir"
            ) from None
        self._orbax = OrbaxPath(self.folder, processes.count)
        self._keep, self._on_error, self.processes = keep, on_error, processes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: _Save | None = None
        self._failure: str | None = None  # of the newest save, if it failed
        self._sound: dict[Path, dict[str, Any]] = {}  # manifests of what has been verified
        self._begun = time.monotonic()  # the newest save, or the run
        self._seconds = 0.0  # that the newest save took

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        if self.processes.count > 1:  # the others wait elsewhere, and the path is the folder's own
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
            if self.processes.is_main:
                retention.remove_unfinished(self.folder)
                step = retention.newest_sound(self.folder, self._verified, tell, strict)
            return self.processes.from_main(step)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be cleaned up ({error}); see who else owns what is in it"
            ) from None

    def begin(
        self, state: TrainState, *, config: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        """Begin to save `state`, whose arrays may be donated as soon as this returns.

        It is a checkpoint after `finish`, and is written meanwhile. Waits for the save before it.

        Raises:
            CheckpointError: if `state` holds a number that is not finite, or a save failed and
                there is no checkpoint at all.
        """
        self.settle()
        step = int(state.step)
        if step == self.processes.from_main(self.latest_step):
            return
        stored = to_store(state)
        if not all_finite(stored):
            raise CheckpointError(self._not_finite(step))
        self._begun = time.monotonic()
        notes = _notes(stored, config, data)
        val_loss: Future[float | None] = Future()
        done: Future[None] = Future()
        try:
            with self.processes.together():
                # Whoever has deleted it has not deleted what is in memory.
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.processes.is_main:
                    retention.clear(self.folder)
                retention.check_room(self.folder, sum(x.nbytes for x in jax.tree.leaves(stored)))
            written = ocp.save_checkpointables_async(
                self._orbax.path / str(step), {"state": stored}
            )
        except Exception as error:
            self._give_room_back(step)
            done.set_exception(error)
        else:
            done = self._thread.submit(self._write, written, step, notes, val_loss)
        self._saving = _Save(step, val_loss, done)

    def finish(self, val_loss: float | None = None) -> None:
        """Let the save that has begun become a checkpoint; a loss that is not finite is none."""
        if self._saving is not None:
            self._saving.val_loss.set_result(val_loss)

    def settle(self, tell: bool = True) -> None:
        """Return when the newest save is on disk or has failed; `on_error` is told, if `tell`."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        assert saving.val_loss.done(), "finish what has begun"
        error = saving.done.exception()
        if self.processes.any(error is not None):
            error = error or OSError("another process of the run could not write its part")
        self._failure = None
        if error is not None:
            self._report(saving.step, error, tell)

    def poll(self) -> None:
        """Tell of a save that has failed since it was started; costs next to nothing."""
        # Several processes cannot know that it is done on all without asking.
        if self.processes.count > 1 or self._saving is None:
            return
        if self._saving.done.done():
            self.settle()

    def restore(self, step: int, like: TrainState) -> Restored:
        """Read a checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: if there is no such step, it is damaged, or it does not fit `like`.
        """
        folder = self.folder / str(step)
        try:
            manifest = self._verified(folder)
        except DamagedError as error:
            raise CheckpointError(f"checkpoint {step} is missing or damaged: {error}") from None
        return load_state(folder, manifest, like)

    def due(self, minutes: float) -> bool:
        """Whether to begin a save now, for it to be on disk `minutes` after the last one began.

        It takes as long as the last one, but is never begun before half of that time.
        """
        lead = min(self._seconds, 30 * minutes)
        return time.monotonic() - self._begun >= 60 * minutes - lead

    def wait(self) -> None:
        """Return when the newest save is on disk; CheckpointError if it is not."""
        self.settle(tell=False)
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}; then give the same command again")

    def close(self) -> None:
        """Wait for the save under way, and let go of the thread that writes it.

        One that has begun and was not finished, because the evaluation failed, is taken back.
        """
        if self._saving is not None:
            self._saving.val_loss.cancel()
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _verified(self, folder: Path) -> dict[str, Any]:
        if folder not in self._sound:
            # Once is enough, and takes long.
            self._sound[folder] = (verify if self.processes.is_main else read_manifest)(folder)
        return self._sound[folder]

    def _write(
        self, written: Any, step: int, notes: Mapping[str, Any], val_loss: Future[float | None]
    ) -> None:
        """On the thread: what makes a commit of Orbax's a checkpoint that can be relied upon."""
        folder = self.folder / str(step)
        try:
            written.result()  # of several processes when all have written
            if not self.processes.is_main:
                return
            check_readable(self._orbax.path / str(step), len(notes["arrays"]))
            files = measure(folder)
            self._seconds = time.monotonic() - self._begun
            write_manifest(folder, {**notes, "val_loss": _finite(val_loss.result())}, files)
        except BaseException:
            self._give_room_back(step)
            raise
        try:
            retention.prune(self.folder, self._keep)
        except OSError as error:
            self._on_error(f"an old checkpoint cannot be deleted: {error}")

    def _give_room_back(self, step: int) -> None:
        """Delete what was written of a save that failed: it holds the room that is missing."""
        if not self.processes.is_main:
            return
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{step}*"):
                if path.name.partition(".")[0] == str(step) and path.suffix != ".damaged":
                    retention.remove(path)

    def _report(self, step: int, error: BaseException, tell: bool) -> None:
        latest = self.latest_step
        stays = "there is none before it" if latest is None else f"checkpoint {latest} stays"
        self._failure = (
            f"step {step:,} could not be saved in {self.folder} ({reason_of(error)}); {stays}; "
            "make room there"
        )
        if latest is None:  # nothing is lost yet, and a run that cannot save is not worth its time
            raise CheckpointError(f"{self._failure}, or choose another --out-dir")
        if tell:
            self._on_error(f"{self._failure}: training goes on, and saves again when it is due")

    def _not_finite(self, step: int) -> str:
        latest = self.latest_step
        if latest is None:
            return (
                f"the parameters of step {step:,} are not finite, so nothing can be trained from "
                "them; see where the weights of --init-from come from"
            )
        return (
            f"the parameters or the optimizer's moments of step {step:,} are not finite, so they "
            f"are not saved; checkpoint {latest} in {self.folder} stays: go on from it with a "
            "smaller --learning-rate, or with --grad-clip 1 if that was off"
        )


def check_readable(folder: Path, arrays: int) -> None:
    """Raises OSError unless Orbax finds all `arrays` of the checkpoint that it has just written."""
    found = ocp.checkpointables_metadata(folder).metadata.get("state")
    if found is None or len(jax.tree.leaves(found)) != arrays:
        raise OSError(f"Orbax wrote {folder}, but cannot read it back")


def _notes(
    stored: Mapping[str, Any], config: Mapping[str, Any], data: Mapping[str, Any]
) -> dict[str, Any]:
    """What can be known of a checkpoint without reading its arrays."""
    return {
        "config": dict(config),
        "data": dict(data),
        "arrays": describe(stored),
        "made_with": {name: version(name) for name in MADE_WITH},
    }


def _finite(val_loss: float | None) -> float | None:
    return val_loss if val_loss is not None and math.isfinite(val_loss) else None
