"""From argv to one frozen `Config`: preset, flags, and the fields derived from them.

Runs before JAX is imported: that takes seconds, and a typo should be reported at once. tyro parses,
suggests and prints `--help`; this module adds answers to flags that other programs have.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import tyro

from jaxgpt.config.batch import fields_of_accumulation
from jaxgpt.config.checks import ConfigError, as_flag
from jaxgpt.config.fields import Config
from jaxgpt.config.mixture import folder_of, is_one_source
from jaxgpt.config.nanogpt import flag_settings, is_config_file, nanogpt_answer
from jaxgpt.config.presets import describe_presets, load_preset, packaged_presets
from jaxgpt.errors import fail, warn
from jaxgpt.files import user_path

MOST_SAMPLE_TOKENS = 100_000  # training waits for a sample, and so does Ctrl-C
HIGHEST_USUAL_RATE = 0.1  # above it a warning is printed
# `--batch-size 16`, `--batch_size=16` and `--bias=True`, without sections and `--no-` twins.
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFlags(Config):
    """The flags that configure a run; commands add their own in a subclass."""

    def __post_init__(self) -> None:
        pass  # checked once it is a Config


Own = TypeVar("Own", bound=RunFlags)


class Flags(Protocol):
    """The flags of a command that needs no run's configuration: a dataclass that checks itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def errors(self) -> list[str]:
        """A sentence for each error."""


Command = TypeVar("Command", bound=Flags)


def parse_run(
    flags_type: type[Own],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    default_preset: Callable[[], str | None],
) -> tuple[Config, Own, frozenset[str]]:
    """Parse the command line of a command that needs a run's configuration.

    `default_preset` names the preset if `argv` does not; None is an error. Returns (the run's
    configuration, all flags, the names of those in `argv`). tyro ends the process with exit code 2
    for a flag that it cannot read.

    Raises:
        ConfigError: for values that do not go together, and for nanoGPT's flags.
    """
    argv = _with_preset_flag(argv)
    flags = given_flags(argv)
    replaced = flag_settings(flags) if is_config_file(flags.get("preset") or "") else {}
    argv = without_flags(argv, *replaced)
    _refuse_nanogpt_flags(argv, given_flags(argv))
    preset = flags.get("preset") or default_preset()
    wants_help = bool({"-h", "--help"} & set(argv))
    if preset is None and wants_help:
        preset = Config.preset
    if preset is None:
        raise ConfigError(
            "no GPU was found to choose a preset for; name one with --preset NAME:\n"
            + describe_presets()
        )
    base = load_preset(preset, replaced, warn)
    presets = describe_presets() if wants_help else ""  # reads all of them
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    draft = tyro.cli(
        flags_type,
        prog=prog,
        description=f"{description}\n\nDefaults are those of preset {base.preset}. The presets:\n"
        + presets,
        default=flags_type(**fields),
        args=_split_at_equals(argv),
        config=STYLE,
    )
    cfg = _to_config(draft, base, flags)
    if cfg.sample_tokens > MOST_SAMPLE_TOKENS:
        raise ConfigError(
            f"--sample-tokens {cfg.sample_tokens} must be at most {MOST_SAMPLE_TOKENS}; training "
            "waits for the text"
        )
    if cfg.optimizer.learning_rate > HIGHEST_USUAL_RATE:
        warn(
            f"learning_rate {cfg.optimizer.learning_rate:g} is far above what is usual, 2e-4 to "
            "1e-2; the run will probably diverge"
        )
    return cfg, draft, frozenset(flags)


def parse_command(
    argv: Sequence[str],
    kind: type[Command],
    *,
    prog: str,
    description: str,
    instead: Mapping[str, str] | None = None,
) -> Command:
    """Parse the flags of a command that needs no run's configuration; exits with 2 on an error.

    `kind` is a dataclass whose field comments are the help texts. `instead` has the remedy for each
    of nanoGPT's flags, by name.
    """
    flags = given_flags(argv)
    errors = [f"--{n} is nanoGPT's; {text}" for n, text in (instead or {}).items() if n in flags]
    if errors := errors or [*_empty_values(flags), *_cut_off_prompts(argv)]:
        fail(prog, "\n".join(errors))
    words = _split_at_equals(argv)
    parsed = tyro.cli(kind, prog=prog, description=description, args=words, config=STYLE)
    if errors := parsed.errors():
        fail(prog, "\n".join(errors))
    return parsed


class Argument(NamedTuple):
    """A flag with its value, or a word of argv that is neither."""

    words: Sequence[str]
    flag: str | None  # as a field's name
    value: str | None


def _arguments(argv: Sequence[str]) -> Iterator[Argument]:
    i = 0
    while i < len(argv):
        name, equals, joined = argv[i].partition("=")
        is_flag = name.startswith("--")
        following = argv[i + 1 : i + 2] if is_flag and not equals else []
        if following and following[0].startswith("--"):
            following = []
        words = [argv[i], *following]
        value = joined if is_flag and equals else following[0] if following else None
        yield Argument(words, name[2:].replace("-", "_") if is_flag else None, value)
        i += len(words)


def given_flags(argv: Sequence[str]) -> dict[str, str | None]:
    """The flags in argv by field name, each with its last value."""
    return {arg.flag: arg.value for arg in _arguments(argv) if arg.flag is not None}


def without_flags(argv: Sequence[str], *names: str) -> list[str]:
    """argv without some flags and their values."""
    return [word for arg in _arguments(argv) if arg.flag not in names for word in arg.words]


def _with_preset_flag(argv: Sequence[str]) -> Sequence[str]:
    """argv with --preset inserted before a config file that is named without a flag."""
    arguments = list(_arguments(argv))
    named = [arg for arg in arguments if arg.flag is None and is_config_file(arg.words[0])]
    if not named:
        return argv
    if len(named) > 1 or "preset" in given_flags(argv):
        raise ConfigError(
            f"{named[0].words[0]}: a run has one preset or config file; name only one"
        )
    return [
        word
        for arg in arguments
        for word in (["--preset", *arg.words] if arg is named[0] else arg.words)
    ]


def _split_at_equals(argv: Sequence[str]) -> list[str]:
    """argv with `--flag=value` as two words, or tyro would suggest flags similar to the whole."""
    words: list[str] = []
    for arg in argv:
        flag, equals, value = arg.partition("=")
        split = arg.startswith("--") and equals and not value.startswith("-")
        words += [flag, value] if split else [arg]
    return words


def _refuse_nanogpt_flags(argv: Sequence[str], flags: Mapping[str, str | None]) -> None:
    """Raises ConfigError for other programs' flags and for empty values, all at once."""
    errors = [
        f"--{name}{'=' + value if value else ''} {answer}"
        for name, value in flags.items()
        if (answer := nanogpt_answer(name, value))
    ]
    if "preset" not in flags:
        errors += [
            f"{word}: a preset is named with a flag: --preset {word}"
            for (word, *_), flag, _ in _arguments(argv)
            if flag is None and word in packaged_presets()
        ]
    if errors := errors + _empty_values(flags):
        raise ConfigError("\n".join(errors))


def _empty_values(flags: Mapping[str, str | None]) -> list[str]:
    # As a path '' would be the current folder. A prompt may be empty.
    empty = [name for name, value in flags.items() if value == "" and name != "prompt"]
    if flags.get("preset", "given") is None:
        empty.append("preset")  # otherwise the preset for this machine's card would be used
    return [f"{as_flag(name)} needs a value" for name in empty]


def _cut_off_prompts(argv: Sequence[str]) -> list[str]:
    """A sentence if a prompt begins with a hyphen and is one word, and so looks like a flag."""
    pairs = zip_longest(argv, argv[1:], fillvalue="--")
    cut_off = any(arg == "--prompt" and re.fullmatch(r"-[^\d\s]\S*", value) for arg, value in pairs)
    answer = "--prompt needs a value; if that begins with a hyphen: --prompt='-- ...'"
    return [answer] if cut_off else []


def _to_config(draft: RunFlags, base: Config, flags: Mapping[str, str | None]) -> Config:
    """The flags as a checked Config, with the fields that are derived from others."""
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(Config)}
    if draft.batch_size == "auto" and "batch_size" in flags and "remat" not in flags:
        fields["remat"] = "auto"
    effective = draft.effective_batch_size if "effective_batch_size" in flags else None
    fields |= fields_of_accumulation(draft.gradient_accumulation_steps, draft.batch_size, effective)
    fields["eval_windows"] = base.windows_in(draft.eval_iters)
    default = Path("runs") / Path(draft.preset).stem
    # The shell leaves '~' alone in --out-dir=~/x and in a TOML file.
    fields["out_dir"] = user_path(draft.out_dir or default, "--out-dir")
    if draft.data_dir is not None:
        fields["data_dir"] = user_path(draft.data_dir, "--data-dir")
    elif is_one_source(draft.dataset):
        fields["data_dir"] = folder_of(draft.dataset)
    return Config(**fields)
