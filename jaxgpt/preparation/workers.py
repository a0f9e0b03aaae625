"""Worker processes that tokenize units, behind the interface of `concurrent.futures.Executor`.

Only the parent writes shards and journals. A killed worker costs its unit and nothing else.
"""

import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import DECODE_ERRORS, UserError, first_line
from jaxgpt.files import sha256_of
from jaxgpt.preparation.archives import archive_of
from jaxgpt.preparation.tokenize import Job, tokenize_unit
from jaxgpt.preparation.work_files import Record

T = TypeVar("T")

# Units per worker that may be started ahead of the first unfinished one; their tokens are on disk.
AHEAD = 3
FILES_PER_WORKER = 16  # open in the parent for each: pipes and the handle of the process


class DeadWorkerError(Exception):
    """A worker ended while it ran a call, which can be submitted again."""


class Engine(Protocol):
    """What runs units: worker processes here (`Pool`) or on a cluster (`cluster.py`)."""

    tries: int  # submit a call this often if its worker dies
    waiting: float  # queued calls per worker, so that it need not wait for the next one

    def submit(self, fn: Callable[..., T], /, *args: Any) -> Future[T]:
        """As of any Executor; `fn` and `args` are pickled."""

    def result(self, future: Future[T]) -> T:
        """The result of a call that is done; raises its exception, or DeadWorkerError."""

    def workers(self) -> int:
        """The number of calls that run at a time; may change on a cluster."""


class Pool(Executor):
    """Processes on this machine. Each is a pool of its own: if one is killed, the others go on.

    On exit the processes are killed; the file that one is writing does not have its name yet.
    """

    tries, waiting = 2, 0.0

    def __init__(self, workers: int):
        self._workers = workers
        self._others = set(multiprocessing.active_children())
        self._pools: dict[ProcessPoolExecutor, Future[Any] | None] = {}  # with its last call
        _allow_open_files(FILES_PER_WORKER * workers)
        # Now, because its start unblocks SIGINT, which must stay blocked while a worker starts.
        resource_tracker.ensure_running()

    def workers(self) -> int:
        return self._workers

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run a call in a free worker; the caller ensures that there is one."""
        pool = next((p for p, last in self._pools.items() if last is None or last.done()), None)
        with _without_ctrl_c():
            while True:
                pool = pool or self._start_process()
                try:
                    self._pools[pool] = future = pool.submit(fn, *args, **kwargs)
                    return future
                except BrokenProcessPool:  # killed at its last call, or since
                    del self._pools[pool]
                    pool = None

    def result(self, future: Future[T]) -> T:
        try:
            return future.result()
        except BrokenProcessPool:
            raise DeadWorkerError from None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Kill all workers."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.kill()
        for pool in self._pools:
            pool.shutdown(wait, cancel_futures=cancel_futures)

    def _start_process(self) -> ProcessPoolExecutor:
        assert len(self._pools) < self._workers, "no worker is free"
        pool = ProcessPoolExecutor(
            1,
            # A new process: a fork of one that runs JAX can hang.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=end_with_parent,
        )
        self._pools[pool] = None
        return pool


def _allow_open_files(n: int) -> None:
    """Raise the limit on open files, 1,024 on most systems, by `n` where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + n if hard == resource.RLIM_INFINITY else min(soft + n, hard)
    if soft != resource.RLIM_INFINITY:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Block SIGINT; processes that are started in here inherit that.

    Ctrl-C reaches every process of a terminal, and only the parent must react to it. A worker
    could not ignore it while it is still importing. Another thread of the parent may receive it:
    its Python handlers run afterwards, so that they cannot interrupt the start of a worker.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with _handlers_afterwards():
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers_afterwards() -> Iterator[None]:
    """Run Python's signal handlers after the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python runs no handlers
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    called = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in called:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in called.items():
            signal.signal(number, handler)
    if received:
        called[signal.Signals(received[0])](received[0], None)


def end_with_parent() -> None:
    """In a new process: end it when its parent ends, however that happens."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def run_job(job: Job) -> Record:
    """`tokenize_unit` in a worker; raises UserError."""
    try:
        return tokenize_unit(job, _checked_tokenizer(job))
    except OSError as error:
        raise UserError(
            f"{error.filename or job.folder}: {error.strerror or error}; fix that and run the same "
            "command again"
        ) from None
    except (MemoryError, *DECODE_ERRORS) as error:
        raise UserError(
            f"{job.unit[0].path}: cannot be tokenized ({first_line(error)}), or a file after it in "
            "the same unit; leave it out, or give each worker more memory with fewer --workers"
        ) from None


def _checked_tokenizer(job: Job) -> Tokenizer:
    """The tokenizer; raises UserError if this worker sees other files than the parent does."""
    host, plan = socket.gethostname(), job.folder.with_name("plan.json")
    remedy = "the text and --out must be in folders that all workers share, by the same paths"
    # Also ends what an earlier command left in the queue of a cluster.
    if not plan.exists() or sha256_of(plan) != job.plan_sha256:
        raise UserError(
            f"{plan}: is missing or another file on {host}, where a worker is; {remedy}"
        )
    for slice in job.unit:
        if not os.path.exists(archive_of(slice.path) or slice.path):
            raise UserError(f"{slice.path}: is missing on {host}, where a worker is; {remedy}")
    name, sha256 = job.settings.tokenizer, job.settings.tokenizer_sha256
    tokenizer = _load_once(name, job.folder.parents[1], sha256)
    if tokenizer.sha256 != sha256:
        raise UserError(
            f"tokenizer {name!r}: is another one on {host}; install the same version "
            "of jaxgpt on all workers"
        )
    return tokenizer


@lru_cache(1)
def _load_once(name: str, out: Path, sha256: str) -> Tokenizer:
    del sha256  # in the cache's key: the next command may write another tokenizer to `out`
    return load_tokenizer(name, out)
