"""Several processes as one run, by `jax.distributed`: who they are, and what they agree on.

Every process runs the same program. What one alone finds out (a signal, a clock, a full disk) has
to be agreed upon before it may change what they do, or one waits for the others for ever.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import UserError, first_line
from jaxgpt.run.launchers import Launcher, cards_of, find_launcher, on_this_host

# Seconds without a sign of life after which a process counts as dead, and the others leave.
HEARTBEAT_SECONDS = 30
# How long to wait for all processes to come, and at the end for all to go.
START_SECONDS, END_SECONDS = 300, 30


class Address(NamedTuple):
    """Who is to meet where, as JAX calls it; all None is for JAX to find out."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


class StepRequests(NamedTuple):
    """What all processes were asked for at the edge of a step."""

    stop: str | None = None  # the name of a signal
    save: bool = False


class Processes:
    """The processes of a run, entered before JAX does anything else."""

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.is_main = index == 0  # the one that logs, and owns the run's folder

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        """Leave at once with an error: in good order a process would wait for all the others."""
        if value is None or self.count == 1 or isinstance(value, SystemExit):
            return
        said = _in_words(value)
        if said is None:
            traceback.print_exception(value)
        print(f"process {self.index} of {self.count}: {said or value}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(value, UserError) else 1)

    def any(self, mine: bool) -> bool:
        """Whether it is so on any process; each has to ask."""
        if self.count == 1:
            return mine
        from jax.experimental.multihost_utils import process_allgather

        return bool(process_allgather(np.asarray(mine)).any())

    def from_main(self, value: int | None) -> int | None:
        """The main process's number, not negative, or None; each has to ask."""
        if self.count == 1:
            return value
        from jax.experimental.multihost_utils import broadcast_one_to_all

        told = int(broadcast_one_to_all(np.asarray(-1 if value is None else value, np.int64)))
        return None if told < 0 else told

    def least(self, mine: int | None) -> int | None:
        """The smallest of all processes' numbers, None if one has none; each has to ask."""
        if self.count == 1:
            return mine
        from jax.experimental.multihost_utils import process_allgather

        # Bytes of memory do not fit the 32 bits that JAX makes of a number.
        parts = divmod(-1 if mine is None else mine, 2**30)
        told = [int(high) * 2**30 + int(low) for high, low in process_allgather(np.asarray(parts))]
        return None if min(told) < 0 else min(told)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one process fails on all."""
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        failed = self.any(mine is not None)
        if mine is not None:
            raise mine
        if failed:
            raise OSError("another process of the run could not")


ALONE = Processes()


class StepSync:
    """What the processes were asked for, agreed upon at the edge of each step.

    Of several, each puts its wishes into one small collective, whose result is read a step later,
    when the devices have long come by it. One process agrees with itself at once.
    """

    def __init__(self, processes: Processes, layout: Any):
        self._pending: Any = None
        self._count, self._layout = processes.count, layout
        if self._count > 1:
            import jax

            self._largest = jax.jit(lambda wishes: wishes.max(0), **layout.jit_options())

    def exchange(self, stop: str | None, save: bool, now: bool = False) -> StepRequests:
        """What was asked for at the edge before this one; at this one with `now`, which waits."""
        if self._count == 1:
            return StepRequests(stop, save)
        wishes = np.asarray([signal.Signals[stop] if stop else 0, save], np.int32)
        shape = (self._layout.count, len(wishes))
        spread = self._layout.load_batch(
            shape, lambda rows: np.tile(wishes, (len(range(*rows.indices(shape[0]))), 1))
        )
        asked, self._pending = self._pending, self._largest(spread)
        if now:
            asked, self._pending = self._pending, None
        number, saves = (0, 0) if asked is None else (int(x) for x in np.asarray(asked))
        return StepRequests(signal.Signals(number).name if number else None, bool(saves))


def join(
    address: Address, import_jax: Callable[[], Any], visible_cards: Callable[[], int]
) -> Processes:
    """Meet the other processes of the run, if there are others; before JAX looks for devices.

    `visible_cards` counts those that this process sees. One process, by its flags or by what its
    launcher says, is a run of its own on all of them.

    Raises:
        UserError: if they do not all come, or it is not clear who they are.
    """
    launcher = find_launcher()
    _check(address, launcher)
    if address.num_processes == 1 or (launcher is None and address == Address()):
        return ALONE
    here = None if "JAX_LOCAL_DEVICE_IDS" in os.environ else on_this_host(launcher)
    jax = import_jax()
    # It would take SIGTERM away from `stopping.py`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **address._asdict(),
            local_device_ids=here and cards_of(here, visible_cards()),
            cluster_detection_method=None if launcher else "deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
        return Processes(jax.process_index(), jax.process_count())
    except (ValueError, RuntimeError) as error:  # XLA's errors are of the second kind
        raise UserError(_cannot_meet(error, launcher)) from None


def _cannot_meet(error: Exception, launcher: Launcher | None) -> str:
    line = first_line(error)
    how = "see that all are started, with one --coordinator-address that all can reach and a "
    how += "--process-id each"
    if launcher is not None:
        how = f"started by {launcher.name}: {how}{launcher.remedy}; or take --num-processes 1, for "
        how += "a run of this process alone"
    return f"the processes of the run cannot meet ({line[:300]}); {how}"


def _check(address: Address, launcher: Launcher | None) -> None:
    where, count, index = address
    errors = []
    given = [value is not None for value in address]
    if any(given) and not all(given) and launcher is None and count != 1:
        errors.append(
            "--coordinator-address HOST:PORT (of process 0), --num-processes and --process-id "
            "(0, 1, ...) come together, unless Slurm, Open MPI or Kubernetes has started the "
            "processes"
        )
    if where is not None and not re.fullmatch(r".+:\d{1,9}", where, re.ASCII):
        errors.append(f"--coordinator-address {where} must be HOST:PORT")
    elif where is not None and not 0 < int(where.rpartition(":")[2]) < 65536:
        errors.append(f"--coordinator-address {where}: a port is a number from 1 to 65535")
    if count is not None and count < 1:
        errors.append(f"--num-processes {count} must be at least 1")
    if index is not None and not 0 <= index < (count or index + 1):
        errors.append(f"--process-id {index} must be at least 0 and below --num-processes {count}")
    if where is not None and index == 0 and not errors and not _is_free(where):
        errors.append(f"--coordinator-address {where}: its port is in use here; choose another")
    if errors:
        raise UserError("\n".join(errors))


def _is_free(address: str) -> bool:
    """Whether process 0 can listen there; JAX would join whoever does, and end both runs."""
    try:
        # Not taken from one that has just ended.
        with socket.create_server(("", int(address.rpartition(":")[2]))):
            return True
    except OSError:
        return False


# How XLA's errors of a connection that is gone begin or end, over gloo and NCCL.
LOST = ("Gloo", "gloo", "NCCL", "onnection", "oordination", "UNAVAILABLE", "DEADLINE", "eartbeat")


def _in_words(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
        line = first_line(error)
        return (
            f"another process of the run has died or cannot be reached ({line}); start all of them "
            "again with the same command: the run goes on from its newest checkpoint"
        )
    return None
