"""Presets and saved configurations: flat TOML or JSON keys in, a checked `Config` out.

tyro does not look at the defaults it is given, so keys, types and choices are checked here, and
every fault of a file is reported at once with the file, the key, the value and the remedy.
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt.config import Config, ConfigError, flat_fields, with_fields


def presets_dir() -> Path:
    """Where the presets lie: beside the package in a checkout, inside it in a wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def preset_names() -> list[str]:
    """The presets of the package, largest card first, those without a card last."""
    sizes = {p.stem: load_preset(p.stem).vram_gb or 0 for p in presets_dir().glob("*.toml")}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def load_preset(name: str) -> Config:
    """The configuration of a preset by name, or of a TOML file by its path.

    Raises:
        ConfigError: if there is no such preset or file, or a key, type or value in it is wrong.
    """
    path = Path(name) if name.endswith(".toml") else presets_dir() / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(_no_such_preset(name))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as fault:
        raise ConfigError(f"{path.name} cannot be read as TOML: {fault}") from None
    return _from_flat({**values, "preset": name}, path.name)


def preset_for_memory(gigabytes: float) -> str:
    """The tier of a card with that much memory: the largest one that is not larger than it."""
    tiers = {"80gb": 80, "48gb": 48, "24gb": 24, "16gb": 16}
    # Drivers report a little less than the number on the box (24,564 MiB on a 24 GB card).
    fitting = [name for name, size in tiers.items() if gigabytes >= 0.93 * size]
    return fitting[0] if fitting else "12gb"


def _no_such_preset(name: str) -> str:
    if name.endswith(".toml"):
        return f"--preset {name}: no such file"
    names = [p.stem for p in presets_dir().glob("*.toml")]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"--preset {name}: no such preset; {hint}There are:\n{describe_presets()}"


def describe_presets() -> str:
    """One line for each preset: name, true size, shape, and the card it is made for."""
    lines = []
    for name in preset_names():
        cfg = load_preset(name)
        m = cfg.model
        card = f"{cfg.vram_gb} GB card" if cfg.vram_gb else "CPU or any GPU"
        size = f"{m.parameter_count() / 1e6:.1f}M" if m.vocab_size else "small"
        lines.append(f"  {name:<11} {size:>7}  {m.n_layer}L/{m.n_head}H/{m.n_embd}  {card}")
    return "\n".join(lines)


def load_config(path: Path) -> Config:
    """Read back the `config.json` of a run.

    Raises:
        ConfigError: if the file is unreadable or holds what this version does not know.
    """
    try:
        values = json.loads(path.read_text())
        return _from_flat(values, path.as_posix())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise ConfigError(f"{path} cannot be read as a run's configuration: {fault}") from None


def _from_flat(values: Mapping[str, Any], source: str) -> Config:
    """Build a Config from flat keys, every fault reported at once with file, key and remedy."""
    fields = flat_fields()
    faults: list[str] = []
    picked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            faults.append(f"unknown key '{key}'{hint}")
        elif (fault := _type_fault(key, value, fields[key].type)) is not None:
            faults.append(fault)
        else:
            is_path = "Path" in str(fields[key].type) and value is not None
            picked[key] = Path(value) if is_path else value
    accumulation = picked.get("gradient_accumulation_steps")
    if accumulation is not None and "effective_batch_size" not in picked:
        picked["effective_batch_size"] = accumulation * picked.get("batch_size", Config.batch_size)
    try:
        cfg = with_fields(Config(), **picked)
    except ConfigError as fault:
        faults += str(fault).splitlines()
    if faults:
        raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults))
    return cfg


def _type_fault(key: str, value: Any, annotation: Any) -> str | None:
    choices = [c for part in _union_members(annotation) for c in _choices(part)]
    if choices:
        if value in choices:
            return None
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"{key} = {value!r} is not one of {', '.join(choices)}{hint}"
    members = set(_union_members(annotation))
    accepted: set[type] = members | ({int} if float in members else set())
    if Path in members:
        accepted.add(str)
    # bool is a subclass of int, and `batch_size = true` is a slip.
    if type(value) in accepted:
        return None
    wanted = " or ".join(_SPOKEN[t] for t in members if t in _SPOKEN)
    return f"{key} = {value!r} must be {wanted}"


_SPOKEN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
}


def _union_members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if isinstance(annotation, types.UnionType):
        yield from typing.get_args(annotation)
    else:
        yield annotation


def _choices(annotation: Any) -> tuple[str, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
