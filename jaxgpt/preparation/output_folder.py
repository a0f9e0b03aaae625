"""The folder for the shards: its name, its lock, its free space, and the rank that fills it."""

import glob
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.filesize import decimal

from jaxgpt.config.launchers import find_launched_rank
from jaxgpt.data.manifest import WORK_FOLDER
from jaxgpt.errors import UserError
from jaxgpt.files import FolderLock
from jaxgpt.preparation.flags import DATASETS, PROG, PrepareFlags
from jaxgpt.preparation.inputs import kind_of


@dataclass(frozen=True)
class OutputFolder:
    """Where the shards and the files of unfinished work go, and the rank of this process."""

    out: Path
    work: Path
    rank: int
    world_size: int


@contextmanager
def open_output_folder(flags: PrepareFlags) -> Iterator[OutputFolder]:
    """Create the folder that the flags name, and lock it for this process. Raises UserError.

    A command that fails before it has a plan leaves nothing behind.
    """
    out = (flags.out or default_out(flags)).expanduser()
    _refuse_foreign_tokens(out)
    rank, world_size, launcher = find_rank(flags.rank, flags.world_size)
    if launcher:
        print(f"rank {rank} of {world_size} ({launcher})")
    own = f"rank-{rank:03d}-of-{world_size:03d}" if world_size > 1 else ""
    _refuse_other_world_size(out, world_size)
    work = out / WORK_FOLDER / own
    try:
        with FolderLock(work, "--out") as lock:
            lock.take()
            yield OutputFolder(out, work, rank, world_size)
    finally:
        for created in (out / WORK_FOLDER, out):
            with suppress(OSError):  # it is not empty
                created.rmdir()


def _has_plan(work: Path) -> bool:
    """Whether a preparation of this folder, or of one of its ranks, got as far as a plan."""
    return any(work.rglob("plan.json")) or any(work.rglob("ready.json"))


def _refuse_other_world_size(out: Path, world_size: int) -> None:
    plans = (out / WORK_FOLDER).glob("rank-*-of-*/plan.json")
    sizes = {int(plan.parent.name.rpartition("-")[2]) for plan in plans}
    if (out / WORK_FOLDER / "plan.json").exists():
        sizes.add(1)
    if others := sizes - {world_size}:
        raise UserError(
            f"{out}: was started with --world-size {others.pop()}, not {world_size}; continue with "
            "that, or choose another folder with --out"
        )


def _refuse_foreign_tokens(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder with --out")
    if any(out.glob("*.bin")) and not _has_plan(out / WORK_FOLDER):
        raise UserError(
            f"{out}: already contains tokens that {PROG} did not write; choose another folder with "
            "--out"
        )


def default_out(flags: PrepareFlags) -> Path:
    """data/ and the name of the source: of the data set, of the only file, or of its folder."""
    first = Path(flags.inputs[0]).expanduser()
    if is_hub_name(flags.inputs):
        return Path("data") / flags.inputs[0].rpartition("/")[2]
    folder = first if first.is_dir() else first.parent
    if not first.exists():  # a pattern: the folder before it
        folder = Path(*takewhile(lambda part: not glob.has_magic(part), folder.parts))
    name = folder.resolve().name
    if first.is_file() and len(flags.inputs) == 1:
        name = first.name.partition(".")[0] or name
    out = Path("data") / (name or "text")
    return Path(f"{out}-tokens") if out.resolve() == folder.resolve() else out


def is_hub_name(inputs: Sequence[str]) -> bool:
    """Whether the only input is a data set of the Hub: an alias, or owner/name and no file."""
    if len(inputs) != 1:
        return False
    only = inputs[0]
    if only in DATASETS:
        return True
    if only.startswith((".", "~", "/")) or glob.has_magic(only) or kind_of(only) is not None:
        return False
    return only.count("/") == 1 and not Path(only).exists()


def find_rank(
    rank: int | None, world_size: int | None, environ: Mapping[str, str] = os.environ
) -> tuple[int, int, str]:
    """(rank, world size, where they come from), from the flags or from a launcher's variables.

    (0, 1, "") for a single process. Raises UserError.
    """
    if (rank is None) != (world_size is None):
        raise UserError("--rank and --world-size belong together; give both, or neither")
    if rank is not None and world_size is not None:
        return _valid_rank(rank, world_size, "--rank and --world-size")
    launched = find_launched_rank(environ)
    return (0, 1, "") if launched is None else _valid_rank(*launched)


def _valid_rank(rank: int, world_size: int, origin: str) -> tuple[int, int, str]:
    if not 0 <= rank < world_size <= 999:
        raise UserError(
            f"rank {rank} of {world_size} ({origin}): ranks go from 0 to the world size minus one, "
            "and the world size is at most 999"
        )
    return rank, world_size, origin


def check_free_space(out: Path, needed: int) -> str:
    """The free space at `out`, as text; raises UserError if it is less than `needed` bytes."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: needs about {decimal(needed)} of disk and has {decimal(free)} free; make "
            "room, choose a folder on another disk (--out), or take fewer tokens (--limit-tokens)"
        )
    return decimal(free)
