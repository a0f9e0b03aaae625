"""What a run is asked to do from outside: stop, or save now, at the next step's edge.

Python runs signal handlers between its own instructions, and a step or the compiler may keep it
waiting for minutes. A thread that the operating system wakes answers at once instead.
"""

import contextlib
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

    `name` is None until SIGTERM, SIGHUP (the terminal is gone) or the first SIGINT (Ctrl-C), then
    that signal's name; `save_now` becomes True on SIGUSR1. A SIGINT after any of those that stop
    leaves at once, with exit code 130, and loses what has not been saved. What is ignored (by
    nohup, for instance) stays so. Enter it on the main thread.
    """

    # Windows has neither SIGHUP nor SIGUSR1.
    STOPPING = tuple(n for n in signal.Signals if n.name in ("SIGTERM", "SIGINT", "SIGHUP"))
    SAVING = tuple(n for n in signal.Signals if n.name == "SIGUSR1")

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
        for number in self.STOPPING + self.SAVING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                # It does nothing but keep the default from being taken.
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
        if number in self.SAVING:
            self.save_now = True
        elif number not in self.STOPPING:
            return
        elif self.name is None:
            self.name = number.name
            say_at_once(
                f"{number.name}: stopping after this step; Ctrl-C again leaves at once, unsaved"
            )
        elif number == signal.SIGINT:
            say_at_once("left at once; the same command goes on from the newest checkpoint")
            # XLA may be at work on another thread, and does not survive Python's own way out.
            leave(LEFT_AT_ONCE)


def _receive(numbers: socket.socket) -> bytes:
    try:
        return numbers.recv(64)
    except OSError:  # closed
        return b""


def say_at_once(text: str) -> None:
    """Write `text` to standard error, from any thread, whatever the main thread is about."""
    if sys.__stderr__ is None:  # closed from the start, and its number may be another file's
        return
    # Not through `print`, whose lock the main thread may hold while it waits; after SIGHUP there is
    # nobody to read it.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())
