"""Whether a checkpoint is what was written: a manifest of all its files, and the check against it.

Orbax loads a flipped bit without a word and looks for no mark of completeness, so the manifest is
both: it is written after everything else is on disk, and a folder without it was never finished.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError

MANIFEST = "integrity.json"


class DamagedError(UserError):
    """A checkpoint is not what was written; the message names the file and what is wrong."""


Files = dict[str, tuple[int, str]]  # size and SHA-256 by path in the folder


def measure(folder: Path) -> Files:
    """Size and SHA-256 of every file under `folder`; all of it outlives a power failure then."""
    files = {str(path.relative_to(folder)): _measure(path) for path in _files(folder)}
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync(path)
    return files


def write_manifest(folder: Path, notes: Mapping[str, Any], files: Files | None = None) -> None:
    """Put what `measure` has found under `folder` into its manifest, and `notes` beside it.

    `files` is what it found before, if it did. `notes` are JSON values that can be read without
    reading the checkpoint. Raises OSError if the disk does not take it.
    """
    files = measure(folder) if files is None else files
    part = folder / f"{MANIFEST}.tmp"
    with part.open("wb") as file:
        file.write(_encode({**notes, "files": files}))
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)
    sync(folder)
    sync(folder.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The notes and files of a finished checkpoint; DamagedError if a byte is not as written."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        body = json.loads(data)["manifest"]
        if _encode(body) != data:
            raise ValueError
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise DamagedError(f"{path} is not what was written: its checksum differs") from None
    return body


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have all been read and found as they were written.

    Takes about a second per gigabyte. Raises DamagedError, which names the first file that differs.
    """
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DamagedError(f"{path} has {found:,} bytes where {size:,} were written")
            if _digest(path) != digest:
                raise DamagedError(f"{path} is not what was written: its checksum differs")
        except OSError as error:
            raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    return manifest


def sync(path: Path) -> None:
    """Return once the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    ours = {folder / MANIFEST, folder / f"{MANIFEST}.tmp"}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in ours)


def _measure(path: Path) -> tuple[int, str]:
    sync(path)
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(body: Mapping[str, Any]) -> bytes:
    """The manifest's own bytes, of which no bit can change unseen either."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": checksum, "manifest": body}, indent=1, sort_keys=True).encode()
