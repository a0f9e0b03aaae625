"""What fits: the micro-batch and remat for a model on a card, and the largest model for a card.

The effective batch never changes, so neither does the training: only how much a device holds at a
time. Candidates are ordered by a rule of thumb for speed and sorted out by estimate; the first that
the compiler confirms is taken.
"""

import dataclasses
from collections.abc import Callable, Iterator

from jaxgpt.config.fields import Config, Remat, divisors, with_fields
from jaxgpt.planning.gpus import GIB
from jaxgpt.planning.memory import ESTIMATE_ERROR, RESERVE_BYTES, Need, estimate
from jaxgpt.planning.speed import relative_step_time

REMATS: tuple[Remat, ...] = ("none", "light", "full")
# GPT-2's own sizes and steps between and beyond them: (n_layer, n_head, n_embd), heads of 64.
SHAPES = (
    *((4, 4, 256), (6, 6, 384), (8, 8, 512), (10, 10, 640), (12, 12, 768), (14, 14, 896)),
    *((18, 16, 1024), (24, 16, 1024), (28, 18, 1152), (36, 20, 1280), (40, 22, 1408)),
    *((48, 25, 1600), (48, 28, 1792), (48, 32, 2048), (52, 36, 2304), (56, 40, 2560)),
    *((60, 44, 2816), (64, 48, 3072)),
)
Measure = Callable[[Config], Need]


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A configuration that fits, and what it needs."""

    cfg: Config
    need: Need


def best_fit(cfg: Config, capacity: int, measure: Measure = estimate) -> Fitting | None:
    """`cfg` with the micro-batch and remat that should train fastest in `capacity` bytes.

    Args:
        cfg: with its vocabulary and dtype resolved. What it leaves to `auto` is chosen; the
            effective batch, and what it does not leave, are kept.
        capacity: bytes of the device's pool.
        measure: the last word on what fits; called for few candidates.
    """
    for candidate in _candidates(cfg):
        guess = estimate(candidate)
        if guess.peak_bytes * (1 - ESTIMATE_ERROR) + RESERVE_BYTES > capacity:
            continue  # the estimate is never so far off: not worth compiling
        need = measure(candidate)
        if need.fits(capacity):
            return Fitting(candidate, need)
    return None


def is_open(cfg: Config) -> bool:
    """Whether `cfg` leaves something to `best_fit`."""
    return cfg.auto_batch_size or cfg.remat == "auto"


def smallest_micro_batch(cfg: Config) -> Config:
    """`cfg` at its least memory."""
    return with_fields(
        cfg,
        remat="full",
        batch_size=1,
        gradient_accumulation_steps=cfg.effective_batch_size // cfg.device_count,
        auto_batch_size=False,
    )


def left_open(cfg: Config) -> Config:
    """`cfg` with everything left to `best_fit` that may be."""
    return with_fields(cfg, auto_batch_size=True, remat="auto")


def _candidates(cfg: Config) -> Iterator[Config]:
    T, of_one = cfg.model.block_size, cfg.effective_batch_size // cfg.device_count
    remats = REMATS if cfg.remat == "auto" else (cfg.remat,)
    batch_sizes = divisors(of_one) if cfg.auto_batch_size else [cfg.batch_size]
    choices = [(remat, B) for remat in remats for B in batch_sizes]
    for remat, B in sorted(
        choices, key=lambda choice: relative_step_time(choice[0], choice[1] * T)
    ):
        yield with_fields(
            cfg,
            remat=remat,
            batch_size=B,
            gradient_accumulation_steps=of_one // B,
            auto_batch_size=False,
        )


def ladder(cfg: Config) -> Iterator[Config]:
    """`cfg` in every shape of the ladder, largest first, with what fits left open."""
    for n_layer, n_head, n_embd in reversed(SHAPES):
        yield left_open(with_fields(cfg, n_layer=n_layer, n_head=n_head, n_embd=n_embd))


def largest_model(cfg: Config, capacity: int, measure: Measure = estimate) -> Fitting | None:
    """The largest shape of the ladder that trains in `capacity` bytes, its state in bfloat16."""
    small_state = with_fields(cfg, state_dtype="bfloat16")
    fitting = (best_fit(shape, capacity, measure) for shape in ladder(small_state))
    return next((found for found in fitting if found), None)


def too_small(cfg: Config, device_name: str, capacity: int) -> str:
    """What to tell a user whose model fits the device in no way."""
    least = estimate(smallest_micro_batch(cfg))
    return (
        f"{cfg.preset} does not fit {device_name}: the least it needs is some "
        f"{least.peak_bytes / GIB:.1f} GiB (batch_size 1, remat full), and "
        f"{capacity / GIB:.1f} GiB are there; take a smaller model or --block-size, or "
        "--state-dtype bfloat16"
    )


def advice(cfg: Config, capacity: int) -> str:
    """The flags that would fit `cfg` into `capacity` bytes, to be read after what does not."""
    found = best_fit(left_open(cfg), capacity)
    if found is None:
        return too_small(cfg, "this device", capacity)
    return (
        f"This should fit, and trains the same: --batch-size {found.cfg.batch_size} --remat "
        f"{found.cfg.remat}   (or --batch-size auto)"
    )


def smaller(cfg: Config) -> str:
    """The flags to try when `cfg` has run out of memory: a fifth less by estimate."""
    if is_open(cfg):
        return "Give a smaller --batch-size, --remat full, or a smaller model."
    less = int(0.8 * estimate(cfg).peak_bytes / (1 - ESTIMATE_ERROR)) + RESERVE_BYTES
    found = best_fit(left_open(cfg), less)
    if found is None or found.cfg == cfg:
        return "Nothing smaller is left of batch_size and remat; take a smaller model."
    return (
        f"Something else may hold a part of it. With less: --batch-size {found.cfg.batch_size} "
        f"--remat {found.cfg.remat}, which trains the same."
    )
