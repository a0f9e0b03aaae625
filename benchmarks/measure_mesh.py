"""Compile training steps for several H100s that need not be present: memory and collectives.

    pip install -e '.[plan]'
    python benchmarks/measure_mesh.py          # writes benchmarks/results/mesh.json
    python benchmarks/measure_mesh.py --table  # the table of docs/scaling.md, from that file

Bytes are counted in the compiled program: a collective's result (a reduce-scatter's operand), times
the repetitions of the loops around it. On a ring of n devices each sends (n - 1) / n of the bytes
of an all-gather or reduce-scatter, and twice that of an all-reduce.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from jaxgpt.config.fields import with_fields
from jaxgpt.config.mesh_shape import parse_mesh
from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved
from jaxgpt.planning import target
from jaxgpt.planning.gpus import GIB, find_gpu
from jaxgpt.planning.train_command import resolve_new

ROOT = Path(__file__).absolute().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mesh.json"
COMMAND = "python benchmarks/measure_mesh.py"
GPU = "h100"
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile, with the latency-hiding scheduler or without."""

    preset: str
    mesh: str | None
    remat: str
    batch_size: int
    scan_layers: bool = False
    scheduler: bool = False


MESHES = (None, "data=8", "fsdp=8", "data=2,fsdp=4")
CASES = (
    *(Case("80gb-350m", mesh, "full", 32, scan_layers=True) for mesh in MESHES),
    Case("80gb-350m", "fsdp=8", "full", 32, scan_layers=True, scheduler=True),
    Case("24gb-1558m", "fsdp=8", "full", 16, scan_layers=True),
    Case("80gb-350m", "fsdp=8", "full", 32),
)


def config_of(case: Case) -> Resolved:
    """The configuration of `train` with the flags of the case."""
    asked = with_fields(
        load_preset(case.preset),
        mesh=case.mesh,
        remat=case.remat,
        state_dtype="float32",
        scan_layers=case.scan_layers,
        batch_size=case.batch_size,
    )
    return resolve_new(asked, "bfloat16", parse_mesh(case.mesh))


def measure(case: Case) -> dict[str, Any]:
    """Memory and collectives of one case, by the compiler."""
    from jaxgpt.planning import memory
    from jaxgpt.training.sharding import make_layout

    cfg = config_of(case)
    devices = cfg.mesh.devices
    layout = make_layout(target.card_devices(find_gpu(GPU), devices), cfg.mesh)
    compiled = memory.compile_ahead(cfg, layout.device, layout, {SCHEDULER: case.scheduler})
    need = memory.need_of(cfg, compiled)
    return {
        **dataclasses.asdict(case),
        "gpu": GPU,
        "devices": devices,
        "parameters": cfg.model.parameter_count(),
        "gradient_accumulation_steps": cfg.batch.accumulation,
        "peak_bytes": need.peak_bytes,
        "state_bytes": sum(memory.state_bytes(cfg).values()),
        "collectives": collectives(compiled.as_text()),
    }


# ---------------------------------------------------------------- the compiled program's text

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
CALL = re.compile(r"(?:body|condition|to_apply|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Count, total bytes and largest bytes per step of each kind of collective in a program."""
    found: defaultdict[str, dict[str, float]] = defaultdict(
        lambda: {"count": 0, "bytes": 0, "largest_bytes": 0}
    )
    bodies, entry = _computations(text)
    times = _times(bodies, entry)
    for name, lines in bodies.items():
        for line in lines:
            if (match := COLLECTIVE.search(line)) and times.get(name):
                size = _bytes(match[1], bool(match[3]))
                if match[2] == "reduce-scatter" and not match[3]:
                    size *= _group_size(line)  # the operand's size, which this form does not show
                kind = found[match[2]]
                kind["count"] += times[name]
                kind["bytes"] += times[name] * size
                kind["largest_bytes"] = max(kind["largest_bytes"], size)
    return dict(found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often one step runs each computation."""
    times: defaultdict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
        times[name] += factor
        for line in bodies[name]:
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            assert " while(" not in line or trips, "a loop of unknown length"
            inner = factor * (int(trips[1]) if trips else 1)
            for called in CALL.findall(line):
                for one in re.findall(r"[\w.\-]+", called):
                    if one in bodies:
                        visit(one, inner)

    visit(entry, 1)
    return times


def _bytes(shapes: str, is_start: bool) -> int:
    """Bytes of a collective's result, a reduce-scatter's operand."""
    sizes = [
        WIDTHS[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    ]
    if not is_start:
        return sum(sizes)
    # ((operands), (results)): an all-gather's results are larger, a reduce-scatter's operands.
    first, second = sum(sizes[: len(sizes) // 2]), sum(sizes[len(sizes) // 2 :])
    return max(first, second)


def _group_size(line: str) -> int:
    """Number of devices in a collective, in any of XLA's notations."""
    if axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    if grid := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(grid[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    assert listed, line
    return listed[1].count(",") + 1


# ---------------------------------------------------------------- the file and its table


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each case: what each card needs, and what it takes part in each step."""
    lines = [
        "| model | mesh | remat, batch_size x accumulation | scheduler | state | needs | "
        "all-gather | reduce-scatter | all-reduce | largest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kinds = row["collectives"]
        cells = (
            f"{row['parameters'] / 1e6:.0f}M{', scanned' if row['scan_layers'] else ''}",
            row["mesh"] or "one card",
            f"{row['remat']}, {row['batch_size']} x {row['gradient_accumulation_steps']}",
            "on" if row["scheduler"] else "off",
            f"{row['state_bytes'] / GIB:.2f} GiB",
            f"{row['peak_bytes'] / GIB:.2f} GiB",
            *(_said(kinds.get(k)) for k in ("all-gather", "reduce-scatter", "all-reduce")),
            f"{max((k['largest_bytes'] for k in kinds.values()), default=0) / 1e6:.0f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(kind: dict[str, float] | None) -> str:
    return f"{kind['bytes'] / 1e9:.2f} GB in {kind['count']:.0f}" if kind else ""


def measure_all(path: Path) -> None:
    """Measure what `path` does not hold yet, writing after each."""
    target.prepare_environment()
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    known = [{field: row[field] for field in dataclasses.asdict(CASES[0])} for row in rows]
    for case in dict.fromkeys(CASES):
        if dataclasses.asdict(case) in known:
            continue
        row = measure(case)
        rows.append(row)
        sent = sum(kind["bytes"] for kind in row["collectives"].values())
        print(f"{case}: {row['peak_bytes'] / GIB:.2f} GiB, {sent / 1e9:.2f} GB a step", flush=True)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
        text = json.dumps({"command": COMMAND, "versions": versions, "rows": rows}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.json.read_text())["rows"]))
    else:
        measure_all(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
