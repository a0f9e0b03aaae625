"""The overview of a card: which presets fit, the one to start with, and the largest model."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import BFLOAT16_FROM, Resolved
from jaxgpt.planning import fit, memory, speed
from jaxgpt.planning.gpus import find_gpu, preset_of_card, presets_for
from jaxgpt.planning.planner import Planner
from jaxgpt.planning.train_command import of_its_preset

HOURS = 48.0  # of training, that the presets are compared for
ASSUMED = "rtx3090"  # by whose speed presets are ranked for a card of unknown speed


class Starter(NamedTuple):
    """A preset as a run to start with."""

    record: dict[str, Any]  # of the preset as it is
    found: fit.Fitting | None  # it, or it with a batch_size and remat that fit


def overview(planner: Planner, cfg: Resolved) -> dict[str, Any]:
    """Which presets fit, the one to start with, and the largest model that trains here.

    `cfg` gives the context, effective batch and steps of the largest model.
    """
    presets = [planner.resolve(asked) for asked in presets_for(cfg.dtype) if asked.vram_gb]
    starters = [_starter(planner, preset) for preset in presets]
    starters.sort(key=_rank)
    recommended = planner.one(_recommended(planner, starters), ())
    largest = fit.largest_model(cfg, planner.capacity, planner.need)
    if largest:  # at the learning rate for its size, as a variant of its preset
        largest = largest._replace(cfg=of_its_preset(speed.at_suggested_rates(largest.cfg)))
    return {
        "gpu": planner.gpu.key,
        "capacity_bytes": planner.capacity,
        "reasons": _reasons(planner, cfg, starters),
        "hours_given": HOURS,
        "presets": [starter.record for starter in starters],
        "recommended": recommended,
        "largest_model": planner.record(largest) if largest else None,
        "command": recommended["command_that_fits"],
    }


def _starter(planner: Planner, cfg: Resolved) -> Starter:
    """A preset in the overview: what it needs as it is, and its loss after HOURS."""
    run = fit.Fitting(cfg, memory.estimate(cfg))
    record = planner.record(run)
    found = run if record["fits"] else planner.fitting(cfg)
    trained = planner.trained_for(HOURS, found) if found else None
    shown = {
        "batch_size_that_fits": found.cfg.batch.batch_size if found else None,
        "remat_that_fits": found.cfg.remat if found else None,
        "predicted_loss": trained.loss if trained else None,
    }
    return Starter(record | shown, found)


def _rank(starter: Starter) -> tuple[bool, bool, float]:
    """Sorts what fits first, and among those the least predicted loss."""
    loss = starter.record["predicted_loss"]
    return (not starter.record["fits"], starter.found is None, loss or math.inf)


def _recommended(planner: Planner, starters: Sequence[Starter]) -> Resolved:
    """The preset with the least predicted loss after HOURS of training.

    Presets that fit unchanged come first, then those with another batch_size and remat. On a
    card of unknown speed they are ranked as on ASSUMED, and the chosen one keeps its number of
    steps. In float32 no speed is known at all: then it is the default for the card's memory.
    """
    found = [starter.found for starter in starters if starter.record["fits"]]
    runs = [run for run in found or [starter.found for starter in starters] if run]
    for gpu in (planner.gpu, find_gpu(ASSUMED)):
        trained = [
            (choice, run) for run in runs if (choice := planner.trained_for(HOURS, run, gpu))
        ]
        if trained:
            choice, run = min(trained, key=lambda pair: fit.loss_of(pair[0]))
            return choice.cfg if gpu is planner.gpu else run.cfg
    name = preset_of_card(planner.gpu.memory_bytes, planner.gpu.compute_capability)
    default = [run.cfg for run in runs if run.cfg.asked.preset == name]
    return next(iter(default), planner.resolve(load_preset(name)))


def _reasons(planner: Planner, cfg: Resolved, starters: Sequence[Starter]) -> list[str]:
    """What somebody should know before reading the overview."""
    reasons = []
    major, minor = planner.gpu.compute_capability
    if planner.gpu.compute_capability < BFLOAT16_FROM:
        reasons.append(
            f"Compute capability {major}.{minor} has no bfloat16: it computes in float16 with loss "
            "scaling, without flash attention."
        )
    if not any(one.record["fits"] for one in starters):
        some = any(one.found for one in starters)
        reasons.append(
            "No preset fits as it is. Those with a batch_size in the 'fits' column fit with it "
            "and train the same."
            if some
            else "No preset fits, with any batch_size and remat."
        )
    if speed.tokens_per_second(cfg, planner.gpu) is None:
        by = "its memory" if cfg.dtype == "float32" else f"the speed of an {find_gpu(ASSUMED).name}"
        reasons.append(
            f"No speed is known for it in {cfg.dtype}, so no times; what to start with is "
            f"chosen by {by}."
        )
    elif "Laptop" in planner.gpu.name:
        reasons.append(
            "Times are for a high power limit of this card; many laptops have a lower one."
        )
    if planner.why_estimated:
        reasons.append(f"Memory is estimated, within a tenth: {planner.why_estimated}.")
    return reasons
