"""Hold the estimates of roofline.py against a trace of the same step, part by part.

    python benchmarks/trace_groups.py 124m-b32 adamw h200 FOLDER --json benchmarks/results/FILE
    python benchmarks/trace_groups.py --table benchmarks/results/FILE

FOLDER has what trace_step.py leaves: `program.txt.gz` and a `perfetto_trace.json.gz`, of
roofline.ACCUMULATION micro-batches.
"""

import argparse
import gzip
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import roofline
from gpu.trace_step import kernels_of
from hlo import Program

from jaxgpt.bench import TRACED_STEPS


def measured_ms(trace: Path) -> Counter[str]:
    """Milliseconds in one step of each operation in the program, by its name."""
    ms: Counter[str] = Counter()
    for span in kernels_of(trace):
        ms[span.get("args", {}).get("hlo_op", "")] += span["dur"] / 1e3 / TRACED_STEPS
    return ms


def compare(cfg: Any, text: str, ms: Counter[str], rates: roofline.Rates) -> dict[str, Any]:
    """roofline.py's groups with `measured_ms`, and what the trace has beside them."""
    groups = roofline.analyse(text, cfg, rates)
    owner = {}
    for kernel in Program(text).kernels():
        owner |= dict.fromkeys(kernel.names, roofline.group_of(kernel, cfg))
    for group in groups.values():
        group["measured_ms"] = 0.0
    other = 0.0
    for name, spent in ms.items():
        if name in owner:
            groups[owner[name]]["measured_ms"] += spent
        else:
            other += spent
    return {"groups": groups, "measured_ms": ms.total(), "not_in_the_program_ms": other}


def table(result: dict[str, Any]) -> str:
    """The groups in the order of their time, with the rates that they reached."""
    lines = [
        "| part of the step | ms measured | ms estimated | TFLOP/s | TB/s |",
        "|---|---|---|---|---|",
    ]
    groups = result["groups"].items()
    for name, g in sorted(groups, key=lambda item: -item[1]["measured_ms"]):
        seconds = g["measured_ms"] / 1e3 or math.inf
        flops = f"{g['flops'] / seconds / 1e12:.0f}" if g["flops"] else ""
        moved = (g["read"] + g["written"]) / seconds / 1e12
        lines.append(f"| {name} | {g['measured_ms']:.2f} | {g['ms']:.2f} | {flops} | {moved:.2f} |")
    estimated = sum(g["ms"] for _, g in groups)
    lines.append(f"| all | {result['measured_ms']:.2f} | {estimated:.2f} | | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", nargs="?", help="of roofline.py")
    parser.add_argument("optimizer", nargs="?", default="adamw")
    parser.add_argument("gpu", nargs="?", choices=roofline.RATES)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--table", type=Path, help="print the table of a recorded result and stop")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    if args.folder is None:
        parser.error("give a shape, an optimizer, a card and a folder, or --table FILE")
    text = gzip.decompress((args.folder / "program.txt.gz").read_bytes()).decode()
    ms = measured_ms(max(args.folder.rglob("perfetto_trace.json.gz")))
    rates = roofline.RATES[args.gpu]
    about = {"shape": args.shape, "optimizer": args.optimizer, "gpu": args.gpu}
    cfg = roofline.config_of(args.shape, args.optimizer)
    result = about | {"rates": rates._asdict()} | compare(cfg, text, ms, rates)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
