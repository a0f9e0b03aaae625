"""Members of .zip files, named and opened as if the archive were a folder: `books.zip/a.txt`."""

import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO
from zipfile import BadZipFile, ZipFile, ZipInfo

from jaxgpt.errors import UserError, first_line

ENCRYPTED = 1  # bit of a member's flags
DAMAGE = (BadZipFile, EOFError, NotImplementedError, zlib.error, lzma.LZMAError)


def is_archive(path: str) -> bool:
    """Whether a file is a .zip by its name."""
    return path.lower().endswith(".zip")


def archive_of(path: str) -> str | None:
    """The archive that a file is a member of, None for a file of its own."""
    ends = (match.end() - 1 for match in re.finditer(r"\.zip/", path, re.IGNORECASE))
    return next((path[:end] for end in ends if os.path.isfile(path[:end])), None)


def members(archive: str) -> dict[str, ZipInfo]:
    """The files in an archive, by path; raises UserError if it is damaged."""
    return _open_archive(archive)[1]


def size_of(path: str) -> int:
    """Bytes of a file or member, 0 for a member that is no longer there."""
    archive = archive_of(path)
    if archive is None:
        return os.path.getsize(path)
    info = members(archive).get(path)
    return info.file_size if info else 0


@contextmanager
def open_input(path: str) -> Iterator[IO[bytes]]:
    """Open a file or member to read; raises UserError if the member is damaged or protected."""
    archive = archive_of(path)
    if archive is None:
        with open(path, "rb") as file:
            yield file
        return
    zip_file, found = _open_archive(archive)
    info = found[path]
    if info.flag_bits & ENCRYPTED:
        raise UserError(
            f"{path}: is protected by a password; unpack the archive and name its files"
        )
    try:
        with zip_file.open(info) as member:
            yield member
    except DAMAGE as error:
        raise _damaged(path, error) from None


def _open_archive(archive: str) -> tuple[ZipFile, dict[str, ZipInfo]]:
    stat = os.stat(archive)
    try:
        return _read_directory(archive, stat.st_mtime_ns, stat.st_size)
    except DAMAGE as error:
        raise _damaged(archive, error) from None


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be unpacked ({first_line(error)}); copy or download the archive again"
    )


@lru_cache(1)  # or every member of thousands would read the names of all
def _read_directory(archive: str, mtime: int, size: int) -> tuple[ZipFile, dict[str, ZipInfo]]:
    del mtime, size  # in the cache's key, so that a changed archive is read again
    zip_file = ZipFile(Path(archive))
    names = {PurePosixPath("/", info.filename): info for info in zip_file.infolist()}
    return zip_file, {
        f"{archive}{name}": info for name, info in names.items() if not info.is_dir() and name.name
    }
