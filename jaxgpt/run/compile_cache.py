"""A persistent cache of XLA's compiled programs, so that the second start is quick.

JAX neither writes entries atomically nor notices damage: it warns of a truncated one at every start
and never replaces it, and executes one in which a bit has changed. So damaged entries are removed
before JAX reads them: any that differs from its checksum, and a truncated one that has none yet.

JAX executes what is in the folder, so only the user may own it and write to it.
"""

import atexit
import hashlib
import os
import platform
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zstandard

from jaxgpt.errors import UserError
from jaxgpt.files import decode_json, delete, read_file, user_path, write_json

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own setting, kept if the user has set it
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
MAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"  # JAX's own limit
LEAST_FREE = 2**25  # bytes on its disk; the program of a step takes a few MB
LARGEST = 2**29  # bytes of all entries; beyond that the oldest are removed
# JAX's suffixes for an entry and for the file with the time of its last use. With MAX_SIZE set, JAX
# 0.10 stores nothing more if that file is missing, or if the user has no name (in containers).
ENTRY, USED = "-cache", "-atime"
NAME = re.compile(r".+-[0-9a-f]{64}-cache")  # the user's folder may contain other files
AUTOTUNING = "xla_gpu_per_fusion_autotune_cache_dir"  # XLA's own entries, in text
CHECKSUMS = "checksums.json"
ZSTD = b"\x28\xb5\x2f\xfd"


def prepare_compile_cache(warn: Callable[[str], object]) -> None:
    """Enable JAX's compilation cache in a folder of the user's; call before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` sets another folder, `JAX_ENABLE_COMPILATION_CACHE=false` disables
    the cache. `warn` is called with the reason if there can be no cache.
    """
    if os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off", "n", "f"):
        return
    named = os.environ.get(FOLDER)
    if named and named.startswith(("gs://", "s3://", "az://", "hf://")):  # JAX's own affair
        return
    try:
        folder = user_path(named, FOLDER) if named else default_folder()
        str(folder).encode()  # raises unless it is UTF-8, which XLA needs
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and (reason := _not_private(folder)):
            warn(f"{folder} {reason}; without a cache every start compiles again")
            return
        remove_damaged(folder)
        if shutil.disk_usage(folder).free < LEAST_FREE:
            warn(f"{folder}: the disk is full, so what is compiled now is not kept")
            warnings.filterwarnings("ignore", "Error writing persistent comp")  # for each program
        if not named:
            remove_oldest(folder)
    except (OSError, UserError, UnicodeError) as error:
        warn(f"no compilation cache, so every start compiles again: {error}")
        os.environ[SWITCH] = "false"  # or JAX would make a folder called ~
        return
    os.environ[FOLDER] = str(folder)
    atexit.register(note_new_entries)


def default_folder() -> Path:
    """The default folder of the cache, one for each kind of CPU.

    XLA compiles for the instruction set of the CPU, and machines may share a home folder.
    """
    try:
        home = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    except UserError:  # without HOME, a UID without a passwd entry has no home folder
        home = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
    digest = hashlib.sha256("\n".join([platform.machine(), *sorted(set(kind))]).encode())
    return home / "jaxgpt" / f"xla-{digest.hexdigest()[:8]}"


def remove_damaged(folder: Path) -> list[str]:
    """Remove damaged entries and note the checksums of the others; returns the removed names."""
    known = _read_checksums(folder)
    intact, removed = dict[str, int](), []
    for path in _entries(folder):
        with suppress(OSError):  # of one entry, which another process may have removed
            name, entry = _name(path), read_file(path) if path.is_file() else b""
            checksum = zlib.crc32(entry)
            if known.get(name, checksum) == checksum and is_intact(entry, name):
                intact[name] = checksum
                if os.environ.get(MAX_SIZE) and not _used(path).exists():
                    _used(path).write_bytes(path.stat().st_mtime_ns.to_bytes(8, "little"))
                continue
            removed.append(name)
            _remove(path)
    if intact != known:
        with suppress(OSError):  # the folder may be read-only
            write_json(folder / CHECKSUMS, intact)
    return removed


def note_new_entries() -> None:
    """Note the checksums of the entries that this process has added."""
    folder = Path(os.environ.get(FOLDER, ""))
    with suppress(OSError):
        known = _read_checksums(folder)
        new = {_name(p): read_file(p) for p in _entries(folder) if _name(p) not in known}
        added = {name: zlib.crc32(entry) for name, entry in new.items() if is_intact(entry, name)}
        if added:
            write_json(folder / CHECKSUMS, known | added)


def remove_oldest(folder: Path) -> None:
    """Remove the oldest entries, until the others have at most LARGEST bytes."""
    stats = [(path, path.stat()) for path in _entries(folder)]
    total = 0
    for path, stat in sorted(stats, key=lambda item: item[1].st_mtime_ns, reverse=True):
        total += stat.st_size
        if total > LARGEST:
            _remove(path)


def _entries(folder: Path) -> list[Path]:
    programs = [path for path in folder.glob(f"*{ENTRY}") if NAME.fullmatch(path.name)]
    return [*programs, *(folder / AUTOTUNING).glob("*")]


def _name(path: Path) -> str:
    """An entry's name in the list of checksums."""
    return f"{AUTOTUNING}/{path.name}" if path.parent.name == AUTOTUNING else path.name


def _used(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(ENTRY) + USED)


def _remove(path: Path) -> None:
    if path.is_dir():
        delete(path)
    path.unlink(missing_ok=True)
    _used(path).unlink(missing_ok=True)


def _read_checksums(folder: Path) -> dict[str, int]:
    try:
        return decode_json(read_file(folder / CHECKSUMS), dict[str, int])
    except (OSError, UserError):  # none yet, or damaged
        return {}


def is_intact(entry: bytes, name: str) -> bool:
    """Whether a program decompresses: JAX compresses with zstandard, or zlib without it."""
    if name.startswith(AUTOTUNING):
        return bool(entry)
    if not entry.startswith(ZSTD):
        try:
            zlib.decompress(entry)
        except zlib.error:
            return False
        return True
    try:
        zstandard.ZstdDecompressor().decompress(entry)
    except (zstandard.ZstdError, MemoryError, OverflowError):  # a corrupt size field may be huge
        return False
    return True


def _not_private(folder: Path) -> str | None:
    if not hasattr(os, "getuid"):
        return None
    stat = folder.stat()
    if stat.st_uid != os.getuid():
        return "belongs to another user"
    return "can be written by others (chmod go-w)" if stat.st_mode & 0o022 else None
