"""Compare a step of `train`, with all that a run does around it, with a step of `bench`.

    python benchmarks/compare_train.py --preset 24gb --dataset embedded --json beside-bench.json

bench, train, bench, with the same flags: all that are not this script's own are passed on. The run
is timed from one line of its log to another, so that loader, metrics, log and bar are included, and
the evaluations and checkpoints at its start and end are not: `measure_train_overhead.py` measures
those.
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
LOG_INTERVAL = 10  # a tenth of the presets', so that a short run has enough lines


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=60, help="steps of the run, at least two log lines"
    )
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
    """The JSON of `jaxgpt.bench`."""
    return json.loads(run("bench", [*flags, "--json"]))


def train(flags: Sequence[str], steps: int) -> float:
    """Milliseconds per step of `jaxgpt.train`, from its first log line to its last but one."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"max-iters": steps, "eval-interval": steps, "log-interval": LOG_INTERVAL}
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        run("train", [*flags, *words, "--eval-iters", "1", "--out-dir", f"{folder}/run"])
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    at = {record["step"]: record["time"] for record in map(json.loads, lines)}
    first, last = LOG_INTERVAL, (steps - 1) // LOG_INTERVAL * LOG_INTERVAL
    return 1e3 * (at[last] - at[first]) / (last - first)


def run(command: str, flags: Sequence[str]) -> str:
    """The output of a jaxgpt command, run in its own process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", f"jaxgpt.{command}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        sys.exit(f"jaxgpt.{command}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
