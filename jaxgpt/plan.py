"""What fits a card, and how long it takes: `python -m jaxgpt.plan --gpu rtx4090`.

The card need not be present: the step that `train` would run is compiled for it. Every figure is
labelled as compiled, estimated or published. `train`'s flags describe the run; no data, weights or
run folders are read.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from jaxgpt.config.checks import ConfigError, as_flag, bad_amounts
from jaxgpt.config.command_line import RunFlags, given_flags, parse_run
from jaxgpt.config.fields import CHOICES, Config, flat_fields, names_with
from jaxgpt.config.flag_types import FloatIfSet, IntIfSet, TextIfSet
from jaxgpt.config.mesh_shape import MeshShape, parse_mesh
from jaxgpt.config.roles import Role
from jaxgpt.errors import UserError, make_main
from jaxgpt.planning import tables, target
from jaxgpt.planning.gpus import GIB, Gpu, find_gpu, lookup_gpu, preset_of_card, unnamed_card
from jaxgpt.planning.local_gpus import visible_card
from jaxgpt.run import device as hardware
from jaxgpt.run.console import waiting
from jaxgpt.run.opening import origin_of_data

if TYPE_CHECKING:  # it imports JAX, which comes after the command line
    from jaxgpt.planning.planner import Planner

PROG = "python -m jaxgpt.plan"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFlags(RunFlags):
    """What to plan for, and the form of the answer; `train`'s flags describe the run."""

    gpu: TextIfSet = None  # the card: rtx4090, 'A100 80GB', ...; if unset, the one in this machine
    vram: FloatIfSet = None  # memory in GB of a card that --gpu does not know
    # number of cards; --mesh says how the state is sharded over them, by default not at all
    devices: IntIfSet = None
    fit: bool = False  # choose the batch_size and remat that fit and should train fastest
    # find the model and token count with the lowest predicted loss after so many hours
    hours: FloatIfSet = None
    json: bool = False  # print one JSON object
    # estimate memory instead of compiling: instant, within 10 %
    estimate: bool = False


MAX_DEVICES = 65536


def run(argv: Sequence[str]) -> int:
    """Plan what the flags describe, and print tables or JSON. Raises UserError."""
    asked, flags, given = parse_run(
        PlanFlags,
        argv,
        prog=PROG,
        description="What fits a card, what it needs, and how long it takes.",
        default_preset=lambda: _default_preset(given_flags(argv)),
    )
    gpu = _card(flags.gpu, flags.vram)
    mesh = _mesh(asked, flags.devices)
    _check_hours(flags, given, mesh)
    if asked.init_from is not None:
        raise ConfigError(
            f"--init-from {asked.init_from}: plan reads no weights; describe their shape instead: "
            "--arch, --n-layer, --n-head, --n-embd, --block-size"
        )
    # The data's tokenizer decides the size of the embedding, as in `train`.
    asked = dataclasses.replace(asked, tokenizer=origin_of_data(asked, given).tokenizer)
    target.prepare_environment()
    hardware.check_settings()
    hardware.import_jax()
    answer, show = _answer(asked, flags, given, _planner(gpu, flags.estimate, mesh))
    if flags.json:
        print(json.dumps(answer, indent=2))
    else:
        show(answer)
    return 0


def _planner(gpu: Gpu, estimate: bool, mesh: MeshShape) -> "Planner":
    from jaxgpt.planning.planner import Planner

    why_estimated = "--estimate was given" if estimate else target.obstacle(gpu)
    try:
        return Planner(gpu, why_estimated, waiting, mesh)
    except target.NoCompilerError as error:
        return Planner(gpu, str(error), waiting, mesh)


def _answer(
    asked: Config, flags: PlanFlags, given: Collection[str], planner: "Planner"
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None]]:
    """The answer, and the function that prints it."""
    cfg = planner.resolve(asked)
    if flags.hours is not None:
        return planner.best_for_hours(cfg, flags.hours), tables.print_hours
    own = {f.name for f in dataclasses.fields(PlanFlags)} - flat_fields().keys()
    if set(given) - own or flags.fit or planner.mesh.devices > 1:
        free = asked.open_choices
        if flags.fit:
            free |= CHOICES - set(given)
        return planner.one(cfg, free), tables.print_one
    from jaxgpt.planning.overview import overview

    return overview(planner, cfg), tables.print_overview


def _check_hours(flags: PlanFlags, given: Collection[str], mesh: MeshShape) -> None:
    """Raises ConfigError for flags that cannot be given with --hours."""
    if flags.hours is None:
        return
    if errors := bad_amounts(flags, "hours", zero=False):
        raise ConfigError(errors[0])
    if chosen := sorted({*names_with(Role.PLANNED), "fit"} & set(given)):
        names = ", ".join(as_flag(name) for name in chosen)
        raise ConfigError(f"--hours chooses {names} itself; leave out one or the other")
    if mesh.devices > 1:
        raise ConfigError("--hours plans for one card; leave out --devices and --mesh")


def _mesh(asked: Config, devices: int | None) -> MeshShape:
    """The mesh to plan for.

    Raises:
        ConfigError: if --devices is not the number that --mesh has.
    """
    if devices is not None and not 1 <= devices <= MAX_DEVICES:
        raise ConfigError(f"--devices {devices} must be between 1 and {MAX_DEVICES}")
    shape = parse_mesh(asked.mesh) if asked.mesh else MeshShape(data=devices or 1)
    if devices not in (None, shape.devices):
        raise ConfigError(
            f"--mesh {shape} has {shape.devices} devices, and --devices is {devices}; leave out "
            "one of the two"
        )
    return shape


def _default_preset(values: dict[str, str | None]) -> str:
    # A wrong flag is reported later, when flags are parsed; any preset will do until then.
    try:
        vram = values.get("vram")
        gpu = _card(values.get("gpu"), None if vram is None else float(vram))
    except (UserError, ValueError):
        return Config.preset
    return preset_of_card(gpu.memory_bytes, gpu.compute_capability)


def _card(name: str | None, vram: float | None) -> Gpu:
    """The card to plan for.

    Raises:
        UserError: if both flags are given, or neither and this machine has no card.
    """
    if name is not None and vram is not None:
        raise ConfigError("--gpu and --vram both describe the card; give one")
    if vram is not None:
        if not 1 <= vram <= 1024:
            raise ConfigError(f"--vram {vram:g} must be between 1 and 1024 (GB)")
        return unnamed_card(vram)
    if name is not None:
        return find_gpu(name)
    card = visible_card()
    if card is None:
        raise ConfigError(
            "no card is visible in this machine; name the one to plan for with --gpu NAME "
            "(rtx4090, 'RTX 3080 Laptop', a100-80gb, ...) or --vram GB"
        )
    unnamed = dataclasses.replace(unnamed_card(card.memory_bytes / GIB), name=card.name)
    return lookup_gpu(card.name, card.memory_bytes) or unnamed


main = make_main(PROG, run, read_only=True)

if __name__ == "__main__":
    sys.exit(main())
