"""A run that stands still says so: where every thread stands, once nothing has moved for long.

The stacks are printed with the interpreter's lock held. faulthandler's timer does without, and
kills the process if a thread moves meanwhile: in a run that was only slow, or was stopped with
Ctrl-Z and goes on.
"""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import defaultdict, deque
from types import TracebackType
from typing import Self

from jaxgpt.run.signals import say_at_once

TIMES = 30  # as long as it usually takes
LEAST_SECONDS = 120.0  # shorter waits are an ordinary hiccup
LOOK_SECONDS = 1.0  # how often the thread looks at the clock


class StallWatch:
    """`begin('step')` says what a run does from now on; too long in one thing prints every stack.

    What is done for the first time has no usual length, and may have to be compiled for long: it
    is not watched. The stacks are printed to standard error each time that the limit passes anew.
    A call that never lets go of the interpreter's lock silences this too.
    """

    def __init__(self) -> None:
        self._took: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
        self._now: tuple[str, float] | None = None  # what is being done, since when
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._look, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join(1.0)  # not for ever: it may be writing to where nobody reads

    def begin(self, what: str) -> None:
        """The run begins to do `what`, and has done what it did before."""
        now = time.monotonic()
        if self._now is not None:
            before, since = self._now
            self._took[before].append(now - since)
        self._now = what, now

    def limit(self, what: str) -> float | None:
        """Seconds after which `what` takes too long; None before it was done twice."""
        took = self._usual(what)
        return None if took is None else max(LEAST_SECONDS, TIMES * took)

    def _usual(self, what: str) -> float | None:
        took = list(self._took.get(what, ()))  # at once: the run goes on adding to it
        return statistics.median(took) if len(took) > 1 else None

    def _look(self) -> None:
        looked_at, said = self._now, 0
        while not self._left.wait(LOOK_SECONDS):
            now = self._now
            if now is not looked_at:
                looked_at, said = now, 0
            if now is None or (limit := self.limit(now[0])) is None:
                continue
            times = int((time.monotonic() - now[1]) / limit)
            if times > said:
                said = times
                self._say(*now)

    def _say(self, what: str, since: float) -> None:
        say_at_once(
            f"no end of the {what} begun {time.monotonic() - since:.0f} s ago, which usually "
            f"takes {self._usual(what):.2g} s: a disk or the GPU may have stopped answering. "
            "Where every thread stands:"
        )
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # it is gone, or closed
                # By its number: the file's own lock may be held by a thread that waits.
                faulthandler.dump_traceback(sys.__stderr__.fileno())
