"""What a run is asked to do from outside: stop, or save now, at the next step's edge.

Python runs signal handlers between its own instructions, and a step or the compiler may keep it
waiting for minutes. A thread that the operating system wakes answers at once instead.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

LEFT_AT_ONCE = 130  # what shells report for a process that Ctrl-C ended


class StopRequest:
    """While entered, signals become wishes that the loop reads between steps.

    `name` is None until SIGTERM or the first SIGINT (Ctrl-C), then that signal's name; `save_now`
    becomes True on SIGUSR1. A SIGINT after any of the two that stop leaves at once, with exit code
    130, and loses what has not been saved. Enter it on the main thread.
    """

    STOPPING = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.name: str | None = None
        self.save_now = False
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = -1
        self._ends: tuple[socket.socket, socket.socket] | None = None

    def __enter__(self) -> "StopRequest":
        ours, pythons = self._ends = socket.socketpair()
        pythons.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ours,), name="signals", daemon=True).start()
        # Windows has no SIGUSR1. The handler does nothing but keep the default from being taken.
        for number in (*self.STOPPING, *filter(None, [getattr(signal, "SIGUSR1", None)])):
            self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        assert self._ends is not None
        for end in reversed(self._ends):
            end.close()

    def _listen(self, numbers: socket.socket) -> None:
        while received := _receive(numbers):
            for number in received:
                self._note(signal.Signals(number), leave=os._exit)

    def _note(self, number: signal.Signals, leave: Callable[[int], object]) -> None:
        if number not in self.STOPPING:
            self.save_now |= number.name == "SIGUSR1"
        elif self.name is None:
            self.name = number.name
            _say(f"{number.name}: stopping after this step; Ctrl-C again leaves at once, unsaved")
        elif number == signal.SIGINT:
            _say("left at once; the same command goes on from the newest checkpoint")
            # XLA may be at work on another thread, and does not survive Python's own way out.
            leave(LEFT_AT_ONCE)


def _receive(numbers: socket.socket) -> bytes:
    try:
        return numbers.recv(64)
    except OSError:  # closed
        return b""


def _say(text: str) -> None:
    # Not through `print`, whose lock the main thread may hold while it waits.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
