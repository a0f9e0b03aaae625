"""From argv to one frozen `Config`: which preset, which flags, and plain answers to mistakes.

Everything here happens before JAX is imported, which takes seconds that a typo should not cost.
"""

import dataclasses
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import tyro

from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config, flat_fields, largest_share
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.presets import (
    SPOKEN,
    choices_of,
    describe_presets,
    did_you_mean,
    load_preset,
    nanogpt_answer,
    preset_for_memory,
    union_members,
)
from jaxgpt.errors import fail
from jaxgpt.planning.gpus import GIB, visible_card

# Flags that are no fields: the help, and what tyro has for shells that complete.
OTHER_FLAGS = ("help", "tyro-print-completion", "tyro-write-completion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFlags(Config):
    """What argv says, before anything follows from anything.

    A command with flags of its own has a subclass with a field for each.
    """

    batch_size: Annotated[
        int | Literal["auto"],
        tyro.conf.arg(
            help="sequences one device holds at a time; halve it when memory runs out; auto: as "
            "many as fit, with the cheapest remat that fits unless --remat says which",
            metavar="INT|auto",
        ),
    ] = 32  # type: ignore[assignment]

    def __post_init__(self) -> None:
        pass


Own = TypeVar("Own", bound=TrainFlags)


class Flags(Protocol):
    """A command's flags: a dataclass that checks itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""


Command = TypeVar("Command", bound=Flags)


def parse(
    argv: Sequence[str], *, prog: str, description: str, default_preset: Callable[[], str | None]
) -> Config:
    """The configuration that `argv` asks for; a mistake ends the process with exit code 2.

    `default_preset` is asked for a preset's name when `argv` has none; None lists the presets.
    """
    return parse_with(
        TrainFlags, argv, prog=prog, description=description, default_preset=default_preset
    )[0]


def parse_with(
    flags_type: type[Own],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_preset: Callable[[], str | None],
) -> tuple[Config, Own, set[str]]:
    """The same for a command with flags of its own: (configuration, all flags, names given)."""
    try:
        flags = flags_of(argv)
        _refuse_at_sight(argv, flags, flags_type)
        preset = flags.get("preset") or default_preset()
        if preset is None and {"-h", "--help"} & set(argv):
            preset = Config.preset
        if preset is None:
            raise ConfigError(
                "no GPU was found to choose a preset for; say which one with --preset NAME:\n"
                + describe_presets()
            )
        base = load_preset(preset)
        draft = _parse_flags(argv, base, flags_type, prog=prog, description=description)
        return _settle(draft, base, flags), draft, set(flags)
    except ConfigError as error:
        fail(prog, str(error))


def parse_command(
    argv: Sequence[str],
    kind: type[Command],
    *,
    prog: str,
    description: str,
    instead: Mapping[str, str] | None = None,
) -> Command:
    """The flags of a command other than `train`; a mistake ends the process with exit code 2.

    `kind` is a dataclass whose field comments are the help; its `errors()` says what is wrong.
    `instead` answers nanoGPT's flags by name.
    """
    if errors := _errors_at_sight(argv, kind, instead or {}):
        fail(prog, "\n".join(errors))
    flags = tyro.cli(
        kind,
        prog=prog,
        description=description,
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    if errors := flags.errors():
        fail(prog, "\n".join(errors))
    return flags


def preset_of_this_machine() -> str | None:
    """The tier of the card that a run would get, None without one."""
    card = visible_card()
    return preset_for_memory(card.memory_bytes / GIB) if card else None


def _parse_flags(
    argv: Sequence[str], base: Config, flags_type: type[Own], *, prog: str, description: str
) -> Own:
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return tyro.cli(
        flags_type,
        prog=prog,
        description=f"{description}\n\nDefaults are those of preset {base.preset}. The presets:\n"
        + describe_presets(),
        default=flags_type(**{**fields, "gradient_accumulation_steps": None}),
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _settle(draft: TrainFlags, base: Config, flags: Mapping[str, str | None]) -> Config:
    """Fill in what follows from other fields, and check the whole."""
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(Config)}
    if draft.batch_size == "auto":
        # A number that will do until the machine has been asked.
        share = largest_share(max(1, draft.effective_batch_size), _devices(draft), base.batch_size)
        fields |= {"batch_size": share, "auto_batch_size": True}
        fields["remat"] = draft.remat if "remat" in flags else "auto"
    fields |= _batch_of(draft, fields["batch_size"], flags)
    # The preset's batch_size, so that a smaller --batch-size evaluates the same windows.
    fields["eval_windows"] = draft.eval_iters * base.batch_size
    fields["out_dir"] = _expanded(draft.out_dir or Path("runs") / Path(draft.preset).stem)
    if draft.data_dir is not None:
        fields["data_dir"] = _expanded(draft.data_dir)
    elif draft.dataset != "embedded":
        fields["data_dir"] = Path("data") / draft.dataset
    return Config(**fields)


def _batch_of(draft: TrainFlags, B: int, flags: Mapping[str, str | None]) -> dict[str, int | None]:
    """The effective batch and each device's micro-batches; Config tells what is wrong with them."""
    effective, asked = draft.effective_batch_size, draft.gradient_accumulation_steps
    held = B * _devices(draft)
    if asked is not None and "effective_batch_size" not in flags:
        effective = asked * B
    elif asked is not None and asked * B != effective:
        return {"gradient_accumulation_steps": asked}
    if min(held, effective) < 1:
        return {"effective_batch_size": effective, "gradient_accumulation_steps": asked}
    if effective % held:
        return {"effective_batch_size": effective, "gradient_accumulation_steps": None}
    return {"effective_batch_size": effective, "gradient_accumulation_steps": effective // held}


def _devices(draft: TrainFlags) -> int:
    """Those that --mesh has; 1 if it is none, which Config tells."""
    try:
        return parse_mesh(draft.mesh).devices
    except ValueError:
        return 1


def _expanded(path: Path) -> Path:
    # The shell leaves '~' alone in --out-dir=~/x and in a TOML file.
    return Path(os.path.expanduser(path))


def _refuse_at_sight(
    argv: Sequence[str], flags: Mapping[str, str | None], flags_type: type[TrainFlags]
) -> None:
    """Raises ConfigError for what would be read wrongly, or answered less well, further on."""
    inherited = {f.name for f in dataclasses.fields(Config)}
    own = {
        f.name.replace("_", "-"): f
        for f in dataclasses.fields(flags_type)
        if f.name not in inherited
    }
    switches = [name for name, f in own.items() if bool in (f.type, *typing.get_args(f.type))]
    known = [name.replace("_", "-") for name, f in flat_fields().items() if not _is_hidden(f)]
    known += own
    types = {f.name: f.type for f in (*flat_fields().values(), *dataclasses.fields(flags_type))}
    errors = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if answer := nanogpt_answer(name, value):
            errors.append(f"--{name}{'=' + value if value else ''} {answer}")
        elif flag in known and flag not in switches and not value:
            errors.append(f"--{flag} needs a value")
        elif flag in known and flag not in switches:
            errors += _value_errors(flag, value or "", types[name])
        elif flag not in known and flag not in OTHER_FLAGS:
            errors.append(f"--{flag} is no flag{did_you_mean(flag, known, '--')}")
    errors += [
        f"{arg}: nanoGPT's config files are Python; here they are TOML: --preset my.toml"
        for arg in argv
        if arg.endswith(".py") and not arg.startswith("-")
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _errors_at_sight(
    argv: Sequence[str], kind: type[Command], instead: Mapping[str, str]
) -> list[str]:
    known = {field.name: field for field in dataclasses.fields(kind)}
    names = [name.replace("_", "-") for name in known]
    errors = []
    for name, value in flags_of(argv).items():
        flag = name.replace("_", "-")
        if name in instead:
            errors.append(f"--{name} is nanoGPT's; {instead[name]}")
        elif name not in known and flag not in OTHER_FLAGS:
            errors.append(f"--{flag} is no flag{did_you_mean(flag, names, '--')}")
        elif name == "prompt" and value is None:
            errors.append(
                "--prompt needs a text; one that begins with -- goes as --prompt='-- ...'"
            )
        elif name in known and known[name].type is not bool and not value and name != "prompt":
            errors.append(f"--{flag} needs a value")  # but a prompt may be empty
        elif name in known and known[name].type is not bool:
            errors += _value_errors(flag, value or "", known[name].type)
    return errors


def _value_errors(flag: str, text: str, annotation: Any) -> list[str]:
    """A sentence if tyro would not read `text` as what the flag's annotation says."""
    members = union_members(annotation)
    numbers = [kind for kind in (int, float) if kind in members]
    words = [word for member in members for word in choices_of(member)]
    words += ["True", "False"] if bool in members else []
    if not (numbers or words) or (text == "None" and type(None) in members) or text in words:
        return []
    if any(_reads(kind, text) for kind in numbers):
        return []
    kinds = [SPOKEN[kind] for kind in numbers]
    wanted = " or ".join(kinds + words) if numbers else f"one of {', '.join(words)}"
    return [f"--{flag} {text[:60]} is not {wanted}{did_you_mean(text, words)}"]


def _reads(kind: type[int] | type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _is_hidden(field: dataclasses.Field) -> bool:
    return tyro.conf.Suppress in typing.get_args(field.type)


def flags_of(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags in argv by the names of their fields, each with the last value given to it."""
    flags: dict[str, str | None] = {}
    for arg, following in zip_longest(argv, argv[1:]):
        if arg.startswith("--"):
            name, equals, joined = arg[2:].partition("=")
            is_flag = following is None or following.startswith("--")
            flags[name.replace("-", "_")] = joined if equals else None if is_flag else following
    return flags
