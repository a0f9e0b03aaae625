"""Reading and writing our own files: atomic, durable, and decoded strictly.

Every file of ours appears whole or not at all and outlives a power failure. JSON reaches no code
that indexes it before it has the declared type.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

T = TypeVar("T")


class FormatError(ValueError):
    """JSON of another type than declared, or damaged; names the key and what is expected."""


@contextmanager
def atomic_write(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, once it is on disk; else nothing is left.

    Until then it is `partial`, by default `path` and .tmp. Raises OSError.
    """
    partial = partial or path.with_name(path.name + ".tmp")
    try:
        partial.unlink(missing_ok=True)  # a link of that name must not be followed
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
    """Return once the disk has a folder's list of names, where the file system supports that."""
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
    """The SHA-256 of a file, in hexadecimal; `advance` is told of every 8 MB read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 23):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def decode_json(data: bytes, kind: type[T]) -> T:
    """`data` as a value of the declared `kind`, a `msgspec.Struct` or any annotation it knows.

    Raises:
        FormatError: for anything else, whatever the bytes.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        raise FormatError(f"{key}: {what}" if key else what) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"is no JSON ({error})") from None
    except RecursionError:
        raise FormatError("is nested too deeply") from None
