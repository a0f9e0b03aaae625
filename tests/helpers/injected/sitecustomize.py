"""Has one file operation of a process fail, or sends the process a signal there.

With this folder on PYTHONPATH and INJECT set, Python imports it at every start, in workers too:

    INJECT="write 7 28 /tmp/run"      the 7th write below /tmp/run fails with ENOSPC
    INJECT="write 7+ 28 /tmp/run"     and all that follow
    INJECT="rename 2 SIGTERM /tmp/run"

Operations are open (for writing), write, fsync, rename and remove; each process counts its own.
What happened is added to the file that INJECT_LOG names. Writes by C++ (Orbax's arrays) are not
seen.
"""

import builtins
import io
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

OPERATIONS = ("open", "write", "fsync", "rename", "remove")
REAL = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "replace")}
REAL |= {name: getattr(os, name) for name in ("remove", "unlink", "rmdir")}
real_open = io.open


class Injection:
    """One fault; `counts` has how often each operation was seen."""

    def __init__(self, text: str):
        operation, number, what, folder = text.split(" ", 3)
        self.operation, self.what, self.folder = operation, what, os.fsencode(folder)
        self.number, self.lasts = int(number.rstrip("+")), number.endswith("+")
        self.counts = Counter[str]()

    def sees(self, path: Any) -> bool:
        """Whether a path, or the path of a descriptor, lies in the folder."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")
            except OSError:
                return False
        return os.path.abspath(os.fsencode(path)).startswith(self.folder)

    def meet(self, operation: str, path: Any) -> None:
        """Count an operation, and raise or send a signal if it is its turn."""
        if not self.sees(path):
            return
        self.counts[operation] += 1
        count = self.counts[operation]
        if operation != self.operation or count < self.number:
            return
        if count > self.number and not self.lasts:
            return
        if count == self.number and "INJECT_LOG" in os.environ:
            line = f"{os.getpid()} {operation} {count} {self.what} {path!r}\n"
            with real_open(os.environ["INJECT_LOG"], "a") as log:
                log.write(line)
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[self.what])
            return
        shown = None if isinstance(path, int) else os.fspath(path)
        raise OSError(int(self.what), os.strerror(int(self.what)), shown)


def install(injection: Injection) -> Callable[[], None]:
    """Replace Python's file operations; returns what puts them back."""

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            injection.meet("write", self.fileno())
            return super().write(data) or 0

    def watched(operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            injection.meet(operation, path)
            return real(path, *args, **kwargs)

        return call

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            injection.meet("open", path)
        return int(REAL["open"](path, flags, *args, **kwargs))

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if not set("wxa+") & set(mode) or not injection.sees(file):
            return real_open(file, mode, buffering, *args, **kwargs)
        if not isinstance(file, int):
            injection.meet("open", file)
        raw = File(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **kwargs)

    replaced = {
        **{name: watched(name, REAL[name]) for name in ("write", "fsync")},
        **{name: watched("rename", REAL[name]) for name in ("rename", "replace")},
        **{name: watched("remove", REAL[name]) for name in ("remove", "unlink", "rmdir")},
        "open": os_open,
    }
    for name, function in replaced.items():
        setattr(os, name, function)
    builtins.open = io.open = opened

    def undo() -> None:
        for name, real in REAL.items():
            setattr(os, name, real)
        builtins.open = io.open = real_open

    return undo


if "INJECT" in os.environ:
    install(Injection(os.environ["INJECT"]))
