"""Prints the stack of every thread if a run stalls.

The stacks are printed with the GIL held. faulthandler's timer does not hold it, and crashes the
process if a thread runs meanwhile: in a run that is only slow, or was suspended with Ctrl-Z.
"""

import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from contextlib import suppress
from typing import Self

from jaxgpt.run.signals import write_stderr

STALL_FACTOR = 30  # times the usual duration
MIN_STALL_SECONDS = 120.0  # shorter waits are ordinary
CHECK_SECONDS = 1.0  # between two checks of the clock


class StallWatch:
    """Reports an activity that takes too long: `with StallWatch() as watch: watch.begin("step")`.

    The first two of a kind, which may have to be compiled, are not watched. The report, on
    standard error, is repeated each time that the limit passes again. Nothing is printed
    while a call keeps the GIL.
    """

    def __init__(self) -> None:
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        self._now: tuple[str, float] | None = None  # the current activity and its start
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(1.0)  # no longer: it may be blocked by a pipe that nobody reads

    def begin(self, what: str) -> None:
        """End the current activity and start `what`."""
        now = time.monotonic()
        if self._now is not None:
            before, since = self._now
            self._durations[before].append(now - since)
        self._now = what, now

    def limit(self, what: str) -> float | None:
        """Seconds after which `what` counts as stalled; None before it has ended twice."""
        usual = self._usual(what)
        return None if usual is None else max(MIN_STALL_SECONDS, STALL_FACTOR * usual)

    def _usual(self, what: str) -> float | None:
        durations = list(self._durations.get(what, ()))  # a copy: the run appends meanwhile
        return statistics.median(durations) if len(durations) > 1 else None

    def _watch(self) -> None:
        watched, reports = self._now, 0
        while not self._ended.wait(CHECK_SECONDS):
            now = self._now
            if now is not watched:
                watched, reports = now, 0
            if now is None or (limit := self.limit(now[0])) is None:
                continue
            due = int((time.monotonic() - now[1]) / limit)
            if due > reports:
                reports = due
                self._report(*now)

    def _report(self, what: str, since: float) -> None:
        write_stderr(
            f"the {what} has taken {time.monotonic() - since:.0f} s so far, and usually takes "
            f"{self._usual(what):.2g} s: a disk or the GPU may have stopped responding. "
            "Stack of every thread:"
        )
        if sys.__stderr__ is not None:
            with suppress(OSError, ValueError):  # it was closed
                # By number: a thread that waits may hold the file object's lock.
                faulthandler.dump_traceback(sys.__stderr__.fileno())
