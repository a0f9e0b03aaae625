"""Before anything is read: how many tokens, how much disk, how long."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from jaxgpt.errors import UserError
from jaxgpt.preparation.inputs import TEXT_BYTES_PER_TOKEN, Input
from jaxgpt.preparation.plan import HubSource, Plan
from jaxgpt.preparation.workers import AHEAD

# GPT-2's BPE on one core of a server; benchmarks/results/prepare-throughput.json has this one's.
TEXT_BYTES_PER_CORE_SECOND = 18e6
DOWNLOADS_AT_ONCE = 4  # files of the Hub that may lie here together


@dataclass(frozen=True)
class Estimate:
    """Of a whole preparation, in its rough numbers."""

    input_bytes: int
    needed_bytes: int  # of the input, until a limit is reached
    text_bytes: int
    tokens: int
    disk_bytes: int  # of the tokens
    working_bytes: int  # beside them, while it works
    core_seconds: float


def estimate(
    plan: Plan, inputs: Sequence[Input], limit_tokens: int | None, workers: int
) -> Estimate:
    """What preparing `inputs` will take; without a limit, all of them."""
    s = plan.settings
    per_token = 1.0 if s.tokenizer == "byte" else TEXT_BYTES_PER_TOKEN
    n_bytes = needed = sum(item.size for item in inputs) // s.world_size
    text = sum(item.text_bytes for item in inputs) // s.world_size
    tokens = int(text / per_token)
    if limit_tokens is not None:
        share = min(1.0, (limit_tokens + (s.val_tokens or 0)) / max(tokens, 1))
        tokens, text, needed = int(tokens * share), int(text * share), int(n_bytes * share)
    unit_tokens = min(s.unit_bytes / per_token, tokens)
    waiting = min(tokens, s.shard_tokens + workers * AHEAD * unit_tokens)
    remote = (
        max((item.size for item in inputs), default=0) if isinstance(plan.source, HubSource) else 0
    )
    return Estimate(
        input_bytes=n_bytes,
        needed_bytes=needed,
        text_bytes=text,
        tokens=tokens,
        disk_bytes=2 * tokens,
        working_bytes=int(2 * waiting) + min(DOWNLOADS_AT_ONCE, len(inputs)) * remote,
        core_seconds=text / TEXT_BYTES_PER_CORE_SECOND,
    )


def check_disk(out: Path, needed: int) -> str:
    """What a disk has free, in words; raises UserError if that is less than `needed` bytes."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: needs about {decimal(needed)} of disk and has {decimal(free)} free; make "
            "room, choose a folder on another disk (--out), or take fewer tokens (--limit-tokens)"
        )
    return decimal(free)
