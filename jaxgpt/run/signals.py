"""Signals that ask a run to stop, or to save now, after the current step.

Python runs signal handlers between its own instructions, which a step or the compiler may delay by
minutes. So a thread reads the signals' numbers from a wakeup socket and answers at once.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from jaxgpt.errors import INTERRUPTED


class StopRequest:
    """While entered, signals set attributes that the training loop reads between steps.

    `name` is None until SIGTERM, SIGHUP (the terminal was closed) or the first SIGINT (Ctrl-C),
    then that signal's name; `save_now` becomes True on SIGUSR1. A SIGINT after a stop was requested
    exits at once, with code 130, and loses what is not saved. Signals that are ignored (by nohup,
    for instance) stay ignored. Enter it on the main thread.
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
                # A handler that does nothing replaces the default action.
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        assert self._ends is not None
        for end in reversed(self._ends):
            end.close()

    def _listen(self, numbers: socket.socket) -> None:
        while received := _receive(numbers):
            for number in received:
                self._note(signal.Signals(number), exit_now=os._exit)

    def _note(self, number: signal.Signals, exit_now: Callable[[int], object]) -> None:
        if number in self.SAVING:
            self.save_now = True
        elif number not in self.STOPPING:
            return
        elif self.name is None:
            self.name = number.name
            write_stderr(
                f"{number.name}: stopping after this step; Ctrl-C again exits without saving"
            )
        elif number == signal.SIGINT:
            write_stderr("exiting; run the same command again to resume from the newest checkpoint")
            # Python's own exit crashes if XLA is at work on another thread.
            exit_now(INTERRUPTED)


def _receive(numbers: socket.socket) -> bytes:
    try:
        return numbers.recv(64)
    except OSError:  # closed
        return b""


def write_stderr(text: str) -> None:
    """Write `text` to standard error from any thread, whatever the main thread does."""
    if sys.__stderr__ is None:  # closed before the start; its number may be another file's now
        return
    # Not with `print`, whose lock the main thread may hold. After SIGHUP there may be no reader.
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.__stderr__.fileno(), f"\n{text}\n".encode())
