"""Presets and saved configurations: flat TOML or JSON keys in, a checked `Config` out.

tyro does not look at the defaults it is given, so keys, types and choices are checked here, and
every error of a file is reported at once with the file, the key, the value and the remedy.
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_fields, with_fields

# What a run finds out and keeps in its config.json; a preset has no say in it.
FOUND_OUT = {"preset", "n_vocab", "eval_windows", "auto_batch_size"}

# Settings of nanoGPT that mean nothing here, and what serves instead.
NANOGPT_SETTINGS = {
    "compile": "drop it: every step is compiled by XLA",
    "wandb_log": "drop it: curves go to TensorBoard files and metrics.jsonl in the run's folder",
    "wandb_project": "drop it: curves go to TensorBoard files in the run's folder",
    "wandb_run_name": "use --out-dir: a run is named by its folder",
    "always_save_checkpoint": (
        "drop it: every evaluation saves a checkpoint; --keep-checkpoints N says how many of the "
        "newest are kept besides the best"
    ),
    "eval_only": "drop it: every run evaluates at step 0, at each --eval-interval and at its end",
    "backend": "drop it: XLA chooses its own collectives",
}


def presets_dir() -> Path:
    """Where the presets lie: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """The presets of the package, largest card first, those without a card last."""
    sizes = {name: load_preset(name).vram_gb or 0 for name in _packaged()}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def load_preset(name: str) -> Config:
    """The configuration of a preset by name, or of a TOML file by its path.

    Raises:
        ConfigError: if there is no such preset or file, or a key, type or value in it is wrong.
    """
    is_path = name.endswith(".toml")
    if not is_path and name not in _packaged():
        raise ConfigError(_no_such_preset(name))
    path = Path(name) if is_path else presets_dir() / f"{name}.toml"
    source = name if is_path else path.name
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows begins with a BOM
    except FileNotFoundError:
        raise ConfigError(_no_such_preset(name)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} cannot be read as TOML: {error}") from None
    cfg = _from_flat(values, source, known=flat_fields().keys() - FOUND_OUT)
    return with_fields(cfg, preset=name)


def preset_for_memory(gigabytes: float) -> str:
    """The tier of a card with that much memory: the largest one that is not larger than it."""
    tiers = {"80gb": 80, "48gb": 48, "24gb": 24, "16gb": 16}
    # Drivers report a little less than the number on the box (24,564 MiB on a 24 GB card).
    fitting = [name for name, size in tiers.items() if gigabytes >= 0.93 * size]
    return fitting[0] if fitting else "12gb"


def describe_presets() -> str:
    """One line for each preset: name, true size, shape, and the card it is made for."""
    lines = []
    for name in preset_names():
        cfg = load_preset(name)
        m = cfg.model
        card = f"{cfg.vram_gb} GB card" if cfg.vram_gb else "CPU or any GPU"
        size = f"{m.parameter_count() / 1e6:.1f}M" if m.vocab_size else "small"
        shape = f"{m.n_layer}L/{m.n_head}H/{m.n_embd}"
        lines.append(f"  {name:<11} {size:>7}  {shape:<11}  {card}")
    return "\n".join(lines)


def load_config(path: Path) -> Config:
    """Read back the `config.json` of a run.

    Raises:
        ConfigError: if the file is unreadable or holds what this version does not know.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no table of settings")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a run's configuration: {error}") from None
    return config_from(values, str(path))


def config_from(values: Mapping[str, Any], source: str) -> Config:
    """The configuration of a run from its flat values, as `config.flat_values` made them.

    Raises:
        ConfigError: if there are values that this version does not know, naming `source`.
    """
    return _from_flat(values, source, known=flat_fields().keys())


def nanogpt_answer(setting: str, value: object) -> str | None:
    """What serves instead of a setting that only nanoGPT has; None for one that is known here."""
    if setting in NANOGPT_SETTINGS:
        return f"is nanoGPT's and has no meaning here; {NANOGPT_SETTINGS[setting]}"
    if setting == "init_from" and value in ("resume", "scratch"):
        return (
            "is nanoGPT's; drop it: the same command resumes a run from its --out-dir, and a new "
            "--out-dir starts from scratch"
        )
    if setting == "device" and isinstance(value, str) and value.startswith(("cuda", "mps")):
        return (
            "is nanoGPT's; here it is gpu (CUDA_VISIBLE_DEVICES=N chooses among several), cpu or "
            "auto"
        )
    if setting == "dtype" and value == "float16":
        return "is nanoGPT's and needs loss scaling; here it is bfloat16, float32 or auto"
    return None


def did_you_mean(word: str, known: Collection[str], prefix: str = "") -> str:
    """The end of a message about a word that is not known: the nearest that is, if one is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean '{prefix}{near[0]}'?" if near else ""


# ---------------------------------------------------------------- what a mistake is answered with


def _packaged() -> list[str]:
    return [path.stem for path in presets_dir().glob("*.toml")]


def _no_such_preset(name: str) -> str:
    near = did_you_mean(Path(name).stem if name.endswith(".toml") else name, _packaged())
    if name.endswith(".toml"):
        return f"--preset {name}: no such file{near}"
    others = f"There are these, and files ending in .toml:\n{describe_presets()}"
    return f"--preset {name}: no such preset{near}\n{others}"


def _from_flat(values: Mapping[str, Any], source: str, known: Collection[str]) -> Config:
    """Build a Config from flat keys, every error reported at once with file, key and remedy."""
    annotations = {name: field.type for name, field in flat_fields().items() if name in known}
    errors = [_error_of(key, value, annotations) for key, value in values.items()]
    picked = {} if any(errors) else {k: _converted(v, annotations[k]) for k, v in values.items()}
    accumulation = picked.get("gradient_accumulation_steps")
    if accumulation is not None and "effective_batch_size" not in picked:
        picked["effective_batch_size"] = accumulation * picked.get("batch_size", Config.batch_size)
        if accumulation > 0:
            del picked["gradient_accumulation_steps"]  # of all devices; those of one follow
    try:
        cfg = with_fields(Config(), **picked)
    except ConfigError as error:
        errors += str(error).splitlines()
    if any(errors):
        raise ConfigError("\n".join(f"{source}: {error}" for error in errors if error))
    return cfg


def _error_of(key: str, value: object, annotations: Mapping[str, Any]) -> str | None:
    # Python reads any hexadecimal number, and then refuses to print it.
    if type(value) is int and abs(value) >= 2**63:
        return f"{key} is a number of more than 64 bits"
    if answer := nanogpt_answer(key, value):
        return f"{key} = {_as_toml(value)} {answer}"
    if key in annotations:
        return _type_error(key, value, union_members(annotations[key]))
    if key == "preset":
        return "unknown key 'preset'; a preset cannot build on another, copy what it should share"
    if isinstance(value, dict):
        return f"unknown table [{key}]; keys stand at the top, under no table"
    return f"unknown key '{key}'{did_you_mean(key, annotations)}"


def _type_error(key: str, value: object, members: Sequence[Any]) -> str | None:
    choices = [choice for member in members for choice in choices_of(member)]
    if choices:
        if value in choices:
            return None
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{key} = {_as_toml(value)} is not one of {', '.join(choices)}{near}"
    if value == "":
        return f"{key} is empty"
    # bool is a subclass of int, and `batch_size = true` is a slip.
    if type(value) in members or any(type(value) is _ALSO.get(member) for member in members):
        return None
    wanted = " or ".join(SPOKEN[member] for member in members if member in SPOKEN)
    return f"{key} = {_as_toml(value)} must be {wanted}"


_ALSO: dict[type, type] = {float: int, Path: str}  # how files write what TOML has no type for
SPOKEN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text in quotes",
    Path: "a path in quotes",
}


def _converted(value: Any, annotation: Any) -> Any:
    for member in union_members(annotation):
        if type(value) is _ALSO.get(member):
            return member(value)
    return value


def _as_toml(value: object) -> str:
    if isinstance(value, list | dict):
        return "[...]" if isinstance(value, list) else "{...}"
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


def union_members(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have, out of its annotation."""
    if typing.get_origin(annotation) is Annotated:
        return union_members(typing.get_args(annotation)[0])
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The words that a Literal allows."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
