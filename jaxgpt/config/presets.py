"""Presets: from the flat keys of a TOML file or a nanoGPT config file to a checked `Config`.

Each value is decoded strictly as its field's type, and every error of a file is reported at once,
with file, key, value and remedy.
"""

import dataclasses
import json
import tomllib
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from jaxgpt.config.architecture import padded_vocab_size
from jaxgpt.config.batch import fields_of_accumulation
from jaxgpt.config.checks import ConfigError, did_you_mean
from jaxgpt.config.fields import DEFAULT_BATCH_SIZE, Config, flat_fields, names_with, with_fields
from jaxgpt.config.nanogpt import (
    as_fields,
    is_config_file,
    nanogpt_answer,
    read_settings,
    unused_settings,
)
from jaxgpt.config.roles import Role
from jaxgpt.files import named_path, read_file, user_path

BYTE_IDS = 257  # of the byte tokenizer, which the presets without a vocab_size have


def presets_dir() -> Path:
    """The folder of the presets: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def all_presets() -> list[Config]:
    """The presets of the package, largest card first, those without a card last."""
    presets = map(load_preset, packaged_presets())
    return sorted(presets, key=lambda cfg: (-(cfg.vram_gb or 0), cfg.preset))


def load_preset(
    name: str,
    nanogpt_flags: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = lambda message: None,
) -> Config:
    """The configuration of a preset by name, or of a TOML or nanoGPT config file by its path.

    `nanogpt_flags` replace what a nanoGPT config file assigns; `tell` is called with a sentence for
    each setting in it that has no effect here.

    Raises:
        UserError: if there is no such preset or file, or a key, type or value in it is wrong.
    """
    known = flat_fields().keys() - names_with(Role.DERIVED)
    if is_config_file(name):
        settings = read_settings(name, known) | dict(nanogpt_flags or {})
        source, values = name, as_fields(settings, name)
        for message in unused_settings(settings):
            tell(f"{name}: {message}")
    else:
        source, values = _read_toml(name)
    cfg = config_from(values, source, known)
    return with_fields(cfg, preset=name, eval_windows=cfg.windows_in(cfg.eval_iters))


def _read_toml(name: str) -> tuple[str, dict[str, Any]]:
    """The source that messages name, and the values of a preset by name or of a file by path."""
    is_path = name.endswith(".toml")
    if not is_path and name not in packaged_presets():
        raise ConfigError(_no_such_preset(name))
    path = user_path(name, "--preset") if is_path else presets_dir() / f"{name}.toml"
    source = name if is_path else path.name
    try:
        text = read_file(path).decode("utf-8-sig")  # without a BOM, which Windows writes
        return source, tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(_no_such_preset(name)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} cannot be read as TOML: {error}") from None


def describe_presets() -> str:
    """One line for each preset: name, true size, shape, and the card it is made for."""
    lines = []
    for cfg in all_presets():
        m = cfg.model
        card = f"{cfg.vram_gb} GB card" if cfg.vram_gb else "CPU or any GPU"
        rows = m.vocab_size or padded_vocab_size(BYTE_IDS)
        size = f"{dataclasses.replace(m, vocab_size=rows).parameter_count() / 1e6:.1f}M"
        shape = f"{m.n_layer}L/{m.n_head}H/{m.n_embd}"
        lines.append(f"  {cfg.preset:<11} {size:>7}  {shape:<12}  {card}")
    return "\n".join(lines)


def config_from(values: Mapping[str, Any], source: str, known: Collection[str]) -> Config:
    """The configuration of flat values.

    Raises:
        ConfigError: with every error, each naming `source`, the key, the value and the remedy.
    """
    decoded: dict[str, Any] = {}
    errors = []
    for key, value in values.items():
        if answer := nanogpt_answer(key, value):
            errors.append(f"{key} = {_shown(value)} {answer}")
        elif key not in known:
            errors.append(_unknown(key, value, known))
        else:
            try:
                decoded[key] = _decode(value, flat_fields()[key].type)
            except ValueError as error:
                errors.append(f"{key} = {_shown(value)}: {error}")
    if not errors:
        try:
            decoded |= fields_of_accumulation(
                decoded.get("gradient_accumulation_steps"),
                decoded.get("batch_size", DEFAULT_BATCH_SIZE),
                decoded.get("effective_batch_size"),
            )
            return with_fields(Config(), **decoded)
        except ValueError as error:
            errors = str(error).splitlines()
    raise ConfigError("\n".join(f"{source}: {error}" for error in errors))


def _decode(value: object, annotation: Any) -> Any:
    """A TOML or JSON value as a field's type; ValueError with what was expected."""
    if value == "":
        raise ValueError("expected a value, got an empty text")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("expected a smaller number")
    try:
        return msgspec.convert(value, annotation, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        raise ValueError(_plain(str(error), annotation)) from None


def _decode_path(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise ValueError("expected a path in quotes")
    return named_path(value)


def _plain(error: str, annotation: Any) -> str:
    """msgspec's message without backticks; for a Literal, the choices and the nearest one."""
    choices = [word for word in _members(annotation) if isinstance(word, str)]
    if choices:
        word = error.partition("'")[2].rpartition("'")[0]
        number = "a whole number or " if int in _members(annotation) else ""
        return f"expected {number}one of {', '.join(choices)}{did_you_mean(word, choices)}"
    return error[0].lower() + error[1:].replace("`", "")


def _members(annotation: Any) -> list[Any]:
    """The types in an annotation, and the values of its Literals."""
    parts = typing.get_args(annotation)
    return [member for part in parts for member in _members(part)] if parts else [annotation]


def _unknown(key: str, value: object, known: Collection[str]) -> str:
    if key == "preset":
        return "unknown key 'preset'; a preset cannot extend another: copy the keys it should share"
    if isinstance(value, dict):
        return f"unknown table [{key}]; put its keys at the top level"
    return f"unknown key '{key}'{did_you_mean(key, known)}"


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return "[...]" if isinstance(value, list) else "{...}"
    if isinstance(value, int) and abs(value) >= 2**63:  # Python may refuse to print it
        return "a number of more than 64 bits"
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


def packaged_presets() -> list[str]:
    """The names of the presets of the package, in no order."""
    return [path.stem for path in presets_dir().glob("*.toml")]


def _no_such_preset(name: str) -> str:
    near = did_you_mean(Path(name).stem if name.endswith(".toml") else name, packaged_presets())
    if name.endswith(".toml"):
        return f"--preset {name}: no such file{near}"
    others = f"Name one of these, or a file ending in .toml or .py:\n{describe_presets()}"
    return f"--preset {name}: no such preset{near}\n{others}"
