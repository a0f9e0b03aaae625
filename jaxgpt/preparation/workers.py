"""Worker processes encode units; the parent's loop hands these out and cuts shards.

Only the parent writes shards and journals. A killed worker costs its unit and nothing else.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.inputs import Input, Unit
from jaxgpt.preparation.journal import Record
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.tokenize import Job, tokenize_unit
from jaxgpt.preparation.work_plan import Plan

# Units per worker that may be started ahead of the first unfinished one; their tokens are on disk.
AHEAD = 3

Locate = Callable[[Input], Path | None]  # where an input can be read, None while it is downloading


class SharedProgress:
    """Totals of documents, tokens and bytes: the workers add to them, the parent reads them."""

    def __init__(self, context: Any):
        self._totals = context.Array("q", 3)

    def add(self, *batch: int) -> None:
        """Add a batch's documents, tokens and bytes."""
        with self._totals.get_lock():
            for i, count in enumerate(batch):
                self._totals[i] += count

    def read(self) -> tuple[int, int, int]:
        """(documents, tokens, bytes)."""
        documents, tokens, size = self._totals[:]
        return documents, tokens, size


@contextmanager
def worker_pool(
    workers: int, tokenizer: str, progress: SharedProgress
) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes: a fork of a process that runs JAX can hang.

    On exit the workers are killed; the file that one is writing does not have its name yet.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(tokenizer, progress),
    )
    try:
        yield pool
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown()


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT; processes that are started in here inherit that.

    Ctrl-C reaches every process of a terminal, and only the parent must react to it. A worker
    could not ignore it while it is still importing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_units(
    assembler: Assembler,
    plan: Plan,
    work: Path,
    workers: int,
    console: PreparationConsole,
    locate: Locate,
    release: Callable[[Input], object],
) -> None:
    """Process the pending units and cut shards until all are written. Raises UserError.

    `release` is called with each input that is no longer needed.
    """
    units = plan.units()
    progress = SharedProgress(multiprocessing.get_context("spawn"))
    assembler.write_complete_shards()
    pending = assembler.pending_units()
    if assembler.finished:
        return
    uses = Counter(path for number in pending for path in _inputs_of(units[number]))
    running: dict[Future[Record], int] = {}
    with worker_pool(min(workers, len(pending)), plan.settings.tokenizer, progress) as pool:
        while not assembler.finished:
            started = set(running.values())
            pending = [k for k in assembler.pending_units() if k not in started]
            note = ""
            while pending and len(running) <= workers and _is_near(pending[0], running, workers):
                job = _locate_job(pending[0], units, plan, work, locate)
                if job is None:
                    note = "waiting for a download"
                    break
                with _without_ctrl_c():
                    running[pool.submit(run_job, job)] = pending.pop(0)
            for future in _wait_for_some(running):
                number = running.pop(future)
                assembler.add(_result(future))
                inputs = _inputs_of(units[number])
                uses.subtract(inputs.keys())
                for path in inputs:
                    if not uses[path]:
                        release(inputs[path])
            assembler.write_complete_shards()
            documents, tokens, size = progress.read()
            console.update(console.done_before + size, tokens, documents, note)


def _is_near(number: int, running: dict[Future[Record], int], workers: int) -> bool:
    """Whether a unit is close enough to the first unfinished one."""
    return number - min([*running.values(), number]) <= AHEAD * workers


def _wait_for_some(running: dict[Future[Record], int]) -> set[Future[Record]]:
    if not running:
        time.sleep(0.1)  # until a download is complete
        return set()
    return wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done


def _result(future: Future[Record]) -> Record:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely because memory ran out; run the same command "
            "again with fewer --workers to resume"
        ) from None


def _locate_job(
    number: int, units: list[Unit], plan: Plan, work: Path, locate: Locate
) -> Job | None:
    """A unit with the paths of its inputs, None while one is downloading."""
    paths = [locate(slice.input) for slice in units[number]]  # of all, to start their downloads
    if None in paths:
        return None
    located = (s._replace(path=str(path)) for s, path in zip(units[number], paths, strict=True))
    s = plan.settings
    return Job(number, tuple(located), s.options, s.val_fraction, work / "parts")


def _inputs_of(unit: Unit) -> dict[str, Input]:
    return {slice.input.path: slice.input for slice in unit}


_worker: list[Any] = []  # in a worker: its tokenizer and progress


def start_worker(tokenizer_name: str, progress: SharedProgress) -> None:
    """Initialize a new process for `run_job`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [load_tokenizer(tokenizer_name), progress]


def run_job(job: Job) -> Record:
    """`tokenize_unit` in a worker; an OSError becomes a UserError."""
    tokenizer, progress = _worker
    try:
        return tokenize_unit(job, tokenizer, progress.add)
    except OSError as error:
        raise UserError(
            f"{error.filename or job.folder}: {error.strerror or error}; fix that and run the same "
            "command again"
        ) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
