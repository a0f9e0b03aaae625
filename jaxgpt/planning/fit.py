"""What fits: the micro-batch and remat for a model on a card, and the largest model for a card.

The effective batch never changes, so neither does the training: only how much a device processes
at a time. Candidates are ordered by expected speed and filtered by estimate; the first that the
compiler confirms is taken.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from jaxgpt.config.batch import batch_sizes
from jaxgpt.config.fields import CHOICES
from jaxgpt.config.resolved import Resolved
from jaxgpt.model.remat import REMATS
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.memory import ESTIMATE_ERROR, RESERVE_BYTES, Need, estimate
from jaxgpt.planning.speed import relative_step_time

# GPT-2's own sizes and steps between and beyond them: (n_layer, n_head, n_embd), heads of 64. A
# network whose heads may have any width has half as many, of 128.
SHAPES = (
    *((4, 4, 256), (6, 6, 384), (8, 8, 512), (10, 10, 640), (12, 12, 768), (14, 14, 896)),
    *((18, 16, 1024), (24, 16, 1024), (28, 18, 1152), (36, 20, 1280), (40, 22, 1408)),
    *((48, 25, 1600), (48, 28, 1792), (48, 32, 2048), (52, 36, 2304), (56, 40, 2560)),
    *((60, 44, 2816), (64, 48, 3072)),
)
Measure = Callable[[Resolved], Need]


class Fitting(NamedTuple):
    """A run, what it needs, and the loss that is predicted for it."""

    cfg: Resolved
    need: Need
    loss: float | None = None


def loss_of(run: Fitting) -> float:
    """The predicted loss, to sort by."""
    return math.inf if run.loss is None else run.loss


def best_fit(
    cfg: Resolved, capacity: int, measure: Measure = estimate, free: Collection[str] = CHOICES
) -> Fitting | None:
    """`cfg` with the micro-batch and remat that should train fastest in `capacity` bytes.

    Args:
        cfg: the run; its effective batch is kept.
        capacity: bytes of the device's pool.
        measure: decides what fits; called for few candidates.
        free: which of batch_size and remat to choose; the other is kept.
    """
    for candidate in _candidates(cfg, free):
        guess = estimate(candidate)
        if guess.peak_bytes * (1 - ESTIMATE_ERROR) + RESERVE_BYTES > capacity:
            continue  # the estimate is never that far off: not worth compiling
        need = measure(candidate)
        if need.fits(capacity):
            return Fitting(candidate, need)
    return None


def _candidates(cfg: Resolved, free: Collection[str]) -> Iterator[Resolved]:
    batch, T = cfg.batch, cfg.model.block_size
    remats = REMATS if "remat" in free else (cfg.remat,)
    sizes = [batch.batch_size]
    if "batch_size" in free:
        sizes = batch_sizes(batch.effective, batch.devices)
    choices = [(remat, B) for remat in remats for B in sizes]
    for remat, B in sorted(choices, key=lambda x: relative_step_time(x[0], x[1] * T)):
        yield cfg.with_choice(B, remat)


def ladder(cfg: Resolved) -> Iterator[Resolved]:
    """`cfg` with every one of SHAPES, largest first."""
    for n_layer, n_head, n_embd in reversed(SHAPES):
        heads: dict[str, Any] = {"n_head": n_head}
        if cfg.model.has("head_dim"):
            heads = {"n_head": n_head // 2, "head_dim": 128, "n_kv_head": None, "mlp_width": None}
        model = dataclasses.replace(cfg.model, n_layer=n_layer, n_embd=n_embd, **heads)
        yield dataclasses.replace(cfg, model=model)


def largest_model(cfg: Resolved, capacity: int, measure: Measure = estimate) -> Fitting | None:
    """The largest of SHAPES that trains in `capacity` bytes, its state in bfloat16."""
    optimizer = dataclasses.replace(cfg.optimizer, state_dtype="bfloat16")
    shapes = ladder(dataclasses.replace(cfg, optimizer=optimizer))
    fitting = (best_fit(shape, capacity, measure) for shape in shapes)
    return next((found for found in fitting if found), None)


def does_not_fit(cfg: Resolved, device_name: str, capacity: int) -> str:
    """The message for a model that fits the device with none of batch_size and remat."""
    least = estimate(cfg.with_choice(1, "full"))
    return (
        f"{cfg.asked.preset} does not fit {device_name}: it needs at least about "
        f"{least.peak_bytes / GIB:.1f} GiB (batch_size 1, remat full), and there are "
        f"{capacity / GIB:.1f} GiB; use a smaller model or --block-size, or --state-dtype bfloat16"
    )


def flags_that_fit(cfg: Resolved, capacity: int, need: Need) -> str:
    """The end of a message: flags with which `cfg` should fit into `capacity` bytes.

    `need` is the compiled need of `cfg`, which its estimate may be below.
    """
    found = best_fit(cfg, capacity, lambda other: need if other == cfg else estimate(other))
    if found is None:
        return does_not_fit(cfg, "this device", capacity)
    return (
        f"This should fit, and trains the same: --batch-size {found.cfg.batch.batch_size} --remat "
        f"{found.cfg.remat}   (or --batch-size auto)"
    )


def flags_after_out_of_memory(cfg: Resolved) -> str:
    """The end of a message: flags that need a fifth less memory than `cfg`, by estimate."""
    less = int(0.8 * estimate(cfg).peak_bytes / (1 - ESTIMATE_ERROR)) + RESERVE_BYTES
    found = best_fit(cfg, less)
    if found is None or found.cfg == cfg:
        return "No smaller batch_size or remat is left; use a smaller model."
    return (
        "Another program may use a part of it. These flags need less memory and train the same: "
        f"--batch-size {found.cfg.batch.batch_size} --remat {found.cfg.remat}"
    )
