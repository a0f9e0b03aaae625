"""Time commands until they answer, and a run until its first step, compiled and from the cache.

    python benchmarks/measure_start.py --json benchmarks/results/start.json

Every answer is from its own process, timed from outside. The two starts are `jaxgpt.bench` with the
24gb preset's architecture and a small batch; the compile cache is empty before the first.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.run.device import versions

ANSWERS = (("help", "--help"), ("mistake", "--no-such-flag"))
COMMANDS = ("train", "prepare", "plan", "bench", "sample", "evaluate", "export")
SMALL = "--preset 24gb --device cpu --batch-size 1 --effective-batch-size 1 --synthetic"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each answer")
    parser.add_argument("--run", default=SMALL, help="flags of the run to start twice")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/measure_start.py", *argv]),
        "versions": versions(),
        "cores": os.cpu_count(),
        "answer_seconds": {
            name: {what: answer(name, flag, args.repeats) for what, flag in ANSWERS}
            for name in COMMANDS
        },
        "run": args.run,
    }
    with tempfile.TemporaryDirectory() as folder:
        for which in ("first_start", "second_start"):
            result[which] = start(shlex.split(args.run), folder)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def answer(command: str, flag: str, repeats: int) -> float:
    """Median seconds until a command has answered a flag."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", f"jaxgpt.{command}", flag], capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def start(flags: Sequence[str], cache: str) -> dict[str, Any]:
    """Seconds from the start of a process to its first step, and how many of them compile."""
    command = [sys.executable, "-m", "jaxgpt.bench", "--json", *flags]
    command += ["--windows", "1", "--window-seconds", "0.001"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    names = ("compile_seconds", "first_step_seconds", "programs_from_cache", "step_ms", "device")
    return {name: found[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
