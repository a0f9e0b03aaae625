"""Where a training step's time goes on a card that is not here, read from the compiled program.

    pip install -e '.[plan]'
    python benchmarks/roofline.py                              # six shapes, two cards: the totals
    python benchmarks/roofline.py --shapes 24gb --gpus rtx4090 --optimizers adamw --groups
    python benchmarks/roofline.py --json benchmarks/results/roofline.json --label before
    python benchmarks/roofline.py --table                      # of docs/performance.md, from there

The step is compiled as `jaxgpt.plan` does. Bytes, FLOPs and launches are counted in its program.
The milliseconds are estimates: a kernel takes the longer of FLOPs / rate and bytes / bandwidth, and
a launch, at the rates below. trace_groups.py holds them against a trace.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hlo import Kernel, Program

from jaxgpt.config.fields import Config, with_fields
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GIB, find_gpu
from jaxgpt.planning.speed import model_flops_per_token
from jaxgpt.planning.train_command import resolve_new

RESULTS = Path(__file__).absolute().parent / "results" / "roofline.json"
COMMAND = "python benchmarks/roofline.py --json benchmarks/results/roofline.json"
ACCUMULATION = 4  # micro-batches in a step


class Rates(NamedTuple):
    """What a card is taken to reach."""

    bfloat16: float  # FLOP/s of large products
    float32: float  # likewise, in TF32
    forward: float  # FLOP/s of flash attention, causal
    backward: float
    bandwidth: float  # bytes/s
    launch: float = 2e-6  # seconds


# Below the data sheets' peaks (989 and 165 TFLOP/s, 3.35 and 1.01 TB/s) as far as cuBLAS and cuDNN
# are known to stay. Attention on Hopper at a head width of 64 and the H200's bandwidth: measured,
# results/trace-124m-b32-h200.json (products: 668 and 710) and quarter-hour-first-h200-before.json.
RATES = {
    "h100": Rates(675e12, 350e12, 260e12, 200e12, 3.0e12),
    "h200": Rates(675e12, 350e12, 260e12, 200e12, 4.1e12),
    "rtx4090": Rates(150e12, 75e12, 120e12, 100e12, 0.9e12),
}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
SHAPES = {"124m-b32": GPT2 | {"batch_size": 32}, "124m-b64": GPT2 | {"batch_size": 64}}
PRESETS = ("24gb", "80gb-350m", "24gb-774m", "124m-modern")
# Kernels in the loop over micro-batches by the functions that they come from; the first match.
SOURCES = {
    "accumulation": r"_accumulation\.",
    "loss, other passes": r"(^|, )loss\.",
    "embedding": r"\.embed|Embed\.",
    "MLP, element-wise": r"gelu\.|MLP\.",
    "q, k, v": r"Attention\.|attention\.",
    "norms and residual": r"norm|add_by_rows",
}


def config_of(name: str, optimizer: str) -> Resolved:
    """A shape or a preset in steps of ACCUMULATION micro-batches."""
    asked = with_fields(Config(), **SHAPES[name]) if name in SHAPES else load_preset(name)
    batch = ACCUMULATION * asked.batch_size
    return resolve_new(
        with_fields(asked, optimizer=optimizer, effective_batch_size=batch), "bfloat16"
    )


# ---------------------------------------------------------------- reading a program


def group_of(k: Kernel, cfg: Resolved) -> str:
    """The part of the step that a kernel belongs to."""
    V, D = cfg.model.vocab_size, cfg.model.n_embd
    if k.attention:
        return f"attention, {k.attention}"
    if k.product:
        if not k.in_loop:
            return "optimizer, products"
        head = V in (k.product.M, k.product.N, k.product.K)
        return "head, products" if head else "blocks, products"
    if not k.in_loop:
        return "optimizer"
    if any(V in dims and D not in dims for _, dims in k.touched):
        return "loss, passes over logits"
    found = next((name for name, pattern in SOURCES.items() if re.search(pattern, k.sources)), None)
    if found in ("accumulation", "loss, other passes"):
        return found
    if k.operations & {"scatter", "gather"}:
        return "embedding"
    if found == "embedding" or any(is_activation(dims, cfg) for _, dims in k.touched):
        return found or "other"
    return "weights, casts"


def is_activation(dims: Sequence[int], cfg: Resolved) -> bool:
    """Whether an array has a row for each token of a micro-batch, as BT... or B...T..."""
    B, T = cfg.batch.batch_size, cfg.model.block_size
    return len(dims) > 1 and (dims[0] == B * T or (dims[0] == B and T in dims))


def seconds_of(k: Kernel, cfg: Resolved, rates: Rates) -> tuple[float, float]:
    """(FLOPs, estimated seconds) of a kernel, each time it runs."""
    flops = rate = 0.0
    if k.product:
        flops = k.product.flops
        rate = rates.float32 if k.product.dtype == "f32" else rates.bfloat16
    elif k.attention:
        m = cfg.model
        # Half of the T x T scores; the backward pass has five products for the forward pass's two.
        products = 5 if k.attention == "backward" else 2
        flops = products * cfg.batch.batch_size * m.block_size**2 * m.n_embd
        rate = rates.backward if k.attention == "backward" else rates.forward
    busy = flops / rate if rate else 0.0
    return flops, max(busy, (k.read + k.written) / rates.bandwidth) + rates.launch


def analyse(text: str, cfg: Resolved, rates: Rates) -> dict[str, dict[str, float]]:
    """Launches, bytes, FLOPs and estimated milliseconds of one step, by group."""
    groups: dict[str, dict[str, float]] = {}
    for k in Program(text).kernels():
        empty = dict.fromkeys(("launches", "read", "written", "flops", "ms"), 0)
        total = groups.setdefault(group_of(k, cfg), empty)
        flops, seconds = seconds_of(k, cfg, rates)
        each = {"launches": 1, "read": k.read, "written": k.written, "flops": flops}
        for key, value in (each | {"ms": 1e3 * seconds}).items():
            total[key] += k.times * value
    return dict(sorted(groups.items()))


# ---------------------------------------------------------------- measuring


def measure(name: str, optimizer: str, gpu: str, save: Path | None = None) -> dict[str, Any]:
    """Compile a shape's step for a card and count."""
    from jaxgpt.planning import memory

    cfg = config_of(name, optimizer)
    compiled = memory.compile_ahead(cfg, target.card_devices(find_gpu(gpu))[0])
    text = compiled.as_text()
    if save:
        save.write_text(text)
    about = {"shape": name, "gpu": gpu, "optimizer": optimizer}
    peak_bytes = memory.need_of(cfg, compiled).peak_bytes
    return about | totals(cfg, peak_bytes, analyse(text, cfg, RATES[gpu]))


def totals(cfg: Resolved, peak_bytes: int, groups: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The figures of one step."""
    tokens = cfg.tokens_per_step
    ms = sum(g["ms"] for g in groups.values())
    return {
        "batch": str(cfg.batch),
        "remat": cfg.remat,
        "tokens_per_step": tokens,
        "flops_per_token": model_flops_per_token(cfg.model),
        "peak_bytes": peak_bytes,
        "bytes_per_token": sum(g["read"] + g["written"] for g in groups.values()) / tokens,
        "launches": sum(g["launches"] for g in groups.values()),
        "estimated_ms": ms,
        "estimated_tokens_per_second": 1e3 * tokens / ms,
        "groups": groups,
    }


def describe(row: dict[str, Any], with_groups: bool) -> Iterator[str]:
    """A row of results as lines of text."""
    yield (
        f"{row['shape']} {row['optimizer']} {row['gpu']}: "
        f"{row['bytes_per_token'] / 1e6:.3f} MB a token, {row['launches']:,.0f} launches a step, "
        f"{row['peak_bytes'] / GIB:.2f} GiB, estimated {row['estimated_ms']:,.1f} ms, "
        f"{row['estimated_tokens_per_second']:,.0f} tokens/s"
    )
    for name, g in row["groups"].items() if with_groups else ():
        share = g["ms"] / row["estimated_ms"]
        yield (
            f"    {name:26} {g['launches']:6,.0f} launches {g['read'] / 1e9:8.2f} GB read "
            f"{g['written'] / 1e9:8.2f} written {g['flops'] / 1e12:8.2f} TFLOP "
            f"{g['ms']:8.2f} ms {share:6.1%}"
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/performance.md: every label's figures side by side."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    lines = [
        "| shape | optimizer | card | MB a token | launches a step | GiB | estimated tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((r["shape"], r["optimizer"], r["gpu"]) for r in rows):
        same = {r["label"]: r for r in rows if (r["shape"], r["optimizer"], r["gpu"]) == key}
        found = [same[label] for label in labels if label in same]
        cells = (
            " → ".join(f"{r['bytes_per_token'] / 1e6:.3f}" for r in found),
            " → ".join(f"{r['launches']:,.0f}" for r in found),
            " → ".join(f"{r['peak_bytes'] / GIB:.2f}" for r in found),
            " → ".join(f"{r['estimated_tokens_per_second']:,.0f}" for r in found),
        )
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*SHAPES, *PRESETS)
    parser.add_argument("--shapes", nargs="+", default=names, help="shapes, or names of presets")
    parser.add_argument("--optimizers", nargs="+", default=("adamw", "muon"))
    parser.add_argument("--gpus", nargs="+", default=("h100", "rtx4090"), choices=RATES)
    parser.add_argument("--groups", action="store_true", help="also print every group")
    parser.add_argument("--save", type=Path, help="keep the text of the program (of the last one)")
    parser.add_argument("--json", type=Path, help="file to add the results to")
    parser.add_argument("--label", default="before", help="what the results are called there")
    parser.add_argument("--table", action="store_true", help="print the recorded table and stop")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(RESULTS.read_text())["rows"]))
        return 0
    target.prepare_environment()
    rows = []
    for gpu in args.gpus:
        for name in args.shapes:
            for optimizer in args.optimizers:
                rows.append({"label": args.label, **measure(name, optimizer, gpu, args.save)})
                print("\n".join(describe(rows[-1], args.groups)), flush=True)
                if args.json:
                    record(args.json, rows)
    return 0


def record(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows; those of the same label, shape, optimizer and card in the file give way."""

    def key(row: dict[str, Any]) -> tuple:
        return row["label"], row["shape"], row["optimizer"], row["gpu"]

    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {key(row) for row in rows}
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    result = {
        "command": f"{COMMAND} --label LABEL",
        "versions": versions,
        "figures are": "counted in programs that XLA compiled without a card; ms by these rates",
        "rates": {gpu: rates._asdict() for gpu, rates in RATES.items()},
        "rows": [*(row for row in old if key(row) not in new), *rows],
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
