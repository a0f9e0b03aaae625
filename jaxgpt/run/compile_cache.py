"""A persistent cache of XLA's compiled programs, so that the second start is quick.

JAX does not write entries atomically. A killed process or a full disk leaves a truncated one under
its final name; JAX then warns of it at every start, compiles, and never replaces it. So truncated
entries are removed before JAX reads them.

JAX executes what is in the folder, so only the user may own it and write to it.
"""

import hashlib
import os
import platform
import re
import zlib
from collections.abc import Callable
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own setting, kept if the user has set it
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
MAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
LARGEST = 2 * 2**30  # bytes; above it JAX removes the least recently used entries
ENTRY, USED = "-cache", "-atime"  # JAX's suffixes of an entry, and of the file with its last use
NAME = re.compile(r".+-[0-9a-f]{64}-cache")  # the user's folder may contain other files
CHECKED = "checked"  # a file; entries older than it were intact when last checked
ZSTD = b"\x28\xb5\x2f\xfd"


def prepare_compile_cache(warn: Callable[[str], object]) -> None:
    """Enable JAX's compilation cache in a folder of the user's; call before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` sets another folder, `JAX_ENABLE_COMPILATION_CACHE=false` disables
    the cache. `warn` is called with the reason if there can be no cache.
    """
    if os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off", "n", "f"):
        return
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else default_folder()
    if named and "://" in named:  # not on this file system
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and (reason := _not_private(folder)):
            warn(f"{folder} {reason}; without a cache every start compiles again")
            return
        remove_damaged(folder)
    except OSError as error:
        warn(f"no compilation cache, so every start compiles again: {error}")
        return
    if not named:
        os.environ[FOLDER] = str(folder)
        os.environ.setdefault(MAX_SIZE, str(LARGEST))


def default_folder() -> Path:
    """The default folder of the cache, one for each kind of CPU.

    XLA compiles for the instruction set of the CPU, and machines may share a home folder.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))]
    digest = hashlib.sha256("\n".join([platform.machine(), *sorted(set(kind))]).encode())
    return Path(os.path.expanduser(home)) / "jaxgpt" / f"xla-{digest.hexdigest()[:8]}"


def remove_damaged(folder: Path) -> list[str]:
    """Remove truncated entries, of those written since the last check; returns their names."""
    marker = folder / CHECKED
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    removed = []
    newest = since
    for path in folder.glob(f"*{ENTRY}"):
        if not NAME.fullmatch(path.name):
            continue
        try:
            written = path.stat().st_mtime_ns
            if written < since or is_intact(path.read_bytes()):
                newest = max(newest, written)
                continue
            path.unlink()
            path.with_name(path.name.removesuffix(ENTRY) + USED).unlink(missing_ok=True)
        except FileNotFoundError:  # another process has removed it
            continue
        removed.append(path.name)
    marker.touch()
    os.utime(marker, ns=(newest, newest))
    return removed


def is_intact(entry: bytes) -> bool:
    """Whether an entry decompresses: JAX compresses with zstandard, or zlib without it.

    Without the zstandard package its entries cannot be checked and count as intact.
    """
    if not entry.startswith(ZSTD):
        try:
            zlib.decompress(entry)
        except zlib.error:
            return False
        return True
    try:
        import zstandard
    except ImportError:
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
