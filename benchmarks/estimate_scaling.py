"""Estimate step time and efficiency on several hosts of eight H100s, on paper.

    python benchmarks/estimate_scaling.py

A step takes its computation, as `jaxgpt.plan` predicts it for one card, plus its messages, as
docs/scaling.md counts them in the compiled program, without overlap.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

from jaxgpt.config.fields import with_fields
from jaxgpt.config.mesh_shape import MeshShape
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved
from jaxgpt.planning.gpus import find_gpu
from jaxgpt.planning.speed import tokens_per_second
from jaxgpt.planning.train_command import resolve_new

A_HOST = 8
# Bytes per second that each card of a ring sends: two thirds of NVLink's 450e9 in each direction;
# between hosts, four fifths of a host's links, shared by its cards.
INSIDE = 300e9
LINKS = {"8 x 400 Gb/s": 0.8 * 8 * 50e9, "1 x 100 Gb/s": 0.8 * 12.5e9}


class Seconds(NamedTuple):
    """Parts of one step."""

    computing: float
    inside: float  # messages within hosts
    between: float  # messages between hosts


def seconds(cfg: Resolved, hosts: int, between: float) -> Seconds:
    """A step of `cfg`, whose fsdp axis stays within a host."""
    shape, m = cfg.mesh, cfg.model
    N, A = m.parameter_count(), cfg.batch.accumulation
    ends = ((m.vocab_size or 0) + m.block_size) * m.n_embd
    rate = tokens_per_second(cfg, find_gpu("h100"))
    assert rate is not None
    # Ring algorithms: an all-gather or a reduce-scatter sends all but a card's own share, an
    # all-reduce does both.
    share = (shape.fsdp - 1) / shape.fsdp
    times = {"none": 1, "light": 2, "full": 2}[cfg.remat]  # a block's weights are gathered
    gathered = 2 * times * (N - ends) + 4 * ends
    inside = A * share * (gathered + 4 * N) / INSIDE
    # Once per step, over replicas: within a host if there is only one.
    groups = 2 * (shape.data - 1) / shape.data * 4 * N
    if hosts == 1:
        return Seconds(cfg.tokens_per_step / rate, inside + groups / shape.fsdp / INSIDE, 0.0)
    return Seconds(cfg.tokens_per_step / rate, inside, groups / between)


def cases() -> Iterator[tuple[Resolved, int]]:
    """(configuration, hosts)."""
    for preset, most in (("80gb-350m", 64), ("24gb-1558m", 16)):
        for hosts in (1, 8, 64):
            devices = A_HOST * hosts
            for shape in (MeshShape(data=devices), MeshShape(data=hosts, fsdp=A_HOST)):
                asked = load_preset(preset)
                asked = with_fields(
                    asked,
                    state_dtype="float32",
                    batch_size=min(most, asked.effective_batch_size // devices),
                    remat="full" if preset == "24gb-1558m" else "none",
                )
                yield resolve_new(asked, "bfloat16", shape), hosts


def main() -> int:
    print(
        "| model | GPUs | mesh | batch_size x accumulation | computing | messages inside |", end=""
    )
    print("".join(f" between, {name} | efficiency |" for name in LINKS))
    print("|" + "---|" * (6 + 2 * len(LINKS)))
    for cfg, hosts in cases():
        by_link = [seconds(cfg, hosts, speed) for speed in LINKS.values()]
        computing, inside, _ = by_link[0]
        cells = [
            f"{cfg.model.parameter_count() / 1e6:.0f}M",
            f"{A_HOST * hosts}",
            f"{cfg.mesh}",
            f"{cfg.batch.batch_size} x {cfg.batch.accumulation}",
            f"{1e3 * computing:.0f} ms",
            f"{1e3 * inside:.1f} ms",
        ]
        for step in by_link:
            cells += [f"{1e3 * step.between:.1f} ms", f"{computing / sum(step):.0%}"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
