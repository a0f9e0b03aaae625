"""Kill runs with `kill -9` at random moments, resume them, and see that nothing is lost.

    python scripts/torture.py --kills 100 --json benchmarks/results/torture.json

Runs the real command line on the demo's text and shape, with a checkpoint every few steps so that
there is much to hit. Every second kill waits for a save to be under way. A run that was killed must
end with the bits and the losses of one that was not, and must never repeat more than one checkpoint
interval, or what was done beyond that while the newest save was still being written. Exit code 1
and a sentence if any of it is not so.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxgpt.training.integrity import MANIFEST, verify
from jaxgpt.training.metrics import METRICS_FILE, read_metrics
from jaxgpt.training.retention import FOLDER, finished_steps

STEPS, INTERVAL = 300, 20
FLAGS = [
    *("--preset", "demo", "--device", "cpu", "--max-iters", str(STEPS), "--log-interval", "1"),
    *("--eval-interval", str(INTERVAL), "--eval-iters", "2", "--sample-tokens", "0"),
]


@dataclasses.dataclass
class Kill:
    """What one kill found."""

    seconds: float  # after the process was started
    step: int | None  # the last step in the log, None before the first
    saved: int | None  # the newest finished checkpoint
    hit: str  # what was going on

    @property
    def repeated(self) -> int:
        """Steps that the resumed run does again."""
        return (self.step or 0) - (self.saved or 0)


class TortureError(Exception):
    """Something was lost; the message says what."""


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--work", type=Path, help="folder in which the runs stay")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        try:
            result = torture(work, args.kills, random.Random(args.seed))
        except TortureError as fault:
            print(f"torture: {fault}", file=sys.stderr)
            return 1
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**result, "command": " ".join(sys.argv)}, indent=1) + "\n")
    return 0


def torture(work: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill `kills` times over as many runs as that takes; the last one is left to its end."""
    started = time.monotonic()
    undisturbed = work / "undisturbed"
    seconds_to_first_step = run_to_end(undisturbed)
    expected = contents(undisturbed)
    done: list[Kill] = []
    runs = 0
    while len(done) < kills:
        out_dir = work / f"run-{runs}"
        runs += 1
        while len(done) < kills:
            delay = rng.uniform(0, 2 * seconds_to_first_step)
            into_save = rng.uniform(0, 0.2) if len(done) % 2 else None
            kill = kill_one(out_dir, delay, into_save)
            if kill is None:  # it got to its end
                break
            done.append(kill)
            check(kill)
            print(f"kill {len(done)}: run {runs}, {kill.hit}, step {kill.step}, saved {kill.saved}")
        run_to_end(out_dir)
        if contents(out_dir) != expected:
            raise TortureError(f"{out_dir} does not end as {undisturbed} does")
    return {
        "kills": len(done),
        "runs, each bit-identical to the undisturbed one": runs,
        "steps of a run": STEPS,
        "steps between checkpoints": INTERVAL,
        "kills by what they hit": dict(Counter(kill.hit for kill in done)),
        "most steps repeated, no save under way": max(
            (k.repeated for k in done if "under way" not in k.hit), default=0
        ),
        "most steps repeated, a save under way": max(
            (k.repeated for k in done if "under way" in k.hit), default=0
        ),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}",
    }


def kill_one(out_dir: Path, delay: float, into_save: float | None) -> Kill | None:
    """Start or resume a run and kill it after `delay` seconds; None if it had ended by then.

    With `into_save`, so many seconds after the next save begins.
    """
    process = start(out_dir)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < delay:
        time.sleep(0.002)
    while into_save is not None and process.poll() is None and not saving(out_dir):
        time.sleep(0.0005)
    time.sleep(into_save or 0)
    process.kill()
    code = process.wait()
    if code == 0:
        return None
    if code != -9:
        raise TortureError(f"{out_dir} ended with exit code {code}: see {log_of(out_dir)}")
    steps = finished_steps(out_dir / FOLDER)
    logged = [record["step"] for record in read_metrics(out_dir / METRICS_FILE)]
    return Kill(
        seconds=time.monotonic() - began,
        step=max(logged, default=None),
        saved=steps[-1] if steps else None,
        hit=what_was_hit(out_dir, bool(logged)),
    )


def check(kill: Kill) -> None:
    """Raises TortureError if more is lost than may be."""
    allowed = 2 * INTERVAL - 1 if "under way" in kill.hit else INTERVAL
    if kill.repeated > allowed:
        raise TortureError(f"{kill.repeated} steps are repeated after {kill}")


def what_was_hit(out_dir: Path, has_log: bool) -> str:
    """In words, what the killed process was at."""
    folder = out_dir / FOLDER
    if list(folder.glob("*.orbax-checkpoint-tmp*")):
        return "a save under way, being written"
    if any(not (p / MANIFEST).exists() for p in folder.glob("*") if p.name.isdecimal()):
        return "a save under way, without its manifest"
    if list(folder.glob("*.deleted")):
        return "an old checkpoint being deleted"
    return "between saves" if has_log else "before the first step"


def saving(out_dir: Path) -> bool:
    return "under way" in what_was_hit(out_dir, has_log=True)


def start(out_dir: Path) -> subprocess.Popen[bytes]:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jaxgpt.train", *FLAGS, "--out-dir", str(out_dir)]
    with log_of(out_dir).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def log_of(out_dir: Path) -> Path:
    return out_dir.with_suffix(".log")


def run_to_end(out_dir: Path) -> float:
    """Seconds from the start to the first step in the log; TortureError if it does not end well."""
    process = start(out_dir)
    began = time.monotonic()
    while process.poll() is None and len(read_metrics(out_dir / METRICS_FILE)) < 2:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    if process.wait() != 0:
        raise TortureError(f"{out_dir} ended with code {process.returncode}: {log_of(out_dir)}")
    return seconds


def contents(out_dir: Path) -> dict[str, Any]:
    """What a run has come to: every array of its last checkpoint as bytes, and every loss."""
    newest = out_dir / FOLDER / str(finished_steps(out_dir / FOLDER)[-1])
    verify(newest)
    tree = ocp.load_checkpointables(newest)["state"]
    tree["key"] = jax.random.key_data(tree["key"])
    arrays = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    losses = {
        record["step"]: (record.get("train/loss"), record.get("val/loss"))
        for record in read_metrics(out_dir / METRICS_FILE)
    }
    return {"arrays": arrays, "losses": losses}


if __name__ == "__main__":
    sys.exit(main())
