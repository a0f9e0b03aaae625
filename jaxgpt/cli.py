"""From argv to one frozen `Config`: which preset, which flags, and plain answers to mistakes.

Everything here happens before JAX is imported, which takes seconds that a typo should not cost.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from jaxgpt.config import Config, ConfigError
from jaxgpt.presets import describe_presets, load_preset

# Flags of nanoGPT that mean nothing here, and what serves instead.
NANOGPT_FLAGS = {
    "compile": "drop it: every step is compiled by XLA",
    "wandb_log": "drop it: curves go to TensorBoard files and metrics.jsonl in the run's folder",
    "wandb_project": "drop it: curves go to TensorBoard files in the run's folder",
    "wandb_run_name": "use --out-dir: a run is named by its folder",
    "always_save_checkpoint": (
        "drop it: every evaluation saves a checkpoint; --keep-checkpoints N says how many of the "
        "newest are kept besides the best"
    ),
    "init_from": (
        "drop it: the same command resumes a run from its --out-dir, and a new --out-dir starts "
        "from scratch"
    ),
    "eval_only": "drop it: every run evaluates at step 0, at each --eval-interval and at its end",
    "backend": "drop it: XLA chooses its own collectives",
}


def parse(
    argv: Sequence[str], *, prog: str, description: str, default_preset: Callable[[], str | None]
) -> Config:
    """The configuration that `argv` asks for; a mistake ends the process with exit code 2.

    `default_preset` is asked for a preset's name when `argv` has none; None lists the presets.
    """
    try:
        _refuse_foreign_flags(argv)
        preset = _value_of("preset", argv) or default_preset()
        if preset is None and {"-h", "--help"} & set(argv):
            preset = Config.preset
        if preset is None:
            raise ConfigError(
                "no GPU was found to choose a preset for; say which one with --preset NAME:\n"
                + describe_presets()
            )
        base = load_preset(preset)
        parsed = _parse_flags(argv, base, prog=prog, description=description)
        return _settle(parsed, base, given=_given(argv))
    except ConfigError as fault:
        fail(prog, str(fault))


def fail(prog: str, message: str, code: int = 2) -> NoReturn:
    """Print one plain message to standard error and leave."""
    print(f"{prog}: {message}", file=sys.stderr)
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
        description=description,
        default=_Draft(**{**fields, "gradient_accumulation_steps": None}),
        args=list(argv),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )


def _settle(draft: Config, base: Config, given: set[str]) -> Config:
    """Fill in what follows from other fields, and check the whole."""
    fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft)}
    if draft.gradient_accumulation_steps is not None and "effective_batch_size" not in given:
        fields["effective_batch_size"] = draft.gradient_accumulation_steps * draft.batch_size
    elif draft.gradient_accumulation_steps is None and draft.batch_size > 0:
        accumulation, left_over = divmod(draft.effective_batch_size, draft.batch_size)
        fields["gradient_accumulation_steps"] = None if left_over else accumulation
    # The preset's batch_size, so that a smaller --batch-size evaluates the same windows.
    fields["eval_windows"] = draft.eval_iters * base.batch_size
    fields["out_dir"] = draft.out_dir or Path("runs") / Path(draft.preset).stem
    fields["data_dir"] = draft.data_dir or Path("data") / draft.dataset
    return Config(**fields)


def _refuse_foreign_flags(argv: Sequence[str]) -> None:
    for name in _given(argv):
        if name in NANOGPT_FLAGS:
            raise ConfigError(
                f"--{name} is nanoGPT's and has no meaning here; {NANOGPT_FLAGS[name]}"
            )
    device = _value_of("device", argv) or ""
    if device.startswith(("cuda", "mps")):
        raise ConfigError(
            f"--device={device} is nanoGPT's; use --device gpu "
            "(CUDA_VISIBLE_DEVICES=N chooses among several), cpu or auto"
        )
    if _value_of("dtype", argv) == "float16":
        raise ConfigError(
            "--dtype=float16 is nanoGPT's and needs loss scaling; use bfloat16, float32 or auto"
        )
    for arg in argv:
        if arg.endswith(".py") and not arg.startswith("-"):
            raise ConfigError(
                f"{arg}: nanoGPT's config files are Python; here they are TOML: --preset my.toml"
            )


def _given(argv: Sequence[str]) -> set[str]:
    """The names of the flags in argv, as fields are spelt."""
    flags = (arg[2:].partition("=")[0] for arg in argv if arg.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    """The last value that argv gives a flag, in any of its spellings."""
    value = None
    for i, arg in enumerate(argv):
        flag, equals, joined = arg.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            value = joined if equals else next(iter(argv[i + 1 : i + 2]), None)
    return value
