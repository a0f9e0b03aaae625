"""XLA's compiled programs, kept from one start to the next, so that the second one is quick.

JAX writes an entry by simply writing it. A process that is killed, or a disk that is full, leaves
half of one under its final name, and JAX then warns of it at every start, compiles, and does not
write again, because there is an entry. So those that are not whole are taken out before JAX looks.

JAX runs what lies in the folder: it has to be the user's own, and nobody else's to write.
"""

import hashlib
import os
import platform
import re
import zlib
from collections.abc import Callable
from pathlib import Path

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own setting; if the user has one, it stands
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
MAX_SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
LARGEST = 2 * 2**30  # bytes; beyond it JAX removes what was used longest ago
ENTRY, USED = "-cache", "-atime"  # how JAX ends the names of an entry and of when it was used
NAME = re.compile(r".+-[0-9a-f]{64}-cache")  # a folder that a user names may hold other things
CHECKED = "checked"  # as old as the last look: what is older than this file was whole then
ZSTD = b"\x28\xb5\x2f\xfd"


def prepare_compile_cache(warn: Callable[[str], object]) -> None:
    """Have JAX keep its programs in a folder of the user's; call before JAX is imported.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` does
    without. `warn` is told why there is none where that was not asked for.
    """
    if os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off", "n", "f"):
        return
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else default_folder()
    if named and "://" in named:  # JAX reads it from somewhere else
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named and (reason := _not_private(folder)):
            warn(f"{folder} {reason}: XLA's programs are compiled anew at each start")
            return
        remove_damaged(folder)
    except OSError as error:
        warn(f"XLA's programs are compiled anew at each start, for their folder fails: {error}")
        return
    if not named:
        os.environ[FOLDER] = str(folder)
        os.environ.setdefault(MAX_SIZE, str(LARGEST))


def default_folder() -> Path:
    """Where the programs lie unless the user says otherwise; another for each kind of CPU.

    XLA compiles for the instructions that a CPU has, and machines may share a home folder.
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
    """Remove the entries that are not whole, of those written since the last look; their names."""
    marker = folder / CHECKED
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    removed = []
    newest = since
    for path in folder.glob(f"*{ENTRY}"):
        if not NAME.fullmatch(path.name):
            continue
        try:
            written = path.stat().st_mtime_ns
            if written < since or is_whole(path.read_bytes()):
                newest = max(newest, written)
                continue
            path.unlink()
            path.with_name(path.name.removesuffix(ENTRY) + USED).unlink(missing_ok=True)
        except FileNotFoundError:  # another process has taken it out
            continue
        removed.append(path.name)
    marker.touch()
    os.utime(marker, ns=(newest, newest))
    return removed


def is_whole(entry: bytes) -> bool:
    """Whether a file is all of a compressed program: JAX uses zstandard, or zlib without it."""
    if not entry.startswith(ZSTD):
        try:
            zlib.decompress(entry)
        except zlib.error:
            return False
        return True
    import zstandard  # which JAX must have had to write it

    try:
        zstandard.ZstdDecompressor().decompress(entry)
    except zstandard.ZstdError:
        return False
    return True


def _not_private(folder: Path) -> str | None:
    if not hasattr(os, "getuid"):
        return None
    stat = folder.stat()
    if stat.st_uid != os.getuid():
        return "belongs to another user"
    return "can be written by others (chmod go-w)" if stat.st_mode & 0o022 else None
