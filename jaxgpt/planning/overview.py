"""The overview of a card: which presets fit, the one to start with, and the largest model."""

import math
from collections.abc import Sequence
from typing import Any

from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import BFLOAT16_FROM, Resolved
from jaxgpt.planning import fit, memory, speed
from jaxgpt.planning.gpus import find_gpu, preset_of_card, presets_for
from jaxgpt.planning.planner import Planner
from jaxgpt.planning.train_command import at_suggested_rate, of_its_preset

HOURS = 48.0  # of training, that the presets are compared for
ASSUMED = "rtx3090"  # by whose speed presets are ranked for a card of unknown speed


def overview(planner: Planner, cfg: Resolved) -> dict[str, Any]:
    """Which presets fit, the one to start with, and the largest model that trains here.

    `cfg` gives the context, effective batch and steps of the largest model.
    """
    presets = [planner.resolve(load_preset(name)) for name in presets_for(cfg.dtype)]
    starters = [_starter(planner, preset) for preset in presets if preset.asked.vram_gb]
    starters.sort(key=_rank)
    recommended = planner.one(_recommended(planner, presets), ())
    largest = fit.largest_model(cfg, planner.capacity, planner.need)
    return {
        "gpu": planner.gpu.key,
        "capacity_bytes": planner.capacity,
        "reasons": _reasons(planner, cfg, starters),
        "hours_given": HOURS,
        "presets": starters,
        "recommended": recommended,
        "largest_model": _record_of_largest(planner, largest) if largest else None,
        "command": recommended["command_that_fits"],
    }


def _starter(planner: Planner, cfg: Resolved) -> dict[str, Any]:
    """A preset in the overview: what it needs as it is, and its loss after HOURS."""
    need = memory.estimate(cfg)
    record = planner.record(cfg, need)
    found = fit.Fitting(cfg, need) if record["fits"] else planner.fitting(cfg)
    trained = planner.trained_for(HOURS, found) if found else None
    batch_size, remat = (found.cfg.batch.batch_size, found.cfg.remat) if found else (None, None)
    return {
        **record,
        "batch_size_that_fits": batch_size,
        "remat_that_fits": remat,
        "predicted_loss": trained.loss if trained else None,
    }


def _recommended(planner: Planner, presets: Sequence[Resolved]) -> Resolved:
    """The preset with the least predicted loss after HOURS, trained as long.

    One of those that fit as they are or, if none does, with another batch_size and remat. For a
    card of unknown speed it is chosen as if for ASSUMED, and trained as long as it says; where
    that tells nothing either, in float32, it is the default of a card with its memory.
    """
    needs = [fit.Fitting(one, memory.estimate(one)) for one in presets if one.asked.vram_gb]
    fitting = [one for one in needs if one.need.fits(planner.capacity)]
    if not fitting:
        fitting = [found for one in needs if (found := planner.fitting(one.cfg))]
    for gpu in (planner.gpu, find_gpu(ASSUMED)):
        pairs = [(one.cfg, planner.trained_for(HOURS, one, gpu)) for one in fitting]
        trained = [(cfg, choice) for cfg, choice in pairs if choice]
        if trained:
            cfg, choice = min(trained, key=lambda pair: pair[1].loss)
            return choice.fitting.cfg if gpu is planner.gpu else cfg
    name = preset_of_card(planner.gpu.memory_bytes, planner.gpu.compute_capability)
    default = [one.cfg for one in fitting if one.cfg.asked.preset == name]
    return next(iter(default), planner.resolve(load_preset(name)))


def _record_of_largest(planner: Planner, found: fit.Fitting) -> dict[str, Any]:
    """The largest model, at the learning rate for its size and as a variant of its preset."""
    return planner.record(of_its_preset(at_suggested_rate(found.cfg)), found.need)


def _reasons(planner: Planner, cfg: Resolved, starters: Sequence[dict[str, Any]]) -> list[str]:
    """What somebody should know before reading the overview."""
    reasons = []
    major, minor = planner.gpu.compute_capability
    if planner.gpu.compute_capability < BFLOAT16_FROM:
        reasons.append(
            f"Compute capability {major}.{minor} has no bfloat16: it computes in float16 with loss "
            "scaling, without flash attention."
        )
    if not any(one["fits"] for one in starters):
        some = any(one["batch_size_that_fits"] for one in starters)
        reasons.append(
            "No preset fits as it is. Those with a batch_size in the column 'fits' do with that, "
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


def _rank(starter: dict[str, Any]) -> tuple[bool, bool, float]:
    """Sorts what fits first, and among those the least predicted loss."""
    loss = starter["predicted_loss"]
    return (not starter["fits"], starter["batch_size_that_fits"] is None, loss or math.inf)
