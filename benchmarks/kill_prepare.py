"""Kill `jaxgpt.prepare` with SIGKILL at random moments, run it again, and compare every byte.

    python benchmarks/build_fineweb_like.py /tmp/fineweb-like --files 3 --megabytes 60
    python benchmarks/kill_prepare.py /tmp/fineweb-like --kills 40

An undisturbed run gives the expected bytes and the duration. Then runs are killed at moments drawn
uniformly from that duration, with another number of workers each time, and started again until they
finish; new folders follow until there have been enough kills.
"""

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = ("--shard-tokens", "1M", "--unit-bytes", "2M", "--val-tokens", "1M")


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of shards and manifest, by name."""
    paths = sorted([*out.glob("*.bin"), out / "manifest.json"])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def start(text: Path, out: Path, workers: int) -> subprocess.Popen:
    """Start preparing `text` into `out`."""
    command = [sys.executable, "-m", "jaxgpt.prepare", str(text), "--out", str(out), *FLAGS]
    return subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)


def kill_until_done(
    text: Path, out: Path, draw: random.Random, seconds: float
) -> list[dict[str, object]]:
    """Start and kill until a run finishes; returns a record of each kill."""
    kills: list[dict[str, object]] = []
    while True:
        workers, moment = draw.randint(1, 3), draw.uniform(0, seconds)
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
        child = start(text, out, workers)
        try:
            code = child.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        else:
            assert code == 0, code
            return kills
        after = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
        assert all(after[path] == when for path, when in before.items()), (
            "a finished shard was written again"
        )
        kills.append(
            {
                "workers": workers,
                "after_seconds": round(moment, 3),
                "finished_shards": len(after),
                "parts": len(list(out.glob(".prepare/parts/*"))),
                "half_written": len([*out.rglob("*.tmp")]),
            }
        )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no new runs after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the result")
    flags = parser.parse_args()
    draw, kills, runs = random.Random(flags.seed), [], 0
    with tempfile.TemporaryDirectory() as work:
        began = time.monotonic()
        assert start(flags.text, Path(work) / "0" / "out", 2).wait() == 0
        seconds = time.monotonic() - began
        expected = contents(Path(work) / "0" / "out")
        while len(kills) < flags.kills and time.monotonic() - began < 60 * flags.minutes:
            runs += 1
            out = Path(work) / str(runs) / "out"
            kills += kill_until_done(flags.text, out, draw, seconds)
            assert contents(out) == expected, f"run {runs} differs"
            print(f"{len(kills)} kills, {runs} runs, all equal", flush=True)
    result = {
        "command": f"python benchmarks/kill_prepare.py TEXT --kills {flags.kills}",
        "uninterrupted_seconds": round(seconds, 2),
        "kills": len(kills),
        "runs": runs,
        "equal_byte_for_byte": True,
        "shards": len(expected) - 1,
        "each_kill": kills,
    }
    if flags.json:
        flags.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
