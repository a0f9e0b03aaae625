"""Starting or going on: what a run's folder says about the run that is asked for.

`config.json` holds the configuration the run was last started with, and so does every checkpoint.
Some fields may change when a run goes on (how long, how often, where, how much a device holds at a
time); the rest make it another run.
"""

import json
import os
from pathlib import Path
from typing import Any

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, Resume, flat_values, with_fields
from jaxgpt.config.presets import config_from, load_config
from jaxgpt.files import atomic_write
from jaxgpt.run.integrity import DamagedError, read_manifest
from jaxgpt.run.retention import FOLDER, finished_steps

CONFIG_FILE = "config.json"
# A run keeps these from its creation unless a flag says otherwise.
KEPT = ("lr_decay_iters", "vocab_size", "n_vocab")
# A run keeps these whatever a flag says: two evaluations of the same weights must agree.
FIXED = ("eval_windows",)
MAY_CHANGE = {
    *("preset", "max_iters", "lr_decay_iters", "decay_lr", "learning_rate", "min_lr"),
    *("warmup_iters", "weight_decay", "beta1", "beta2", "grad_clip", "dropout"),
    *("batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval", "skip_spikes"),
    *("checkpoint_minutes", "keep_checkpoints", "sample_tokens", "out_dir", "data_dir", "device"),
    *(
        "auto_batch_size",
        "scan_layers",
        "mesh",
        "dtype",
        "remat",
        "vram_gb",
        "hellaswag",
        "lambada",
        "resume",
        "deterministic",
    ),
}
# Of these, what nobody needs to be told when it has changed.
UNTOLD = {"preset", "out_dir", "data_dir", "vram_gb", "resume", "gradient_accumulation_steps"}


def continue_from(cfg: Config, saved: Config) -> Config:
    """The configuration of a run that goes on: `cfg`, with what the run keeps from `saved`.

    Raises:
        ConfigError: if `cfg` is another run than `saved`, with a table of the differences.
    """
    new, old = flat_values(cfg), flat_values(saved)
    kept = {name: old[name] for name in KEPT if new[name] is None}
    kept |= {name: old[name] for name in FIXED}
    new |= kept
    differing = [name for name in old if name not in MAY_CHANGE and old[name] != new[name]]
    if differing:
        raise ConfigError(_difference_table(cfg, differing, old, new))
    return with_fields(cfg, **kept)


def changes(cfg: Config, saved: Config) -> list[str]:
    """'name old -> new' for each setting that the run goes on with another value of."""
    new, old = flat_values(cfg), flat_values(saved)
    names = [name for name in old if name in MAY_CHANGE - UNTOLD and old[name] != new[name]]
    return [f"{name} {old[name]} -> {new[name]}" for name in names]


def check_config(cfg: Config, restored: dict[str, Any], source: str) -> None:
    """Raises ConfigError if a checkpoint is another run's than the config.json beside it."""
    continue_from(cfg, config_from(restored, source))


def load_saved(out_dir: Path, mode: Resume = "auto") -> Config | None:
    """The configuration of the run in `out_dir`, None where no run has got to a checkpoint yet.

    A run whose config.json is gone is known by its newest checkpoint.

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
        return None
    if not has_config:
        return _config_of_newest(out_dir / FOLDER, steps)
    try:
        return load_config(path)
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nDelete {path}: the run goes on with the configuration in its newest "
            "checkpoint, and the file is written again. Or start anew with another --out-dir."
        ) from None


def _check_mode(out_dir: Path, mode: Resume, steps: list[int]) -> None:
    if mode == "never" and steps:
        raise ConfigError(
            f"{out_dir} has a run, of which step {steps[-1]:,} is saved, and --resume never starts "
            "one anew; choose another --out-dir, or go on with --resume auto"
        )
    if mode == "must" and not steps:
        raise ConfigError(
            f"{out_dir} has no finished checkpoint, and --resume must goes on from one; check "
            "--out-dir, or start with --resume auto"
        )


def _config_of_newest(folder: Path, steps: list[int]) -> Config | None:
    for step in reversed(steps):
        try:
            values = read_manifest(folder / str(step)).config
        except DamagedError:
            continue  # whoever goes on from it is told
        return config_from(values, str(folder / str(step)))
    return None


def _check_writable(out_dir: Path) -> None:
    nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file; choose a folder for the run")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"{nearest} cannot be written to; choose another folder")


def save_config(cfg: Config, out_dir: Path) -> None:
    """Write `config.json`, whole or not at all.

    Raises:
        ConfigError: if it cannot be written.
    """
    path = out_dir / CONFIG_FILE
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(flat_values(cfg), indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None


def check_data(saved: dict[str, Any], found: dict[str, Any], out_dir: Path) -> None:
    """Raises ConfigError if the data is no longer what the run was trained on."""
    # A checkpoint of an older jaxgpt says less of its data.
    changed = [name for name in found if name in saved and saved[name] != found[name]]
    if changed:
        was = ", ".join(f"{name} {saved.get(name)} -> {found[name]}" for name in changed)
        raise ConfigError(
            f"the data is not what the run in {out_dir} was trained on ({was}); give it back its "
            "data with --data-dir, or start a new run with another --out-dir"
        )


def _difference_table(
    cfg: Config, names: list[str], old: dict[str, Any], new: dict[str, Any]
) -> str:
    rows = [f"  {name:<22} {old[name]!s:>12} {new[name]!s:>12}" for name in names]
    return "\n".join(
        [
            f"{cfg.out_dir} holds another run; go on with its own settings, or start this one "
            "elsewhere with --out-dir. Architecture, tokenizer, data, seed, effective batch and "
            "evaluation stay; --batch-size, --max-iters and the intervals may change:",
            f"  {'':<22} {'the run':>12} {'asked for':>12}",
            *rows,
        ]
    )
