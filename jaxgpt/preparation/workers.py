"""The parent's loop: work units out to processes, finished ones into shards, progress on screen."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.preparation.assemble import Assembler
from jaxgpt.preparation.inputs import Input, Unit
from jaxgpt.preparation.journal import Record
from jaxgpt.preparation.plan import Plan
from jaxgpt.preparation.progress import PreparationConsole
from jaxgpt.preparation.tokenize import Job, Progress, run_job, start_worker

# Units begun beyond the first unfinished one, for each worker: their tokens wait on disk.
AHEAD = 3

Locate = Callable[[Input], Path | None]  # where an input can be read, None while it is on its way


@contextmanager
def worker_pool(workers: int, tokenizer: str, progress: Progress) -> Iterator[ProcessPoolExecutor]:
    """Processes that are started afresh: a fork of a process that runs JAX can hang.

    On leaving, in whatever way, they are killed at what they do, which is no file yet.
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
    """Hold Ctrl-C back; processes that are started in here never hear of it.

    It reaches every process of a terminal, and the parent alone decides what becomes of it. A
    worker that were to ignore it by itself could not while it still imports.
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
    """Do the units that are still to be done and cut shards until none remains to be cut.

    `release` is told of each input that is not needed any more. Raises UserError.
    """
    units = plan.units()
    context = multiprocessing.get_context("spawn")
    progress = Progress.make(context)
    assembler.cut()
    pending = assembler.pending_units()
    if assembler.finished:
        return
    uses = _uses(units, pending)
    running: dict[Future[Record], int] = {}
    with worker_pool(min(workers, len(pending)), plan.settings.tokenizer, progress) as pool:
        while not assembler.finished:
            begun = set(running.values())
            pending = [k for k in assembler.pending_units() if k not in begun]
            note = ""
            while pending and len(running) <= workers and _near(pending[0], running, workers):
                job = _job(pending[0], units, plan, work, locate)
                if job is None:
                    note = "waiting for a download"
                    break
                with _without_ctrl_c():
                    running[pool.submit(run_job, job)] = pending.pop(0)
            for future in _wait(running):
                number = running.pop(future)
                assembler.add(_result(future))
                for item in _no_longer_used(units[number], uses):
                    release(item)
            assembler.cut()
            done = console.done_before + progress.bytes.value
            console.update(done, progress.tokens.value, progress.documents.value, note)


def _near(number: int, running: dict[Future[Record], int], workers: int) -> bool:
    """Whether a unit is close enough behind the first unfinished one."""
    return number - min([*running.values(), number]) <= AHEAD * workers


def _wait(running: dict[Future[Record], int]) -> set[Future[Record]]:
    if not running:
        time.sleep(0.1)  # nothing can be done until a download has arrived
        return set()
    return wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done


def _result(future: Future[Record]) -> Record:
    try:
        return future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely because memory ran out; run the same command "
            "again with fewer --workers: it goes on from here"
        ) from None


def _job(number: int, units: list[Unit], plan: Plan, work: Path, locate: Locate) -> Job | None:
    """A unit with the places where its inputs can be read; None while one is on its way."""
    paths = [locate(slice.input) for slice in units[number]]  # all, to have all fetched
    if None in paths:
        return None
    located = (s._replace(path=str(path)) for s, path in zip(units[number], paths, strict=True))
    s = plan.settings
    return Job(number, tuple(located), s.options, s.val_fraction, work / "parts")


def _uses(units: list[Unit], pending: list[int]) -> dict[str, int]:
    """How many of the units that are to be done read each input."""
    uses: dict[str, int] = {}
    for number in pending:
        for path in {slice.input.path for slice in units[number]}:
            uses[path] = uses.get(path, 0) + 1
    return uses


def _no_longer_used(unit: Unit, uses: dict[str, int]) -> list[Input]:
    inputs = {slice.input.path: slice.input for slice in unit}
    for path in inputs:
        uses[path] -= 1
    return [item for path, item in inputs.items() if uses[path] == 0]
