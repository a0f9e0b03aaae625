"""Whether a checkpoint is intact: a manifest of all its files, and the check against it.

Orbax loads flipped bits without an error and does not mark a checkpoint as complete. The manifest
does both: it holds the checksum of every file, and is written last, when all of them are on disk.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jaxgpt.errors import UserError, first_line
from jaxgpt.files import (
    FormatError,
    atomic_write,
    decode_json,
    read_file,
    sha256_of,
    sync_folder,
)

MANIFEST = "integrity.json"
Files = dict[str, tuple[int, str]]  # size in bytes and SHA-256, by path in the folder


class DamagedError(UserError):
    """A checkpoint is not as it was written; the message names the file and the reason."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a checkpoint without reading its arrays."""

    config: dict[str, Any]  # the run's, as `config.flat_values` returns it
    data: dict[str, Any]  # lengths and fingerprints that identify the run's data
    arrays: dict[str, str]  # dtype and shape by path
    made_with: dict[str, str]  # version by package
    val_loss: float | None  # None without an evaluation, or if it was not finite
    files: Files
    step: int | None = None  # None in checkpoints of older versions, as is the next
    run: str | None = None  # drawn when the run began, to tell its checkpoints from others


class _ChecksummedManifest(msgspec.Struct):
    manifest: Manifest


def checksum_files(folder: Path) -> Files:
    """Flush every file under `folder` to disk; returns size and SHA-256 of each."""
    own = {folder / MANIFEST, folder / f"{MANIFEST}.tmp"}
    paths = [folder, *sorted(folder.rglob("*"))]
    files = [path for path in paths if path.is_file() and path not in own]
    checksums = {str(path.relative_to(folder)): _checksum(path) for path in files}
    for path in paths:
        if path.is_dir():
            sync_folder(path)
    return checksums


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish the checkpoint in `folder`. Raises OSError."""
    with atomic_write(folder / MANIFEST) as file:
        file.write(_encode(msgspec.to_builtins(manifest)))
    sync_folder(folder.parent)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished checkpoint; DamagedError if a byte of it has changed."""
    path = folder / MANIFEST
    try:
        data = read_file(path)
        if _encode(decode_json(data, dict[str, Any]).get("manifest", {})) != data:
            raise DamagedError(f"{path} is corrupt: checksum mismatch")
        manifest = decode_json(data, _ChecksummedManifest).manifest
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    except (FormatError, RecursionError) as error:
        raise DamagedError(f"{path} is corrupt: {error}") from None
    if manifest.step is not None and str(manifest.step) != folder.name:
        raise DamagedError(f"{folder} is the checkpoint of step {manifest.step}, renamed")
    return manifest


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint and compare it with the manifest, which is returned.

    Takes about a second per gigabyte. Raises DamagedError, which names the first file that differs.
    """
    manifest = read_manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedError(f"{folder / MANIFEST} is corrupt: {name!r} is outside the folder")
        try:
            found = path.stat().st_size
            intact = found == size and sha256_of(path) == digest
        except (OSError, ValueError) as error:  # the latter of a name that no file can have
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DamagedError(f"{path} cannot be read ({reason})") from None
        if found != size:
            raise DamagedError(f"{path} is corrupt: {found:,} bytes instead of {size:,}")
        if not intact:
            raise DamagedError(f"{path} is corrupt: checksum mismatch")
    for path in sorted(folder.glob("*/**/*")):  # Orbax's own folders, which it reads as a whole
        is_known = str(path.relative_to(folder)) in manifest.files or path.name.startswith(".")
        if not path.is_dir() and not is_known:
            raise DamagedError(f"{path} is not a file of this checkpoint")
    return manifest


def _checksum(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, sha256_of(path)


def _encode(body: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest file, with a checksum of their own."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": checksum, "manifest": body}, indent=1, sort_keys=True).encode()
