"""From argv to one frozen `Config`: which preset, which flags, and what follows from them.

Everything here happens before JAX is imported, which takes seconds that a typo should not cost.
tyro parses, suggests and prints `--help`; what is added are answers to nanoGPT's habits.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import tyro

from jaxgpt.config.batch import effective_of_accumulation
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import DEFAULT_BATCH_SIZE, Config
from jaxgpt.config.nanogpt import config_file_answer, nanogpt_answer
from jaxgpt.config.presets import describe_presets, load_preset
from jaxgpt.errors import fail

# `--batch-size 16`, `--batch_size=16` and `--bias=True`, without sections and `--no-` twins.
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(Config):
    """What argv says; a command with flags of its own has a subclass with a field for each."""

    def __post_init__(self) -> None:
        pass  # checked when it has become a Config


Own = TypeVar("Own", bound=RunFlags)


class Flags(Protocol):
    """The flags of a command that describes no run: a dataclass that checks itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""


Command = TypeVar("Command", bound=Flags)


def parse_run(
    flags_type: type[Own],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_preset: Callable[[], str | None],
) -> tuple[Config, Own, frozenset[str]]:
    """(what is asked for, all flags, the names of those given) of a command that describes a run.

    `default_preset` is asked for a preset's name when `argv` has none; None lists the presets.
    tyro ends the process with exit code 2 for a flag that it cannot read.

    Raises:
        ConfigError: for values that do not go together, and for nanoGPT's flags.
    """
    flags = given_flags(argv)
    _refuse_habits(argv, flags)
    preset = flags.get("preset") or default_preset()
    if preset is None and {"-h", "--help"} & set(argv):
        preset = Config.preset
    if preset is None:
        raise ConfigError(
            "no GPU was found to choose a preset for; name one with --preset NAME:\n"
            + describe_presets()
        )
    base = load_preset(preset)
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    draft = tyro.cli(
        flags_type,
        prog=prog,
        description=f"{description}\n\nDefaults are those of preset {base.preset}. The presets:\n"
        + describe_presets(),
        default=flags_type(**fields),
        args=_apart(argv),
        config=STYLE,
    )
    return _asked(draft, base, flags), draft, frozenset(flags)


def parse_command(
    argv: Sequence[str],
    kind: type[Command],
    *,
    prog: str,
    description: str,
    instead: Mapping[str, str] | None = None,
) -> Command:
    """The flags of a command that describes no run; a mistake ends the process with exit code 2.

    `kind` is a dataclass whose field comments are the help; its `errors()` says what is wrong.
    `instead` answers nanoGPT's flags by name.
    """
    flags = given_flags(argv)
    errors = [f"--{n} is nanoGPT's; {text}" for n, text in (instead or {}).items() if n in flags]
    if errors := errors or _empty_values(flags):
        fail(prog, "\n".join(errors))
    parsed = tyro.cli(kind, prog=prog, description=description, args=_apart(argv), config=STYLE)
    if errors := parsed.errors():
        fail(prog, "\n".join(errors))
    return parsed


def _apart(argv: Sequence[str]) -> list[str]:
    """argv with `--flag=value` as two words: tyro would look for flags similar to the whole."""
    words: list[str] = []
    for arg in argv:
        flag, equals, value = arg.partition("=")
        apart = arg.startswith("--") and equals and not value.startswith("-")
        words += [flag, value] if apart else [arg]
    return words


def given_flags(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags in argv by the names of their fields, each with the last value given to it."""
    flags: dict[str, str | None] = {}
    for arg, following in zip_longest(argv, argv[1:]):
        if arg.startswith("--"):
            name, equals, joined = arg[2:].partition("=")
            is_flag = following is None or following.startswith("--")
            flags[name.replace("-", "_")] = joined if equals else None if is_flag else following
    return flags


def _refuse_habits(argv: Sequence[str], flags: Mapping[str, str | None]) -> None:
    """Raises ConfigError for what only nanoGPT has, all at once, and for empty values."""
    errors = [
        f"--{name}{'=' + value if value else ''} {answer}"
        for name, value in flags.items()
        if (answer := nanogpt_answer(name, value))
    ]
    words = [arg for arg in argv if not arg.startswith("-")]
    errors += [answer for word in words if (answer := config_file_answer(word))]
    if errors := errors + _empty_values(flags):
        raise ConfigError("\n".join(errors))


def _empty_values(flags: Mapping[str, str | None]) -> list[str]:
    # As a path '' would be the current folder. A prompt may be empty.
    empty = [name for name, value in flags.items() if value == "" and name != "prompt"]
    if flags.get("preset", "given") is None:
        empty.append("preset")  # or a machine's own tier would be taken
    return [f"--{name.replace('_', '-')} needs a value" for name in empty]


def _asked(draft: RunFlags, base: Config, flags: Mapping[str, str | None]) -> Config:
    """The flags as a Config, with what follows from other fields filled in, checked as a whole."""
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(Config)}
    if draft.batch_size == "auto" and "remat" not in flags:
        fields["remat"] = "auto"
    fields |= _effective_batch(draft, flags)
    fields["eval_windows"] = draft.eval_iters * base.batch_size_or(DEFAULT_BATCH_SIZE)
    fields["out_dir"] = _expanded(draft.out_dir or Path("runs") / Path(draft.preset).stem)
    if draft.data_dir is not None:
        fields["data_dir"] = _expanded(draft.data_dir)
    elif draft.dataset != "embedded":
        fields["data_dir"] = Path("data") / draft.dataset
    return Config(**fields)


def _effective_batch(draft: RunFlags, flags: Mapping[str, str | None]) -> dict[str, int | None]:
    """gradient_accumulation_steps as the effective batch; Config reports what is wrong with it."""
    accumulation = draft.gradient_accumulation_steps
    if accumulation is None or accumulation < 1 or draft.batch_size == "auto":
        return {}
    effective = draft.effective_batch_size if "effective_batch_size" in flags else None
    product = effective_of_accumulation(accumulation, draft.batch_size)
    if effective not in (None, product):
        return {}
    return {"effective_batch_size": product, "gradient_accumulation_steps": None}


def _expanded(path: Path) -> Path:
    # The shell leaves '~' alone in --out-dir=~/x and in a TOML file.
    return Path(os.path.expanduser(path))
