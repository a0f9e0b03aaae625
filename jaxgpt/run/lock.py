"""One run, one writer: a lock on the run's folder that says whose it is.

The operating system holds the lock and lets go of it when the process ends, however it ends. What
is written in the file serves the message alone, so a file that a killed run left is no obstacle.
"""

import contextlib
import datetime
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from jaxgpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where a file left behind must be deleted by hand
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "lock"


class LockedError(UserError):
    """Another process trains in the folder; the message says which."""


class RunLock:
    """`with RunLock(out_dir) as lock: ...`, and `lock.take()` before anything is written there."""

    def __init__(self, out_dir: Path) -> None:
        self._path = out_dir / LOCK_FILE
        self._file: int | None = None

    def __enter__(self) -> Self:
        return self

    def take(self) -> None:
        """Make the folder and lock it.

        Raises LockedError where another process has it, UserError where nobody can.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._take()
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(_me()).encode(), 0)
        except OSError as error:
            raise UserError(
                f"--out-dir {self._path.parent}: its lock cannot be taken ({error}); choose "
                "another folder"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._path.unlink()
            self._path.parent.rmdir()  # a run that never began leaves no empty folder
        os.close(self._file)

    def _take(self) -> int:
        while True:
            exists = self._path.exists()
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if fcntl is None and exists:
                    raise BlockingIOError
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have deleted the file between our opening and locking it.
                if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
            except BlockingIOError:
                message = self._held()
                os.close(file)
                raise LockedError(message) from None
            except OSError:
                os.close(file)
                raise
            os.close(file)

    def _held(self) -> str:
        try:
            holder = json.loads(self._path.read_text(encoding="utf-8"))
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, TypeError, LookupError):
            who = "another process"
        return (
            f"{self._path.parent} is being trained in by {who}; stop that one first, or train "
            f"elsewhere with --out-dir (if it is long gone, delete {self._path})"
        )


def _me() -> dict[str, str | int]:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
