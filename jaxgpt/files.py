"""Reading, writing and locking our own files: atomic, durable, and decoded strictly.

Every file of ours appears complete or not at all, and survives a power failure. JSON is checked
against a declared type before any code indexes it.
"""

import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import msgspec

from jaxgpt.errors import UserError, first_line, warn

try:
    import fcntl
except ImportError:  # Windows, where a leftover lock file must be deleted by hand
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

LOCK_FILE = "lock"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` drops the second slash
LARGEST_READ = 1 << 31  # bytes of a file that is read as a whole
NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its writer
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # some network file systems


class FormatError(UserError):
    """JSON that is corrupt or not of the declared type; names the key and the expected type."""


def named_path(text: str) -> Path:
    """`Path(text)`, but absolute for ./~x: `Path` drops the ./, and ~x would be a home folder."""
    path = Path(text)
    return path.absolute() if str(path).startswith("~") and not text.startswith("~") else path


def user_path(path: str | Path, name: str) -> Path:
    """The path that the flag or variable `name` gives, with `~` as the home folder.

    Raises:
        UserError: if it is a URL, or there is no such home folder.
    """
    text = os.path.expanduser(path)
    if URL.match(text):
        raise UserError(
            f"{name} {path}: is a URL; give a path on this machine; an object store can be mounted"
        )
    if text.startswith("~"):
        raise UserError(f"{name} {path}: there is no such home folder; give the whole path")
    return Path(text)


def open_file(path: Path) -> BinaryIO:
    """Open a file of ours for reading; links are followed.

    Raises OSError, also for a pipe, a socket or a device, from which reading could hang.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAITING))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is a pipe, a socket or a device, not a file", str(path))
    return file


def read_file(path: Path) -> bytes:
    """All bytes of a file; raises OSError as `open_file` does, and for more than 2 GiB."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST_READ:
            raise OSError(
                errno.EFBIG, "is larger than 2 GiB, too large to read as a whole", str(path)
            )
        return file.read()


def delete(path: Path) -> None:
    """Delete a file, a folder with its contents, or only the link if it is one. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextmanager
def atomic_write(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` once it is on disk; after an error it is deleted.

    Until then it is named `partial`, by default `path` with .tmp appended. Raises OSError.
    """
    partial = partial or path.with_name(path.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)  # a symlink of that name must not be followed
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def move_file(source: Path, path: Path) -> None:
    """Give a complete file the name `path`, durably. Raises OSError."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented, atomically. Raises OSError."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the file system supports that."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):  # WSL, CIFS
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """The SHA-256 of a file, in hexadecimal; `advance` gets the number of bytes of each read."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while chunk := file.read(1 << 23):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def decode_json(data: bytes, kind: type[T]) -> T:
    """Decode JSON as a declared type: a `msgspec.Struct` or any other that msgspec supports.

    `json` parses it: msgspec's own parser rejects the lone surrogates by which Python writes file
    names that are not UTF-8.

    Raises:
        FormatError: if the bytes are anything else.
    """
    try:
        return msgspec.convert(json.loads(data), type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        raise FormatError(f"{key}: {what}" if key else what) from None
    except ValueError as error:  # of `json`, of Unicode, of a number with too many digits
        raise FormatError(f"not valid JSON ({first_line(error)})") from None
    except RecursionError:
        raise FormatError("nested too deeply") from None


class LockedError(UserError):
    """Another process holds a folder's lock; the message names it."""


class _Holder(msgspec.Struct):
    pid: int
    host: str
    since: str


class FolderLock:
    """One writer to a folder: `with FolderLock(folder, "--out-dir") as lock: lock.take()`.

    The operating system holds the lock (flock) and releases it when the process ends, however it
    ends. The lock file only names the holder, so one left by a killed process does no harm.
    The filelock package is not used: older versions truncate the holder's file, and without flock
    it either fails or leaves a marker that outlives a killed process.
    """

    def __init__(self, folder: Path, flag: str) -> None:
        """`flag`: the flag that chose the folder, for error messages."""
        self._path = folder / LOCK_FILE
        self._flag = flag
        self._file: int | None = None

    def __enter__(self) -> Self:
        return self

    def take(self) -> None:
        """Create the folder and lock it.

        Raises:
            LockedError: if another process holds the lock.
            UserError: if the folder cannot be created or locked.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire()
            os.ftruncate(self._file, 0)
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            holder = _Holder(os.getpid(), socket.gethostname(), since)
            os.write(self._file, msgspec.json.encode(holder))
        except BlockingIOError:
            raise LockedError(self._in_use_message()) from None
        except OSError as error:
            raise UserError(
                f"{self._flag} {self._path.parent}: cannot be locked ({error}); choose another "
                "folder"
            ) from None

    def is_held(self) -> bool:
        """Whether the folder is still the one that was locked."""
        return self._file is not None and self._is_at_path(self._file)

    def renew(self) -> None:
        """Lock the folder again if it was deleted or moved meanwhile; raises as `take` does."""
        if self._file is not None and not self.is_held():
            os.close(self._file)
            self._file = None
            self.take()

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            if self._is_at_path(self._file):
                self._path.unlink()
                self._path.parent.rmdir()  # only if it is empty: the run never began
        os.close(self._file)
        self._file = None

    def _acquire(self) -> int:
        while True:
            existed = os.path.lexists(self._path)
            no_follow = getattr(os, "O_NOFOLLOW", 0)  # a symlink must not be overwritten
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | no_follow, 0o666)
            try:
                self._lock(file, existed)
                # The previous holder may have deleted the file before we locked it.
                if self._is_at_path(file):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _lock(self, file: int, existed: bool) -> None:
        if fcntl is None:
            if existed:
                raise BlockingIOError
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn(
                f"{self._path.parent}: this file system has no locks; make sure that no other "
                "process writes to this folder"
            )

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _in_use_message(self) -> str:
        try:
            holder = decode_json(read_file(self._path), _Holder)
            who = f"process {holder.pid} on {holder.host}, since {holder.since}"
        except (OSError, FormatError):
            who = "another process"
        return (
            f"{self._path.parent} is in use by {who}; stop it first, or choose another "
            f"{self._flag} (if it is no longer running, delete {self._path})"
        )
