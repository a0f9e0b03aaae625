"""Which checkpoints a run's folder holds, which of them go, and what a killed run left behind.

Everything is read from the disk each time: what a program believes it has saved is another matter.
Only finished checkpoints count, those with a manifest, so that the last good one is never deleted
in favour of one that is not on disk yet.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.run.integrity import MANIFEST, DamagedError, read_manifest

FOLDER = "checkpoints"
# A folder goes in two motions, so that a kill between them leaves no half of a checkpoint.
DELETED = ".deleted"
DAMAGED = ".damaged"


def finished_steps(folder: Path) -> list[int]:
    """The steps with a finished checkpoint in `folder`, ascending; [] if there is none."""
    return sorted(int(path.name) for path in _committed(folder) if (path / MANIFEST).exists())


def best_step(folder: Path) -> tuple[int, float] | None:
    """(step, validation loss) of the best finished checkpoint, or None where none has a loss."""
    scored = []
    for step in finished_steps(folder):
        try:
            loss = read_manifest(folder / str(step))["val_loss"]
        except DamagedError:
            continue  # whoever goes on from it is told; it cannot be the best
        if loss is not None and math.isfinite(loss):
            scored.append((loss, step))
    if not scored:
        return None
    loss, step = min(scored)
    return step, loss


def prune(folder: Path, keep: int) -> None:
    """Delete all finished checkpoints but the newest `keep` and the best: two rules, never one.

    To be called between saves, as `clear`, which is done too.
    """
    clear(folder)
    steps, best = finished_steps(folder), best_step(folder)
    for step in steps[:-keep]:
        if best is None or step != best[0]:
            remove(folder / str(step))


def clear(folder: Path) -> None:
    """Delete what failed saves left, between saves, unless a thread of Orbax's still writes to it.

    Some do after their save has failed, and put back what was deleted: then it goes next time.
    """
    for path in _leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)


def check_room(folder: Path, needed: int) -> None:
    """Raises OSError if fewer than `needed` bytes are free.

    Better than to find out by writing: a disk full to the last byte takes no metrics either.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free")


def remove(path: Path) -> None:
    """Delete a checkpoint's folder, of which nothing is taken for a checkpoint on the way."""
    doomed = path.with_name(path.name.removesuffix(DELETED) + DELETED)
    if path != doomed:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what killed saves and deletions left, and return the names; needs the run's lock.

    Raises:
        UserError: if the only checkpoints there are have no manifest. Every run finishes the one of
            step 0 first, so these are no leftovers but somebody's copy of a run without its parts.
    """
    unfinished = [path for path in _committed(folder) if not (path / MANIFEST).exists()]
    if not finished_steps(folder) and any(int(path.name) for path in unfinished):
        missing = max(unfinished, key=lambda path: int(path.name)) / MANIFEST
        raise UserError(
            f"{missing} is missing, so nobody can tell whether the checkpoint is whole; copy the "
            "whole folder again, or start anew with another --out-dir"
        )
    leftovers = {*_leftovers(folder), *unfinished}
    for path in leftovers:
        remove(path)
    return sorted(path.name for path in leftovers)


def newest_sound(
    folder: Path, check: Callable[[Path], object], tell: Callable[[str], object], strict: bool
) -> int | None:
    """The newest step whose checkpoint passes `check`; None if there is no checkpoint at all.

    Damaged ones above it are named to `tell` and put aside as `<step>.damaged`, since the run will
    come by these steps again. Nothing is changed unless a sound one is found.

    Raises:
        UserError: if none is sound, or, if `strict`, if the newest is not.
    """
    damaged: list[tuple[int, DamagedError]] = []
    for step in reversed(finished_steps(folder)):
        try:
            check(folder / str(step))
        except DamagedError as error:
            if strict:
                raise UserError(
                    f"checkpoint {step} is damaged: {error}; --resume must goes on from the newest "
                    "or not at all; --resume auto falls back to the newest that is sound"
                ) from None
            damaged.append((step, error))
            continue
        for bad, reason in damaged:
            aside = folder / f"{bad}{DAMAGED}"
            shutil.rmtree(aside, ignore_errors=True)
            (folder / str(bad)).rename(aside)
            tell(f"checkpoint {bad} is damaged and put aside as {aside.name}: {reason}")
        return step
    if damaged:
        each = "\n".join(f"checkpoint {step}: {reason}" for step, reason in damaged)
        raise UserError(
            f"no checkpoint in {folder} is sound, so the run cannot go on; bring one back from a "
            f"copy, or start anew with another --out-dir\n{each}"
        )
    return None


def _leftovers(folder: Path) -> list[Path]:
    """Folders of saves and deletions that did not end."""
    return [
        path
        for pattern in ("*.orbax-checkpoint-tmp*", f"*{DELETED}")
        for path in folder.glob(pattern)
        if path.is_dir()
    ]


def _committed(folder: Path) -> list[Path]:
    """What Orbax has renamed from its temporary name to a step's, in no order."""
    named = [p for p in folder.glob("*") if p.name.isdecimal() and p.name == str(int(p.name))]
    return [path for path in named if path.is_dir()]  # a file of that name is somebody else's
