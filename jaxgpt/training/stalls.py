"""A run that stands still says so: where every thread stands, once nothing has moved for long.

A thread says the sentence, but would not do alone: a read from a lost network disk may hold the
interpreter's lock and stop all threads. faulthandler's timer, which prints the stacks, needs none.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from types import TracebackType
from typing import Self

TIMES = 30  # as long as it usually takes
LEAST_SECONDS = 120.0  # shorter waits are an ordinary hiccup
REARM_SECONDS = 1.0  # setting the timer starts a thread; not with every step of a millisecond


class StallWatch:
    """`begin('step')` says what a run does from now on; too long in one thing prints every stack.

    What is done for the first time has no usual length, and may have to be compiled for long: it
    is not watched. A stack is printed to standard error once each time that the limit passes.
    """

    def __init__(self) -> None:
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        self._doing: str | None = None
        self._since = self._armed_at = 0.0
        self._speaker: threading.Timer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._disarm()

    def begin(self, what: str) -> None:
        """The run begins to do `what`, and has done what it did before."""
        now = time.monotonic()
        if self._doing is not None:
            self._took[self._doing].append(now - self._since)
        if what != self._doing or now - self._armed_at >= REARM_SECONDS:
            self._disarm()
            self._arm(what)
            self._armed_at = now
        self._doing, self._since = what, now

    def limit(self, what: str) -> float | None:
        """Seconds after which `what` takes too long; None before it was done twice."""
        took = self._took[what]
        return max(LEAST_SECONDS, TIMES * statistics.median(took)) if len(took) > 1 else None

    def _arm(self, what: str) -> None:
        seconds = self.limit(what)
        if seconds is None or sys.__stderr__ is None:
            return
        usual = statistics.median(self._took[what])
        text = (
            f"\nno end of the {what} begun {seconds:.0f} s ago, which usually takes {usual:.2g} s: "
            "a disk or the GPU may have stopped answering. Where every thread stands:\n"
        )
        self._speaker = threading.Timer(seconds, os.write, (sys.__stderr__.fileno(), text.encode()))
        self._speaker.daemon = True
        self._speaker.start()
        faulthandler.dump_traceback_later(seconds + 0.5, repeat=True, file=sys.__stderr__)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._speaker is not None:
            self._speaker.cancel()
