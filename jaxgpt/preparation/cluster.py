"""`--cluster`: units run on the workers of a Dask cluster, however that was started.

The workers read the text and write their tokens in folders that they share with this process;
only numbers travel through the scheduler. Dask runs the units of a worker that dies on another one.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from jaxgpt.errors import UserError, first_line
from jaxgpt.preparation.workers import DeadWorkerError

T = TypeVar("T")

CONNECT_SECONDS = 20
INSTALL = "pip install -e '.[cluster]'"


class Cluster:
    """The workers of a Dask cluster. Implements `Engine`; raises UserError without a scheduler."""

    tries = 1  # Dask tries several workers before it gives up a call
    waiting = 0.25

    def __init__(self, address: str, client: Any):
        self._address, self._client = address, client
        self._executor = client.get_executor(pure=False)  # or equal calls would run once

    def workers(self) -> int:
        """The number of threads of all workers."""
        try:
            threads = self._client.nthreads() if self._client.status == "running" else None
        except OSError:
            threads = None
        if threads is None:
            raise self._lost_scheduler()
        return sum(threads.values())

    def submit(self, fn: Callable[..., T], /, *args: Any) -> Future[T]:
        return self._executor.submit(fn, *args)

    def result(self, future: Future[T]) -> T:
        from distributed.scheduler import KilledWorker

        try:
            return future.result()
        except KilledWorker:
            raise DeadWorkerError from None
        except CancelledError:  # of all calls, when the connection breaks
            raise self._lost_scheduler() from None
        except ImportError as error:
            raise UserError(
                f"--cluster {self._address}: a worker cannot run this ({first_line(error)}); "
                "install the same version of jaxgpt on all workers"
            ) from None

    def _lost_scheduler(self) -> UserError:
        return UserError(
            f"--cluster {self._address}: the scheduler is gone; start it and its workers, and run "
            "the same command again to resume: nothing that is finished is lost"
        )

    def close(self) -> None:
        """Cancel what has not begun, and leave the scheduler."""
        with suppress(Exception):  # it may be gone
            self._executor.shutdown(wait=False)
        with suppress(Exception):
            self._client.close(timeout=2)


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The cluster of the scheduler at `address`, as tcp://host:8786; raises UserError."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f"--cluster {address}: needs Dask; install it: {INSTALL}") from None
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("distributed", "tornado")):  # with tracebacks of what we explain
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    reason = None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        reason = first_line(error)
    if reason is not None:
        # Frees the failed client now. If that happened while another client starts, the process
        # would deadlock.
        gc.collect()
        raise UserError(
            f"--cluster {address}: no scheduler answers ({reason}); give the address that `dask "
            "scheduler` prints, as tcp://host:8786"
        )
    cluster = Cluster(address, client)
    try:
        yield cluster
    finally:
        cluster.close()
