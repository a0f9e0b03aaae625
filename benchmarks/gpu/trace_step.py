"""Show where the time of a training step goes: its kernels, from a trace of a few steps.

    python benchmarks/gpu/trace_step.py FOLDER --preset gpt2-124m      # flags of `bench`
    python benchmarks/gpu/trace_step.py --read trace.json.gz           # a trace that exists

`bench --profile` runs in a process of its own, because the end of a trace can crash it; the trace
is then read here. FOLDER/program.txt.gz is the compiled program, which has the kernels'
names. Prints one JSON object.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TOP = 60  # kernels listed
# The first pattern that a kernel's name or operation matches gives its kind.
KINDS = {
    "attention": r"fmha|sdpa|flash",
    "products": r"nvjet|gemm|cutlass|xmma|cublas|splitk|dot",
    "copies": r"memcpy|memset|copy",
    "reductions": r"reduce",
    "gathers and scatters": r"scatter|gather",
    "element-wise": r"fusion|loop|input|wrapped|transpose",
}
# Without CUDA graphs each kernel is an event under the name of its operation.
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
DUMP = "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=train_step --xla_dump_to"


def main(argv: Sequence[str] | None = None) -> int:
    first, *rest = sys.argv[1:] if argv is None else argv
    if first == "--read":
        print(json.dumps(read_trace(Path(rest[0]))))
        return 0
    folder = Path(first)
    code, benched = run_bench(folder, rest)
    print(json.dumps({"exit_code": code, **benched}), flush=True)
    keep_program(folder)
    traces = sorted(folder.rglob("perfetto_trace.json.gz"))
    read = read_trace(traces[-1]) if traces else {"failed": "no trace was written"}
    print(json.dumps({"exit_code": code, **benched, **read}))
    return 0 if traces else 1


def run_bench(folder: Path, flags: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """(exit code, figures) of `bench` with a trace; the figures are missing if it ended early."""
    words = [sys.executable, "-m", "jaxgpt.bench", *flags, "--json", "--profile", str(folder)]
    own = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS} {DUMP}={folder}/dump".strip()
    # A program from the cache would not be dumped.
    environment = os.environ | {"XLA_FLAGS": own, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    names = ("step_ms", "step_ms_windows", "tokens_per_second", "compiled_peak_bytes")
    if done.returncode:
        return done.returncode, {}
    figures = json.loads(done.stdout)
    return 0, {name: figures[name] for name in names}


def keep_program(folder: Path) -> None:
    """Compress the optimized program into FOLDER/program.txt.gz."""
    for path in sorted((folder / "dump").glob("*after_optimizations.txt")):
        (folder / "program.txt.gz").write_bytes(gzip.compress(path.read_bytes()))


def read_trace(path: Path) -> dict[str, Any]:
    """Kernels of a trace in Chrome's format: time by kind and by name, and gaps between them."""
    spans = list(kernels_of(path))
    if not spans:
        return {"failed": "the trace has no kernels of a GPU"}
    kinds: Counter[str] = Counter()
    total: Counter[str] = Counter()
    count: Counter[str] = Counter()
    operations = {}
    for span in spans:
        details = span.get("args", {})
        operation = str(details.get("hlo_op", ""))
        name = re.sub(r"[._]\d+(?=$|\W)", "", span["name"])[:140]
        kinds[kind_of(f"{span['name']} {operation}")] += span["dur"]
        total[name] += span["dur"]
        count[name] += 1
        operations.setdefault(name, operation)
    busy, wall = covered(spans)
    return {
        "wall_ms": wall / 1e3,
        "gaps_share": 1 - busy / wall,
        "kernels": len(spans),
        "kinds_ms": {kind: us / 1e3 for kind, us in kinds.most_common()},
        "top": [
            {"name": name, "ms": us / 1e3, "count": count[name], "hlo_op": operations[name]}
            for name, us in total.most_common(TOP)
        ],
    }


def kernels_of(path: Path) -> Iterable[dict]:
    """A trace's events on a GPU's streams; its other threads repeat them under other names."""
    events = json.loads(gzip.decompress(path.read_bytes()))
    events = events["traceEvents"] if isinstance(events, dict) else events
    processes, threads = {}, {}
    for e in events:
        if e.get("ph") == "M" and e["name"] == "process_name":
            processes[e["pid"]] = e["args"]["name"]
        if e.get("ph") == "M" and e["name"] == "thread_name":
            threads[e["pid"], e["tid"]] = e["args"]["name"]
    cards = {pid for pid, name in processes.items() if "GPU" in name or "/device:" in name}
    for e in events:
        on_card = e.get("ph") == "X" and e["pid"] in cards
        if on_card and "Stream" in threads.get((e["pid"], e["tid"]), "Stream"):
            yield e


def kind_of(name: str) -> str:
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def covered(spans: Sequence[dict]) -> tuple[float, float]:
    """(microseconds in which a kernel runs, from the first one's start to the last one's end)."""
    intervals = sorted((s["ts"], s["ts"] + s["dur"]) for s in spans)
    busy, end = 0.0, intervals[0][0]
    for start, stop in intervals:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - intervals[0][0]


if __name__ == "__main__":
    sys.exit(main())
