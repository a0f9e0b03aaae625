"""Which checkpoints a run's folder has, which are deleted, and what a killed run left behind.

Everything is read from disk each time. Only finished checkpoints count, those with a manifest, so
that the last good one is never deleted in favour of one that is not on disk yet.
"""

import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jaxgpt.config.checks import ConfigError
from jaxgpt.errors import UserError
from jaxgpt.files import delete
from jaxgpt.run.integrity import MANIFEST, DamagedError, Manifest, read_manifest

FOLDER = "checkpoints"
STEP = re.compile(r"0|[1-9][0-9]{0,18}")  # the name of a checkpoint
# A checkpoint is renamed before it is deleted, so that a kill leaves no partial one.
DELETED = ".deleted"
DAMAGED = ".damaged"


def check_outside_checkpoints(path: Path) -> None:
    """Raises OSError if `path` is a checkpoint or within one, which would no longer be intact."""
    for folder in (path.absolute(), *path.absolute().parents):
        is_step = folder.parent.name == FOLDER and STEP.fullmatch(folder.name)
        if is_step and (folder / MANIFEST).exists():
            raise OSError(f"{folder} is a run's checkpoint; choose another folder")


def finished_steps(folder: Path) -> list[int]:
    """The steps with a finished checkpoint in `folder`, ascending."""
    return sorted(int(path.name) for path in _committed(folder) if _has_manifest(path))


def readable_manifests(folder: Path) -> dict[int, Manifest]:
    """The manifests of the finished checkpoints by step, ascending, without damaged ones."""
    found = {}
    for step in finished_steps(folder):
        with suppress(DamagedError):  # reported when a run resumes from it
            found[step] = read_manifest(folder / str(step))
    return found


def best_step(folder: Path) -> tuple[int, float] | None:
    """(step, validation loss) of the best finished checkpoint, or None if none has a loss."""
    losses = {step: manifest.val_loss for step, manifest in readable_manifests(folder).items()}
    scored = [(x, step) for step, x in losses.items() if x is not None and math.isfinite(x)]
    if not scored:
        return None
    loss, step = min(scored)
    return step, loss


def prune(folder: Path, keep: int) -> None:
    """Delete all finished checkpoints but the newest `keep` and the best; and all leftovers."""
    remove_leftovers(folder)
    steps, best = finished_steps(folder), best_step(folder)
    failed = None
    for step in steps[:-keep]:
        if best is None or step != best[0]:
            try:
                remove(folder / str(step))
            except OSError as error:  # the others can still be deleted
                failed = error
    if failed is not None:
        raise failed


def remove_leftovers(folder: Path) -> None:
    """Delete the leftovers of failed saves; call it between saves.

    After a failed save a thread of Orbax may still be writing and recreate what was deleted; the
    next call deletes that.
    """
    for path in _leftovers(folder):
        with suppress(OSError):
            delete(path)


def check_writable(folder: Path, needed: int) -> None:
    """Raises OSError if fewer than `needed` bytes are free, or no folder can be made there.

    Otherwise the save would fill the disk, or Orbax would retry making its folder for 20 minutes.
    """
    tempfile.TemporaryDirectory(suffix=DELETED, dir=folder).cleanup()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free")


def remove(path: Path) -> None:
    """Delete a checkpoint's folder; a partly deleted one never counts as a checkpoint."""
    delete(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Rename a folder so that it counts as a leftover; returns its new path."""
    doomed = path.with_name(path.name.removesuffix(DELETED) + DELETED)
    if path != doomed:
        if os.path.lexists(doomed):
            delete(doomed)
        path.rename(doomed)
    return doomed


def remove_failed(folder: Path, step: int) -> None:
    """Delete what a failed save of `step` wrote, to free its space."""
    with suppress(OSError):
        for path in folder.glob(f"{step}*"):
            if path.name.partition(".")[0] == str(step) and path.suffix != DAMAGED:
                remove(path)


def remove_unfinished(folder: Path) -> None:
    """Delete the leftovers of killed saves and deletions.

    Needs the run's lock. What cannot be deleted, but no longer counts, stays.

    Raises:
        UserError: if there are checkpoints and none has a manifest. Every run finishes that of
            step 0 first, so these are no leftovers but an incomplete copy of a run.
    """
    unfinished = [path for path in _committed(folder) if not _has_manifest(path)]
    if not finished_steps(folder) and any(int(path.name) for path in unfinished):
        missing = max(unfinished, key=lambda path: int(path.name)) / MANIFEST
        raise UserError(
            f"{missing} is missing, so the checkpoint may be incomplete; copy the whole folder "
            "again, or start a new run with another --out-dir"
        )
    for path in unfinished:
        _set_aside(path)
    remove_leftovers(folder)


def refuse_other_runs(folder: Path) -> None:
    """Raises UserError if the checkpoints are of several runs, which somebody has mixed."""
    steps: dict[str, list[int]] = {}
    for step, manifest in readable_manifests(folder).items():
        if manifest.run is not None:
            steps.setdefault(manifest.run, []).append(step)
    if len(steps) > 1:
        each = " and ".join(f"({', '.join(map(str, group))})" for group in steps.values())
        raise UserError(
            f"{folder} has checkpoints of {len(steps)} runs {each}; move those of the others away"
        )


def newest_intact(
    folder: Path,
    check: Callable[[Path], object],
    warn: Callable[[str], object],
    strict: bool = False,
    rename: bool = True,
) -> int | None:
    """The newest step whose checkpoint passes `check`; None if there is no checkpoint at all.

    `warn` is called for each newer, damaged one. With `rename` they become `<step>.damaged`, since
    the run will reach these steps again. Nothing is renamed unless an intact one is found.

    Raises:
        UserError: if none is intact, or, with `strict`, if the newest is not. The error of `check`
            for the newest, if it is no DamagedError and no older one passes: all are another run's.
    """
    damaged: list[tuple[int, UserError]] = []
    for step in reversed(finished_steps(folder)):
        try:
            check(folder / str(step))
        except (DamagedError, ConfigError) as error:
            if strict and not isinstance(error, DamagedError):
                raise
            if strict:
                raise UserError(
                    f"checkpoint {step} is damaged: {error}; '--resume must' accepts only the "
                    "newest; --resume auto falls back to the newest that is intact"
                ) from None
            damaged.append((step, error))
            continue
        for bad, reason in damaged:
            done = f", so checkpoint {step} is used"
            if rename and (name := _rename_damaged(folder / str(bad))):
                done = f" and was renamed to {name}"
            other = "" if isinstance(reason, DamagedError) else "its config is not the run's: "
            warn(f"checkpoint {bad} is damaged{done}: {other}{reason}")
        return step
    if damaged and not isinstance(damaged[0][1], DamagedError):
        raise damaged[0][1]
    if damaged:
        each = "\n".join(f"checkpoint {step}: {reason}" for step, reason in damaged)
        raise UserError(
            f"no checkpoint in {folder} is intact; restore one from a backup, or start a new run "
            f"with another --out-dir\n{each}"
        )
    return None


def _rename_damaged(path: Path) -> str | None:
    """The checkpoint's new name; None if somebody has deleted it meanwhile."""
    aside = path.with_name(f"{path.name}{DAMAGED}")
    with suppress(FileNotFoundError):
        delete(aside)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return None
    return aside.name


def _leftovers(folder: Path) -> list[Path]:
    """Folders of saves and deletions that did not finish."""
    return [
        path
        for pattern in ("*.orbax-checkpoint-tmp*", f"*{DELETED}")
        for path in _entries(folder)
        if path.match(pattern) and path.is_dir()
    ]


def _entries(folder: Path) -> list[Path]:
    # `glob` would take a folder that cannot be listed for an empty one.
    try:
        return [folder / name for name in os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _has_manifest(path: Path) -> bool:
    # A link to a missing file, or one that cannot be read, is a damaged manifest, not a save that
    # was killed, which would be deleted.
    with suppress(OSError):
        try:
            os.lstat(path / MANIFEST)
        except FileNotFoundError:
            return False
    return True


def _committed(folder: Path) -> list[Path]:
    """Folders that Orbax has renamed from their temporary name to a step, in no order."""
    named = [path for path in _entries(folder) if STEP.fullmatch(path.name)]
    return [path for path in named if path.is_dir()]  # not a file of the user's with such a name
