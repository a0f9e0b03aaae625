"""Files that appear whole or not at all, and outlive a power failure: shards, JSON, parts."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end, once it is on disk; else nothing is left.

    Until then it is `partial`, by default `path` and .tmp.
    """
    partial = partial or path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def move_whole(source: Path, path: Path) -> None:
    """Give a file that is complete the name `path`, as `whole_file` does."""
    _sync(source)
    os.replace(source, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Return once the disk has a file's content, or the names of a folder's files."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, indented."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
