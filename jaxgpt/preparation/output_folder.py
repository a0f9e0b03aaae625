"""The folder that shards go to: which one it is, whose it is, and held for one process alone."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from jaxgpt.data.manifest import WORK_FOLDER
from jaxgpt.errors import UserError
from jaxgpt.preparation.flags import DATASETS, PROG, Flags
from jaxgpt.preparation.inputs import kind_of
from jaxgpt.preparation.ranks import find_rank


@dataclass(frozen=True)
class Folder:
    """Where shards go, where the work on them is noted, and which of how many processes this is."""

    out: Path
    work: Path
    rank: int
    world_size: int


@contextmanager
def open_folder(flags: Flags) -> Iterator[Folder]:
    """The folder that the flags name, for this process alone. Raises UserError.

    A command that came to no plan leaves nothing behind.
    """
    out = (flags.out or default_out(flags)).expanduser()
    refuse_foreign(out)
    rank, world_size, launcher = find_rank(flags.rank, flags.world_size)
    if launcher:
        print(f"rank {rank} of {world_size} ({launcher})")
    own = f"rank-{rank:03d}-of-{world_size:03d}" if world_size > 1 else ""
    _refuse_other_division(out, world_size)
    work = out / WORK_FOLDER / own
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / "lock", timeout=0):
            try:
                yield Folder(out, work, rank, world_size)
            finally:
                if not has_plan(work):
                    _remove(work, out)
    except Timeout:
        raise UserError(
            f"{out}: another prepare is writing to it; wait for it, or give this one another --out"
        ) from None


def has_plan(work: Path) -> bool:
    """Whether a command in this folder, or of one of its ranks, got as far as to know its input."""
    return any(work.rglob("plan.json")) or any(work.rglob("ready.json"))


def _remove(work: Path, out: Path) -> None:
    (work / "lock").unlink(missing_ok=True)
    for folder in dict.fromkeys((work, out / WORK_FOLDER, out)):
        with suppress(OSError):  # others' files are in it
            folder.rmdir()


def _refuse_other_division(out: Path, world_size: int) -> None:
    """Raises UserError for a folder that was begun by another number of processes."""
    plans = (out / WORK_FOLDER).glob("rank-*-of-*/plan.json")
    sizes = {int(plan.parent.name.rpartition("-")[2]) for plan in plans}
    if (out / WORK_FOLDER / "plan.json").exists():
        sizes.add(1)
    if others := sizes - {world_size}:
        raise UserError(
            f"{out}: was begun with --world-size {others.pop()}, not {world_size}; go on with "
            "that, or choose another folder with --out"
        )


def default_out(flags: Flags) -> Path:
    """data/ and the name of the source: of the data set, of the one file, or of its folder."""
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
    """Whether the one input is a data set of the Hub: an alias, or owner/name where no file is."""
    if len(inputs) != 1:
        return False
    only = inputs[0]
    if only in DATASETS:
        return True
    if only.startswith((".", "~", "/")) or glob.has_magic(only) or kind_of(only) is not None:
        return False
    return only.count("/") == 1 and not Path(only).exists()


def refuse_foreign(out: Path) -> None:
    """Raises UserError for a folder that holds tokens which this command did not make."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder with --out")
    if any(out.glob("*.bin")) and not has_plan(out / WORK_FOLDER):
        raise UserError(
            f"{out}: holds tokens already that {PROG} did not put there; choose another folder "
            "with --out"
        )
