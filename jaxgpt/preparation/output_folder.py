"""The folder for the shards: its name, its lock and its free space."""

import glob
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.filesize import decimal

from jaxgpt.data.hub import is_repository
from jaxgpt.data.manifest import WORK_FOLDER
from jaxgpt.data.shards import token_files
from jaxgpt.errors import UserError
from jaxgpt.files import FolderLock, user_path
from jaxgpt.preparation.flags import DATASETS, PROG, PrepareFlags
from jaxgpt.preparation.inputs import is_readable


@dataclass(frozen=True)
class OutputFolder:
    """Where the shards and the files of unfinished work go."""

    out: Path
    work: Path


@contextmanager
def open_output_folder(flags: PrepareFlags) -> Iterator[OutputFolder]:
    """Create the folder that the flags name, and lock it for this process. Raises UserError.

    A command that fails before it has a plan leaves nothing behind.
    """
    out = user_path(flags.out or default_out(flags), "--out")
    _refuse_foreign_tokens(out)
    work = out / WORK_FOLDER
    try:
        with FolderLock(work, "--out") as lock:
            lock.take()
            yield OutputFolder(out, work)
    finally:
        with suppress(OSError):  # it is not empty
            out.rmdir()


def _refuse_foreign_tokens(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose a folder with --out")
    if was := next((out / WORK_FOLDER).glob("rank-*-of-*"), None):
        raise UserError(
            f"{out}: was begun with --rank and --world-size ({was.name}), which no longer exist; "
            "choose another folder with --out, or delete this one"
        )
    plans = [out / WORK_FOLDER / name for name in ("plan.json", "ready.json")]
    if any(plan.exists() for plan in plans):
        return
    if (out / "config.json").exists():
        raise UserError(
            f"{out}: has a config.json, so it is a run or a model; choose another folder with --out"
        )
    if token_files(out.glob("*")):
        raise UserError(
            f"{out}: already contains tokens that {PROG} did not write; choose another folder with "
            "--out"
        )


def default_out(flags: PrepareFlags) -> Path:
    """data/ and the name of the source: of the dataset, of the only file, or of its folder."""
    first = user_path(flags.inputs[0], "input")
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
    """Whether the only input is a dataset of the Hub: an alias, or owner/name and no file."""
    if len(inputs) != 1:
        return False
    only = inputs[0]
    if only in DATASETS:
        return True
    is_path = glob.has_magic(only) or is_readable(only) or Path(only).exists()
    return is_repository(only) and not is_path


def check_free_space(out: Path, needed: int) -> str:
    """The free space at `out`, as text; raises UserError if it is less than `needed` bytes."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: needs about {decimal(needed)} of disk and has {decimal(free)} free; make "
            "room, choose a folder on another disk (--out), or take fewer tokens (--limit-tokens, "
            "or --tokens with --ready)"
        )
    return decimal(free)
