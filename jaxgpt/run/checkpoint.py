"""Checkpoints of a run, through Orbax: saved in the background, verified, bit-exact.

Orbax writes and reads one folder of arrays; `retention.py` decides which folders count, and
`integrity.py` whether they are intact. A save that is under way when the process ends is lost
without an error, so every way out of a run goes through `close`. Orbax's V1 interface is still
marked experimental, so it is used only here and in `restore.py`.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jax
from orbax.checkpoint import v1 as ocp

from jaxgpt.files import LockedError
from jaxgpt.run import integrity, restore, retention
from jaxgpt.run.checkpoint_state import all_finite, manifest_notes, not_finite_message, to_stored
from jaxgpt.run.integrity import DamagedError, Manifest, checksum_files, write_manifest
from jaxgpt.run.orbax_path import orbax_path
from jaxgpt.run.processes import SINGLE_PROCESS, Processes
from jaxgpt.run.restore import CheckpointError, load_state, reason_of
from jaxgpt.training.step import TrainState


class _Save(NamedTuple):
    """A save under way."""

    step: int
    val_loss: Future[float | None]  # set when the evaluation has ended
    done: Future[None]


class Checkpoints:
    """The checkpoints of one run, in `<out_dir>/checkpoints/<step>/`.

    The newest `keep` and the best by validation loss are kept, by two rules, so that the best never
    displaces the newest. After a failed save training continues with the older checkpoints, and
    `on_error` is called with a message. `renew_lock` is called before each save; its LockedError
    ends the run.

    Each of several `processes` writes the shards on its devices; only the main one verifies, writes
    manifests and deletes. All must call the same methods in the same order.
    """

    def __init__(
        self,
        out_dir: Path,
        keep: int,
        on_error: Callable[[str], object] = warnings.warn,
        processes: Processes = SINGLE_PROCESS,
        renew_lock: Callable[[], object] = lambda: None,
    ):
        self.folder = (out_dir / retention.FOLDER).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be created ({error.strerror}); choose another --out-dir"
            ) from None
        self._stack = ExitStack()
        self._path = self._stack.enter_context(orbax_path(self.folder, processes.count))
        self._keep, self._on_error, self.processes = keep, on_error, processes
        self._renew_lock = renew_lock
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._run = uuid4().hex  # of a new run; `recover` takes an older one's
        self._saving: _Save | None = None
        self._failure: str | None = None  # of the newest save, if it failed
        self._verified: dict[Path, Manifest] = {}
        self._begun = time.monotonic()  # of the newest save, or of the run
        self._seconds = 0.0  # the time that the newest save took

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        if self.processes.count > 1:  # `close` would wait for processes that may never call it
            return
        with suppress(Exception):  # the error that ended the run matters more
            self.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint, or None."""
        steps = retention.finished_steps(self.folder)
        return steps[-1] if steps else None

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the best checkpoint, or None before the first evaluation."""
        return retention.best_step(self.folder)

    def recover(
        self,
        warn: Callable[[str], object],
        strict: bool = False,
        check_config: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> int | None:
        """The step to resume from, None for a new run; needs the run's lock.

        Deletes the leftovers of killed saves. Damaged checkpoints are renamed, with a call of
        `warn` for each; with `strict`, the newest must be intact. One whose configuration
        `check_config` refuses counts as damaged if an older one passes.

        Raises:
            UserError: if there are checkpoints and none can be resumed from.
        """
        step = None
        try:
            with self.processes.fail_together():
                if self.processes.is_main:
                    retention.remove_unfinished(self.folder)
                    retention.refuse_other_runs(self.folder)
                    step = retention.newest_intact(
                        self.folder, lambda at: check_config(self._verify(at).config), warn, strict
                    )
            if step is not None:
                self._run = self.manifest(step).run or self._run
            return self.processes.broadcast_from_main(step)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be cleaned up ({error}); check who owns the files in it"
            ) from None

    def begin(
        self, state: TrainState, *, config: Mapping[str, Any], data: Mapping[str, Any]
    ) -> None:
        """Begin to save `state`, whose arrays may be donated as soon as this returns.

        Waits for the save before it. The new one becomes a checkpoint after `finish`.

        Raises:
            CheckpointError: if `state` has a number that is not finite, or a save failed and there
                is no checkpoint at all.
            LockedError: if another process has taken the run's folder.
        """
        self.settle()
        step = int(state.step)
        latest = None
        with suppress(OSError):  # the save will fail, and say so
            latest = self.latest_step if self.processes.is_main else None
        if step == self.processes.broadcast_from_main(latest):
            return
        stored = to_stored(state)
        if not all_finite(stored):
            raise CheckpointError(not_finite_message(step, self.folder, self.latest_step))
        self._begun = time.monotonic()
        notes = manifest_notes(stored, config, data)
        val_loss: Future[float | None] = Future()
        done: Future[None] = Future()
        try:
            with self.processes.fail_together():
                # The user may have deleted it, and another run may have taken it.
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.processes.is_main:
                    self._renew_lock()
                    retention.remove_leftovers(self.folder)
                size = sum(x.nbytes for x in jax.tree.leaves(stored))
                retention.check_writable(self.folder, size)
            written = ocp.save_checkpointables_async(self._path / str(step), {"state": stored})
        except LockedError:
            raise
        except Exception as error:
            self._remove_failed(step)
            done.set_exception(error)
        else:
            done = self._thread.submit(self._write, written, step, notes, val_loss)
        self._saving = _Save(step, val_loss, done)

    def finish(self, val_loss: float | None = None) -> None:
        """Let the save under way become a checkpoint; a loss that is not finite counts as None."""
        if self._saving is not None:
            self._saving.val_loss.set_result(val_loss)

    def settle(self, report: bool = True) -> None:
        """Wait until the newest save is on disk or has failed; with `report`, call `on_error`."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        assert saving.val_loss.done(), "call finish first"
        error = saving.done.exception()
        if self.processes.any_process(error is not None):
            error = error or OSError("another process of the run could not write its part")
        self._failure = None
        if error is not None:
            self._note_failure(saving.step, error, report)

    def poll(self) -> None:
        """Report a save that has failed by now; costs next to nothing."""
        # Several processes would need a collective to know that it is done on all of them.
        if self.processes.count > 1 or self._saving is None:
            return
        if self._saving.done.done():
            self.settle()

    def manifest(self, step: int) -> Manifest:
        """What is known of a checkpoint that `recover` has verified; raises DamagedError."""
        return self._verify(self.folder / str(step))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Read a checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
            CheckpointError: if there is no such step, it is damaged, or it does not fit `like`.
        """
        try:
            manifest = self.manifest(step)
        except DamagedError as error:
            raise CheckpointError(f"checkpoint {step} is missing or damaged: {error}") from None
        return load_state(self.folder / str(step), self._path / str(step), manifest, like)

    def due(self, minutes: float) -> bool:
        """Whether to begin a save now, to have it on disk `minutes` after the last one began.

        It is expected to take as long as the last one, but never begins before half of `minutes`.
        """
        lead = min(self._seconds, 30 * minutes)
        return time.monotonic() - self._begun >= 60 * minutes - lead

    def wait(self) -> None:
        """Wait until the newest save is on disk; raises CheckpointError if it failed."""
        self.settle(report=False)
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}; then run the same command again to resume")

    def close(self) -> None:
        """Wait for the save under way and end its thread.

        A save without `finish`, because the evaluation failed, is deleted.
        """
        if self._saving is not None:
            self._saving.val_loss.cancel()
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stack.close()

    def _verify(self, folder: Path) -> Manifest:
        if folder not in self._verified:  # it takes long
            check = integrity.verify if self.processes.is_main else integrity.read_manifest
            manifest = check(folder)
            restore.check_readable(self._path / folder.name, manifest)
            self._verified[folder] = manifest
        return self._verified[folder]

    def _write(
        self, written: Any, step: int, notes: Mapping[str, Any], val_loss: Future[float | None]
    ) -> None:
        """On the thread: check what Orbax has written, add the manifest, and prune."""
        folder = self.folder / str(step)
        try:
            written.result()  # after all processes have written
            if not self.processes.is_main:
                return
            restore.check_arrays(self._path / str(step), notes["arrays"])
            files = checksum_files(folder)
            self._seconds = time.monotonic() - self._begun
            loss = _finite(val_loss.result())
            manifest = Manifest(**notes, step=step, run=self._run, val_loss=loss, files=files)
            write_manifest(folder, manifest)
        except BaseException:
            self._remove_failed(step)
            raise
        try:
            retention.prune(self.folder, self._keep)
        except OSError as error:
            self._on_error(f"an old checkpoint cannot be deleted: {error}")

    def _remove_failed(self, step: int) -> None:
        if self.processes.is_main:
            retention.remove_failed(self.folder, step)

    def _note_failure(self, step: int, error: BaseException, report: bool) -> None:
        latest = self.latest_step
        kept = "there is no earlier one" if latest is None else f"checkpoint {latest} is kept"
        self._failure = (
            f"step {step:,} could not be saved in {self.folder} ({reason_of(error)}); {kept}; "
            "check that the disk has space and is writable"
        )
        if latest is None:  # without any checkpoint, training would be in vain
            raise CheckpointError(f"{self._failure}, or choose another --out-dir")
        if report:
            self._on_error(f"{self._failure}; training continues, and saves again when it is due")


def _finite(val_loss: float | None) -> float | None:
    return val_loss if val_loss is not None and math.isfinite(val_loss) else None
