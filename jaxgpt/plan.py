"""What fits a card, and how long it takes: `python -m jaxgpt.plan --gpu rtx4090`.

The card need not be here: the step that `train` would run is compiled for it. Every figure says
how it is known. Flags of `train` describe the run to plan; none of its files are read.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import Config
from jaxgpt.config.flag_types import FloatIfSet, IntIfSet, TextIfSet
from jaxgpt.config.mesh_shape import MeshShape, parse_mesh
from jaxgpt.config.presets import preset_for_memory
from jaxgpt.config.resolve import resolve
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError, fail
from jaxgpt.planning import tables as plan_report
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GPUS, Gpu, find_gpu, lookup_gpu, unnamed_card, visible_card
from jaxgpt.run.console import waiting

PROG = "python -m jaxgpt.plan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(cli.TrainFlags):
    """What to plan for, and how to say it; the rest is `train`'s and describes the run."""

    gpu: TextIfSet = None  # the card: rtx4090, 'A100 80GB', ...; if unset, the one in this machine
    vram: FloatIfSet = None  # in place of --gpu: memory in GB of a card that is in no table
    # how many such cards; --mesh says what each holds, all of it if unset
    devices: IntIfSet = None
    fit: bool = False  # choose the batch_size and remat that fit and should train fastest
    # find the model and token count that make best use of these hours
    hours: FloatIfSet = None
    json: bool = False  # print one JSON object
    # arithmetic instead of the compiler: at once, and off by up to a tenth
    estimate: bool = False


OWN = {f.name for f in dataclasses.fields(PlanFlags)} - {
    f.name for f in dataclasses.fields(cli.TrainFlags)
}

MOST_DEVICES = 65536  # more than anybody has
# What `--hours` answers with, so that it cannot be given.
CHOSEN_BY_HOURS = {
    *("n_layer", "n_head", "n_embd", "batch_size", "gradient_accumulation_steps", "remat", "fit"),
    *("max_iters", "lr_decay_iters", "learning_rate", "min_lr"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        cfg, flags, given = cli.parse_with(
            PlanFlags,
            argv,
            prog=PROG,
            description="What fits a card, what it needs, and how long it takes.",
            default_preset=lambda: _tier(cli.flags_of(argv)),
        )
        plan(cfg, flags, given)
    except UserError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def plan(cfg: Config, flags: PlanFlags, given: set[str]) -> None:
    """Answer the question that the flags ask, as tables or as JSON."""
    gpu = _card(flags.gpu, flags.vram)
    if cfg.init_from is not None:
        raise ConfigError(
            f"--init-from {cfg.init_from}: plan reads no weights; describe their shape instead: "
            "--n-layer, --n-head, --n-embd, --block-size, --bias"
        )
    if flags.hours is not None and not 0 < flags.hours < math.inf:
        raise ConfigError(f"hours {flags.hours:g} must be finite and above 0")
    if flags.hours is not None and (idle := sorted(given & CHOSEN_BY_HOURS)):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError(f"--hours chooses {names} itself; leave out one or the other")
    shape = _mesh_shape(cfg, flags.devices)
    if flags.hours is not None and shape.devices > 1:
        raise ConfigError("--hours plans for one card; leave out --devices and --mesh")
    target.prepare_environment()
    from jaxgpt.planning.planner import Planner
    from jaxgpt.training.sharding import for_shape

    why_estimated = "as asked for" if flags.estimate else target.obstacle(gpu)
    try:
        planner = Planner(gpu, why_estimated, waiting, cfg.dtype, shape.devices)
    except target.NoCompilerError as error:
        planner = Planner(gpu, str(error), waiting, cfg.dtype, shape.devices)
    cfg = for_shape(planner.for_card(resolve(cfg, load_tokenizer(cfg.tokenizer))), shape)
    show: Callable[[dict[str, Any]], None]
    if flags.hours is not None:
        answer, show = planner.best_for_hours(cfg, flags.hours), plan_report.print_hours
    elif given - OWN or flags.fit or shape.devices > 1:
        free = {"batch_size", "remat"} - given if flags.fit else set()
        answer, show = planner.one(cfg, free), plan_report.print_one
    else:
        answer, show = planner.overview(cfg), plan_report.print_overview
    if flags.json:
        print(json.dumps(answer, indent=2))
    else:
        show(answer)


def _mesh_shape(cfg: Config, devices: int | None) -> MeshShape:
    """The mesh that is asked about.

    Raises:
        ConfigError: if --devices is not the number that --mesh has.
    """
    if devices is not None and not 1 <= devices <= MOST_DEVICES:
        raise ConfigError(f"--devices {devices} must be between 1 and {MOST_DEVICES}")
    shape = parse_mesh(cfg.mesh) if cfg.mesh else MeshShape(data=devices or 1)
    if devices not in (None, shape.devices):
        raise ConfigError(
            f"--mesh {shape} has {shape.devices} devices, and --devices says {devices}; leave out "
            "one of the two"
        )
    return shape


def _tier(values: dict[str, str | None]) -> str:
    # Of a flag that is wrong, parsing says more; any tier will do until then.
    try:
        vram = values.get("vram")
        gpu = _card(values.get("gpu"), None if vram is None else float(vram))
    except (UserError, ValueError):
        return Config.preset
    return preset_for_memory(gpu.memory_bytes / 2**30)


def _card(name: str | None, vram: float | None) -> Gpu:
    """The card that is asked about.

    Raises:
        UserError: if none is named and none is here, or both ways of naming one are used.
    """
    if name is not None and vram is not None:
        raise ConfigError("--gpu names a card and --vram stands for one without a name; give one")
    if vram is not None:
        if not 1 <= vram <= 1024:
            raise ConfigError(f"--vram {vram:g} must be between 1 and 1024 (GB)")
        return unnamed_card(vram)
    if name is not None:
        return find_gpu(name)
    card = visible_card()
    if card is None:
        known = ", ".join(gpu.key for gpu in GPUS)
        raise ConfigError(
            "nvidia-smi lists no card in this machine; say which one to plan for with --gpu NAME "
            f"or --vram GB. Known: {known}"
        )
    unnamed = dataclasses.replace(unnamed_card(card.memory_bytes / 2**30), name=card.name)
    return lookup_gpu(card.name, card.memory_bytes) or unnamed


if __name__ == "__main__":
    sys.exit(main())
