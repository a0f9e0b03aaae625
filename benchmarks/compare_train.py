"""`train` beside `bench`, in turn: is a step as fast with all that a run does around it?

    python benchmarks/compare_train.py --preset 24gb --dataset embedded --json beside-bench.json

bench, train, bench, on the same flags: those that are not this script's own go to both. Of the run,
the time from one line of its log to another counts, so that loader, metrics, log and bar are in it,
and the evaluations at its start and end and their checkpoints are not: `measure_train_overhead.py`
has what those cost.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[1]
LOG_INTERVAL = 10  # a tenth of the presets', so that a minute has lines to time between


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the run, two log lines at least")
    parser.add_argument("--windows", type=int, default=3, help="timed windows of each bench")
    parser.add_argument("--window-seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args, flags = parser.parse_known_args(argv)
    if args.steps <= 2 * LOG_INTERVAL:
        parser.error(f"--steps must be above {2 * LOG_INTERVAL}: two log lines and the end")
    windows = ["--windows", str(args.windows), "--window-seconds", str(args.window_seconds)]
    before = bench([*flags, *windows])
    step_ms = train(flags, args.steps)
    after = bench([*flags, *windows])
    bench_ms = [before["step_ms"], after["step_ms"]]
    kept = ("device", "versions", "preset", "parameters", "batch", "tokens_per_step")
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/compare_train.py", *argv]),
        **{name: before[name] for name in kept},
        "train_step_ms": step_ms,
        "bench_step_ms": bench_ms,
        "train_over_bench": step_ms / statistics.mean(bench_ms),
        "bench_spread": abs(bench_ms[0] / bench_ms[1] - 1),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def bench(flags: Sequence[str]) -> dict[str, Any]:
    """What `jaxgpt.bench` says."""
    return json.loads(run("bench", [*flags, "--json"]))


def train(flags: Sequence[str], steps: int) -> float:
    """Milliseconds a step of `jaxgpt.train`, from its first log line to the last before its end."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"max-iters": steps, "eval-interval": steps, "log-interval": LOG_INTERVAL}
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        run("train", [*flags, *words, "--eval-iters", "1", "--out-dir", f"{folder}/run"])
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    at = {record["step"]: record["time"] for record in map(json.loads, lines)}
    first, last = LOG_INTERVAL, (steps - 1) // LOG_INTERVAL * LOG_INTERVAL
    return 1e3 * (at[last] - at[first]) / (last - first)


def run(command: str, flags: Sequence[str]) -> str:
    """What a command of ours prints; a process of its own, and one at a time."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", f"jaxgpt.{command}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        sys.exit(f"jaxgpt.{command} ended with code {done.returncode}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
