"""A new run, resolved for a card, and the command line that trains it; imports no JAX."""

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any

from jaxgpt.config.checks import as_flag
from jaxgpt.config.fields import Config, Dtype, flat_fields, names_with, with_fields
from jaxgpt.config.mesh_shape import ONE_DEVICE, MeshShape
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Origin, Resolved, resolve
from jaxgpt.config.roles import Role
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.planning.gpus import presets_for

TRAIN = "python -m jaxgpt.train"
SHAPE = ("n_layer", "n_head", "n_embd")


def resolve_new(asked: Config, dtype: Dtype, mesh: MeshShape = ONE_DEVICE) -> Resolved:
    """`asked` as a new run with random weights. Raises ConfigError as `resolve` does."""
    n_vocab = _n_vocab(asked.tokenizer, *filter(None, asked.mixture.folders.values()))
    return resolve(asked, Origin.of(asked), n_vocab=n_vocab, mesh=mesh, dtype=dtype)


@functools.cache
def _n_vocab(tokenizer: str, *folders: Path) -> int:  # which may have a copy of the tokenizer
    return load_tokenizer(tokenizer, *folders).n_vocab  # a tenth of a second, for many presets


def train_command(cfg: Resolved) -> str:
    """The command line that trains `cfg`: its preset, and a flag for each field that differs."""
    differing = _differences(cfg, load_preset(cfg.asked.preset))
    words = ["--preset", cfg.asked.preset]
    for name, value in differing.items():
        for given in value if isinstance(value, list) else [[value]]:  # a flag that is repeated
            words += [as_flag(name), *map(str, given)]
    if set(SHAPE) & differing.keys():  # no longer a run of the preset
        size = f"{cfg.model.parameter_count() / 1e6:.0f}m"
        words += ["--out-dir", f"runs/{Path(cfg.asked.preset).stem}-{size}"]
    return f"{TRAIN} {shlex.join(words)}"


def _differences(cfg: Resolved, preset: Config) -> dict[str, Any]:
    """Fields of `cfg` that are not the preset's, by flat name, but for those that need no flag."""
    base = resolve_new(preset, cfg.dtype)
    # Neither is printed: the dtype is the card's own, and the decay ends with the run.
    old = {**base.flat(), "dtype": preset.dtype, "lr_decay_iters": cfg.asked.max_iters}
    new = {**cfg.flat(), "dtype": cfg.asked.dtype}
    names = [name for name in flat_fields() if name not in names_with(Role.IMPLIED)]
    return {name: new[name] for name in names if new[name] != old[name]}


def of_its_preset(cfg: Resolved) -> Resolved:
    """`cfg` named after the preset, its own or one of its shape, that differs from it the least."""

    def has_its_shape(preset: Config) -> bool:
        return all(getattr(preset.model, name) == getattr(cfg.model, name) for name in SHAPE)

    asked = load_preset(cfg.asked.preset)
    if has_its_shape(asked):
        return cfg
    same = [preset for preset in presets_for(cfg.dtype) if has_its_shape(preset)]
    nearest = min([*same, asked], key=lambda preset: len(_differences(cfg, preset)))
    return dataclasses.replace(cfg, asked=with_fields(cfg.asked, preset=nearest.preset))
