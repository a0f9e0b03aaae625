"""Start or resume: compares the run in a folder with the configuration asked for.

`config.json` holds the configuration the run was last started with, and so does every checkpoint.
A field's role (`config/roles.py`) says whether it may change when the run resumes.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, Resume, flat_fields, flat_values, names_with
from jaxgpt.config.resolved import Origin, Resolved, load_config, resolved_from
from jaxgpt.config.roles import Role
from jaxgpt.files import write_json
from jaxgpt.run.retention import (
    FOLDER,
    check_outside_checkpoints,
    finished_steps,
    readable_manifests,
)

if TYPE_CHECKING:  # it imports JAX
    from jaxgpt.run.checkpoint import Checkpoints

CONFIG_FILE = "config.json"


def check_same_run(asked: Config, origin: Origin) -> None:
    """Check that `asked`, not resolved yet, describes the saved run `origin.saved`.

    Raises:
        ConfigError: if it is another run, with a table of the differences.
    """
    saved = origin.saved
    assert saved is not None
    model = {name: getattr(origin.model, name) for name in vars(origin.model)}
    new = flat_values(asked) | model
    new |= {"init_from": origin.init_from, "tokenizer": origin.tokenizer}
    inherited = {name for name in names_with(Role.INHERITED) if new[name] is None}
    _refuse_differences(asked.out_dir, new, saved.flat(), names_with(Role.FIXED) - inherited)


def find_checkpoint(
    cfg: Resolved,
    data: dict[str, Any],
    checkpoints: "Checkpoints",
    tell: Callable[[str], object],
) -> int | None:
    """The step to resume from, None for a new run; `data` identifies the run's data.

    Raises:
        UserError: if the checkpoints or the data are another run's, or no checkpoint is intact.
    """
    check_config = partial(check_checkpoint, cfg, source=str(checkpoints.folder))
    step = checkpoints.recover(tell, cfg.asked.resume == "must", check_config)
    if step is not None:
        saved = checkpoints.manifest(step)
        check_config(saved.config)  # in every process
        check_stages(cfg, saved.config, step)
        check_data(saved.data, data, cfg.out_dir, cfg.asked.mixture.has_several)
    return step


def check_checkpoint(resolved: Resolved, restored: dict[str, Any], source: str) -> None:
    """Raises ConfigError if a checkpoint is of another run than the config.json beside it."""
    saved = resolved_from(restored, source).flat()
    _refuse_differences(resolved.asked.out_dir, resolved.flat(), saved, names_with(Role.FIXED))


def check_stages(resolved: Resolved, restored: dict[str, Any], step: int) -> None:
    """Raises ConfigError if the run has trained up to `step` on another mixture than asked for."""
    saved = resolved_from(restored, "the checkpoint").asked
    was, now = (
        # In the order of the names, too: each source's windows are shuffled by its place.
        [(at, [*shares.items()]) for at, shares in asked.mixture.stages if at < step]
        for asked in (saved, resolved.asked)
    )
    if was != now:
        given = " ".join(f"--mixture-at {at} {text}" for at, text in saved.mixture_at)
        raise ConfigError(
            f"--mixture-at: the run in {resolved.out_dir} is at step {step:,}, and stages before "
            f"that cannot change; {f'it has {given}' if given else 'it has none'}"
        )


def changes(resolved: Resolved, saved: Resolved) -> dict[str, str]:
    """'name old -> new', by name, for each setting that has changed since the run was saved."""
    new, old = resolved.flat(), saved.flat()
    shown = names_with(Role.TUNABLE) - names_with(Role.SILENT)
    names = [name for name in flat_fields() if name in shown and old[name] != new[name]]
    return {name: f"{name} {old[name]} -> {new[name]}" for name in names}


def load_saved(out_dir: Path, mode: Resume = "auto") -> Resolved | None:
    """The configuration of the run in `out_dir`, None if it has no checkpoint yet.

    Without config.json it comes from the newest checkpoint.

    Raises:
        ConfigError: if `out_dir` cannot be a run's folder, its configuration cannot be read, or
            there is a run and `mode` is 'never', or none and it is 'must'.
    """
    path = out_dir / CONFIG_FILE
    try:
        _check_writable(out_dir)
        steps = finished_steps(out_dir / FOLDER)
        has_config = path.exists()
    except OSError as error:
        raise ConfigError(f"--out-dir {out_dir}: {error}") from None
    _check_mode(out_dir, mode, steps)
    if not steps:
        _check_config_file(path)
        return None
    if not has_config:
        return _config_of_newest(out_dir / FOLDER)
    try:
        return load_config(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nDelete {path}: the run then resumes with the configuration in its newest "
            "checkpoint, and the file is written again. Or start anew with another --out-dir."
        ) from None


def _check_config_file(path: Path) -> None:
    """Raises ConfigError if a new run would overwrite a config.json that is not of a run."""
    try:
        if path.exists():
            load_config(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nIt will not be overwritten: delete it, or choose another --out-dir."
        ) from None


def _check_mode(out_dir: Path, mode: Resume, steps: list[int]) -> None:
    if mode == "never" and steps:
        raise ConfigError(
            f"{out_dir} has a run, saved at step {steps[-1]:,}, which '--resume never' leaves "
            "alone; choose another --out-dir, or use --resume auto"
        )
    if mode == "must" and not steps:
        raise ConfigError(
            f"{out_dir} has no finished checkpoint, but '--resume must' requires one; check "
            "--out-dir, or start with --resume auto"
        )


def _config_of_newest(folder: Path) -> Resolved | None:
    refused = None
    for step, manifest in reversed(readable_manifests(folder).items()):
        try:
            return resolved_from(manifest.config, str(folder / str(step)))
        except ConfigError as error:  # the one before may be a run's
            refused = refused or error
    if refused is not None:
        raise refused
    return None


def _check_writable(out_dir: Path) -> None:
    nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file; choose a folder for the run")
    check_outside_checkpoints(out_dir)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} cannot be written to; choose another folder")


def restore_config(resolved: Resolved) -> None:
    """Write `config.json` again if somebody has deleted it; if that fails, the next save tries."""
    with suppress(ConfigError):
        if not (resolved.out_dir / CONFIG_FILE).exists():
            save_config(resolved)


def save_config(resolved: Resolved) -> None:
    """Write `config.json`, atomically.

    Raises:
        ConfigError: if it cannot be written.
    """
    path = resolved.out_dir / CONFIG_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, resolved.flat())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None


def check_data(
    saved: dict[str, Any], found: dict[str, Any], out_dir: Path, in_mixture: bool = False
) -> None:
    """Raises ConfigError if the data is no longer what the run was trained on."""
    # A checkpoint of an older jaxgpt has fewer entries.
    changed = [name for name in found if name in saved and saved[name] != found[name]]
    if changed:
        was = ", ".join(f"{name} {saved.get(name)} -> {found[name]}" for name in changed)
        remedy = "restore it" if in_mixture else "name its data with --data-dir"
        raise ConfigError(
            f"the data is not what the run in {out_dir} was trained on ({was}); {remedy}, or start "
            "a new run with another --out-dir"
        )


def _refuse_differences(
    out_dir: Path | None,
    new: Mapping[str, Any],
    old: Mapping[str, Any],
    names: frozenset[str],
) -> None:
    """Raises ConfigError with a table of the fields among `names` that differ."""
    differing = [name for name in flat_fields() if name in names and old[name] != new[name]]
    if not differing:
        return
    rows = [f"  {name:<22} {old[name]!s:>12} {new[name]!s:>12}" for name in differing]
    raise ConfigError(
        "\n".join(
            [
                f"{out_dir} has another run; resume it with its own settings, or start this one "
                "elsewhere with --out-dir. Architecture, tokenizer, data, seed, effective batch "
                "and evaluation cannot change; --batch-size, --max-iters and the intervals can:",
                f"  {'':<22} {'the run':>12} {'asked for':>12}",
                *rows,
            ]
        )
    )
