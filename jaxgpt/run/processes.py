"""Several processes as one run, through `jax.distributed`: connecting them, keeping them in step.

Every process runs the same program. What only one of them knows (a signal, a clock, a full disk)
must be exchanged before it may change what they do, or they wait for each other forever.
"""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config.launchers import Launcher, find_host_rank, find_launcher, share_of_cards
from jaxgpt.errors import UserError, first_line, report_error
from jaxgpt.files import LockedError

# Seconds without a heartbeat after which a process counts as dead, and the others exit.
HEARTBEAT_SECONDS = 30
# How long to wait for all processes to connect, and at the end for all to disconnect.
START_SECONDS, END_SECONDS = 300, 30


class Address(NamedTuple):
    """Where to connect, and as which process, under JAX's names; JAX finds out what is None."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class StepRequests(NamedTuple):
    """What to do after a step, the same in all processes."""

    stop: str | None = None  # the name of a signal
    save: bool = False


class Processes:
    """The processes of a run; a context manager, entered before JAX does anything else.

    Its methods are collectives: every process must call them, in the same order.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.is_main = index == 0  # this one logs, and writes to the run's folder

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        """After an error exit at once: an ordinary exit would wait for all other processes."""
        if value is None or self.count == 1 or isinstance(value, SystemExit):
            return
        if is_lost_connection(value):
            value = UserError(
                f"another process of the run has died or cannot be reached ({first_line(value)}); "
                "run the same commands again to resume from the newest checkpoint"
            )
        code = report_error(f"process {self.index} of {self.count}", value)
        sys.stderr.flush()
        os._exit(code)

    def any_process(self, value: bool) -> bool:
        """Whether `value` is true in any process."""
        return any(self._gather(int(value)))

    def broadcast_from_main(self, value: int | None) -> int | None:
        """The `value` of the main process, in all of them; at least 0, or None."""
        return self._gather(value)[0]

    def min_over_processes(self, value: int | None) -> int | None:
        """The smallest `value` of all processes, None if it is None in one of them."""
        known = [number for number in self._gather(value) if number is not None]
        return min(known) if len(known) == self.count else None

    def _gather(self, value: int | None) -> list[int | None]:
        """The `value` of each process, in their order; at least 0, or None."""
        if self.count == 1:
            return [value]
        from jax.experimental.multihost_utils import process_allgather

        # JAX makes 32-bit integers of these, which are too short for bytes of memory.
        parts = process_allgather(np.asarray(divmod(-1 if value is None else value, 2**30)))
        numbers = [int(high) * 2**30 + int(low) for high, low in parts]
        return [None if number < 0 else number for number in numbers]

    def in_main(self, action: Callable[[], object]) -> None:
        """Run `action` in the main process; if it fails, all raise UserError and leave together.

        The answer goes through the service that connects the processes. So this works before JAX
        has taken a device's memory, which every other exchange needs.
        """
        if self.count == 1:
            action()
            return
        import jax
        from jax._src.distributed import global_state  # JAX has no public name for it

        service = global_state.client
        assert service is not None, "connected"
        if self.is_main:
            failure = ""
            try:
                action()
            except Exception as error:
                failure = str(error) or first_line(error)
            service.key_value_set("jaxgpt/main", failure)
        else:
            failure = service.blocking_key_value_get("jaxgpt/main", 1000 * START_SECONDS)
        if failure:
            jax.distributed.shutdown()  # or XLA aborts those that see the main process exit
            raise UserError(failure)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """If one process fails inside, all do: it with its error, the others with a UserError.

        If it is a LockedError, the others raise one too: the run cannot go on.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        failed = self.any_process(own is not None)
        is_locked = failed and self.any_process(isinstance(own, LockedError))
        if own is not None:
            raise own
        if failed:
            kind = LockedError if is_locked else UserError
            raise kind("another process of the run has failed, and says why")


SINGLE_PROCESS = Processes()


class StepSync:
    """Exchanges the requests of all processes after each step.

    With several processes this is one small collective, whose result is read a step later, so that
    no device waits for it. A single process gets its own requests back at once.
    """

    def __init__(self, processes: Processes, layout: Any):
        self._pending: Any = None
        self._count, self._layout = processes.count, layout
        if self._count > 1:
            import jax

            self._max = jax.jit(lambda requests: requests.max(0), **layout.jit_options())

    def exchange(self, stop: str | None, save: bool, now: bool = False) -> StepRequests:
        """The requests of all processes after the previous step, or with `now` after this one."""
        if self._count == 1:
            return StepRequests(stop, save)
        requests = np.asarray([signal.Signals[stop] if stop else 0, save], np.int32)
        shape = (self._layout.count, len(requests))
        sharded = self._layout.load_batch(
            shape, lambda rows: np.tile(requests, (len(range(*rows.indices(shape[0]))), 1))
        )
        result, self._pending = self._pending, self._max(sharded)
        if now:
            result, self._pending = self._pending, None
        number, save_now = (0, 0) if result is None else (int(x) for x in np.asarray(result))
        return StepRequests(signal.Signals(number).name if number else None, bool(save_now))


def connect(
    address: Address, import_jax: Callable[[], Any], count_cards: Callable[[], int]
) -> Processes:
    """Connect to the other processes of the run, if there are any, before JAX looks for devices.

    `count_cards` counts the cards that this process sees; a single process uses all of them.

    Raises:
        UserError: if the address is wrong or incomplete, or not all processes connect.
    """
    launcher = find_launcher()
    _check_address(address, launcher)
    if address.num_processes == 1 or (launcher is None and address == Address()):
        return SINGLE_PROCESS
    here = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else find_host_rank(launcher)
    jax = import_jax()
    # JAX's own would take SIGTERM away from `signals.py`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **address._asdict(),
            local_device_ids=here and share_of_cards(here, count_cards()),
            cluster_detection_method=None if launcher else "deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
        return Processes(jax.process_index(), jax.process_count())
    except (ValueError, RuntimeError) as error:  # XLA's errors are of the second kind
        raise UserError(_cannot_connect(error, launcher)) from None


def _cannot_connect(error: Exception, launcher: Launcher | None) -> str:
    remedy = "check that all are started, with one --coordinator-address that all can reach and a "
    remedy += "--process-id each"
    if launcher is not None:
        remedy = f"started by {launcher.name}: {remedy}{launcher.remedy}; or use --num-processes 1 "
        remedy += "to run this process on its own"
    return f"the processes of the run cannot connect ({first_line(error)}); {remedy}"


def _check_address(address: Address, launcher: Launcher | None) -> None:
    where, count, index = address
    errors = []
    given = [value is not None for value in address]
    if any(given) and not all(given) and launcher is None and count != 1:
        errors.append(
            "--coordinator-address HOST:PORT (of process 0), --num-processes and --process-id "
            "(0, 1, ...) must be given together, unless Slurm, Open MPI or Kubernetes starts the "
            "processes"
        )
    if where is not None and not re.fullmatch(r".+:\d{1,9}", where, re.ASCII):
        errors.append(f"--coordinator-address {where} must be HOST:PORT")
    elif where is not None and not 0 < int(where.rpartition(":")[2]) < 65536:
        errors.append(f"--coordinator-address {where}: a port is a number from 1 to 65535")
    elif where is not None and (reason := _why_unknown(where.rpartition(":")[0])):
        errors.append(
            f"--coordinator-address {where}: no machine of that name is known here ({reason}); "
            "check its spelling, or give its IP address"
        )
    if count is not None and count < 1:
        errors.append(f"--num-processes {count} must be at least 1")
    if index is not None and not 0 <= index < (count or index + 1):
        errors.append(f"--process-id {index} must be at least 0 and below --num-processes {count}")
    if where is not None and index == 0 and not errors and not _is_free(where):
        errors.append(f"--coordinator-address {where}: its port is in use here; choose another")
    if errors:
        raise UserError("\n".join(errors))


def _why_unknown(host: str) -> str:
    """Why a name or an address is of no machine; '' if it is of one. JAX would try for minutes."""
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or first_line(error)
    return ""


def _is_free(address: str) -> bool:
    """Whether process 0 can listen there; JAX would connect to another run and end both."""
    try:
        # It sets SO_REUSEADDR: the port of a run that has just ended counts as free.
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            return True
    except OSError:
        return False


# Parts of XLA's error messages about a lost connection, over Gloo and NCCL.
LOST = ("Gloo", "gloo", "NCCL", "onnection", "oordination", "UNAVAILABLE", "DEADLINE", "eartbeat")


def is_lost_connection(error: BaseException) -> bool:
    """Whether XLA's error says that another process is gone."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
