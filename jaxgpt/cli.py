"""From argv to one frozen `Config`: which preset, which flags, and plain answers to mistakes.

Everything here happens before JAX is imported, which takes seconds that a typo should not cost.
"""

import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NoReturn

import tyro

from jaxgpt.config import Config, ConfigError, flat_fields
from jaxgpt.presets import describe_presets, did_you_mean, load_preset, nanogpt_answer

# Flags that are no fields: the help, and what tyro has for shells that complete.
OTHER_FLAGS = ("help", "tyro-print-completion", "tyro-write-completion")


def parse(
    argv: Sequence[str], *, prog: str, description: str, default_preset: Callable[[], str | None]
) -> Config:
    """The configuration that `argv` asks for; a mistake ends the process with exit code 2.

    `default_preset` is asked for a preset's name when `argv` has none; None lists the presets.
    """
    try:
        flags = _flags(argv)
        _refuse_at_sight(argv, flags)
        preset = flags.get("preset") or default_preset()
        if preset is None and {"-h", "--help"} & set(argv):
            preset = Config.preset
        if preset is None:
            raise ConfigError(
                "no GPU was found to choose a preset for; say which one with --preset NAME:\n"
                + describe_presets()
            )
        base = load_preset(preset)
        draft = _parse_flags(argv, base, prog=prog, description=description)
        return _settle(draft, base, flags)
    except ConfigError as fault:
        fail(prog, str(fault))


def warn(message: str) -> None:
    """Print a line to standard error and go on."""
    print(message, file=sys.stderr, flush=True)


def fail(prog: str, message: str, code: int = 2) -> NoReturn:
    """Print one plain message to standard error and leave."""
    print(f"{prog}: {message}".replace("\n", "\n  "), file=sys.stderr)
    sys.exit(code)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Draft(Config):
    # What the flags say, before anything follows from anything: checked as a whole in `_settle`.
    def __post_init__(self) -> None:
        pass


def _parse_flags(argv: Sequence[str], base: Config, *, prog: str, description: str) -> Config:
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return tyro.cli(
        _Draft,
        prog=prog,
        description=f"{description}\n\nDefaults are those of preset {base.preset}. The presets:\n"
        + describe_presets(),
        default=_Draft(**{**fields, "gradient_accumulation_steps": None}),
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


def _settle(draft: Config, base: Config, flags: Mapping[str, str | None]) -> Config:
    """Fill in what follows from other fields, and check the whole."""
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft)}
    B, effective = draft.batch_size, draft.effective_batch_size
    accumulation = draft.gradient_accumulation_steps
    if accumulation is not None and "effective_batch_size" not in flags:
        fields["effective_batch_size"] = accumulation * B
    elif accumulation is None and min(B, effective) > 0 and effective % B == 0:
        fields["gradient_accumulation_steps"] = effective // B
    # The preset's batch_size, so that a smaller --batch-size evaluates the same windows.
    fields["eval_windows"] = draft.eval_iters * base.batch_size
    fields["out_dir"] = _expanded(draft.out_dir or Path("runs") / Path(draft.preset).stem)
    if draft.data_dir is not None:
        fields["data_dir"] = _expanded(draft.data_dir)
    elif draft.dataset != "embedded":
        fields["data_dir"] = Path("data") / draft.dataset
    return Config(**fields)


def _expanded(path: Path) -> Path:
    # The shell leaves '~' alone in --out-dir=~/x and in a TOML file.
    return Path(os.path.expanduser(path))


def _refuse_at_sight(argv: Sequence[str], flags: Mapping[str, str | None]) -> None:
    """Raises ConfigError for what would be read wrongly, or answered less well, further on."""
    known = [name.replace("_", "-") for name, f in flat_fields().items() if not _is_hidden(f)]
    faults = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if answer := nanogpt_answer(name, value):
            faults.append(f"--{name}{'=' + value if value else ''} {answer}")
        elif flag in known and not value:
            faults.append(f"--{flag} needs a value")
        elif flag not in known and flag not in OTHER_FLAGS:
            faults.append(f"--{flag} is no flag{did_you_mean(flag, known, '--')}")
    faults += [
        f"{arg}: nanoGPT's config files are Python; here they are TOML: --preset my.toml"
        for arg in argv
        if arg.endswith(".py") and not arg.startswith("-")
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def _is_hidden(field: dataclasses.Field) -> bool:
    return tyro.conf.Suppress in typing.get_args(field.type)


def _flags(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags in argv by the names of their fields, each with the last value given to it."""
    flags: dict[str, str | None] = {}
    for arg, following in zip_longest(argv, argv[1:]):
        if arg.startswith("--"):
            name, equals, joined = arg[2:].partition("=")
            is_flag = following is None or following.startswith("--")
            flags[name.replace("-", "_")] = joined if equals else None if is_flag else following
    return flags
