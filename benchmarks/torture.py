"""Kill runs with `kill -9` at random moments, resume them, and check that nothing is lost.

    python benchmarks/torture.py --kills 100 --json benchmarks/results/torture.json

Runs the real command line on the demo's text, with a small model and many checkpoints. Of four
kills one hits the start of a process, one any moment of its training, and two a save. Half of the
processes also save between evaluations, while they train. A killed run must resume from its newest
finished checkpoint, repeat at most one evaluation interval, and end with the bits and losses of an
undisturbed run. Otherwise the exit code is 1.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxgpt.run.integrity import MANIFEST, verify
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics
from jaxgpt.run.retention import FOLDER, finished_steps

STEPS, INTERVAL = 4000, 250
FLAGS = [
    *("--preset", "demo", "--device", "cpu", "--max-iters", str(STEPS), "--log-interval", "1"),
    *("--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32"),
    *("--optimizer", "adamw", "--warmup-iters", "200"),
    *("--eval-interval", str(INTERVAL), "--eval-iters", "2", "--sample-tokens", "0"),
]
RUN_KILLS = 10  # about as many as one run takes to finish
OFTEN = ["--checkpoint-minutes", "0.01"]  # some saves between two evaluations
# Seconds, on an idle machine and on a busy one; there, later kills hit the steps after a save.
QUICKEST_SAVE, LONGEST_SAVE = 0.1, 1.5


@dataclasses.dataclass
class Kill:
    """The state of a run when it was killed."""

    seconds: float  # since the process started
    step: int | None  # the last step in the log, None before the first
    saved: int | None  # the newest finished checkpoint
    hit: str  # what the process was doing

    @property
    def repeated(self) -> int:
        """Steps that the resumed run repeats."""
        return (self.step or 0) - (self.saved or 0)


class TortureError(Exception):
    """Something was lost; the message names it."""


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kills after these")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--work", type=Path, help="folder that keeps the runs")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        try:
            result = torture(work, args.kills, args.minutes, random.Random(args.seed))
        except TortureError as error:
            print(f"torture: {error}", file=sys.stderr)
            return 1
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**result, "command": " ".join(sys.argv)}, indent=1) + "\n")
    return 0


def torture(work: Path, kills: int, minutes: float, rng: random.Random) -> dict[str, Any]:
    """Kill `kills` times, over as many runs as needed; each run then finishes."""

    def enough() -> bool:
        return len(done) >= kills or time.monotonic() - started > 60 * minutes

    started = time.monotonic()
    undisturbed = work / "undisturbed"
    seconds_to_first_step, seconds_of_training = run_to_end(undisturbed)
    expected = contents(undisturbed)
    done: list[Kill] = []
    runs = 0
    while not enough():
        out_dir = work / f"run-{runs}"
        runs += 1
        while not enough():
            moment, flags = rng.random(), rng.choice([[], OFTEN])
            match len(done) % 4:
                case 0:
                    kill = kill_one(out_dir, flags, after_start=moment * seconds_to_first_step)
                case 2:
                    into_training = moment * 3 * seconds_of_training / RUN_KILLS
                    kill = kill_one(out_dir, flags, after_first_step=into_training)
                case turn:
                    longest = QUICKEST_SAVE if turn == 1 else LONGEST_SAVE
                    kill = kill_one(out_dir, flags, into_save=moment * longest)
            if kill is None:  # it finished first: the machine has become faster
                seconds_to_first_step /= 2
                seconds_of_training /= 2
                break
            done.append(kill)
            check(kill)
            line = f"kill {len(done)}: run {runs}, {kill.hit}, step {kill.step}, saved {kill.saved}"
            print(line, flush=True)
        run_to_end(out_dir)
        if contents(out_dir) != expected:
            raise TortureError(f"{out_dir} differs from {undisturbed} at its end")
    return {
        "kills": len(done),
        "runs, each bit-identical to the undisturbed one": runs,
        "steps of a run": STEPS,
        "steps between checkpoints": INTERVAL,
        "kills by what they hit": dict(Counter(kill.hit for kill in done)),
        "most steps repeated": max(kill.repeated for kill in done),
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, jax {jax.__version__}",
    }


def kill_one(
    out_dir: Path,
    flags: list[str],
    after_start: float | None = None,
    after_first_step: float | None = None,
    into_save: float | None = None,
) -> Kill | None:
    """Start or resume a run and kill it; None if it finished first.

    The moment is given in seconds by one of three clocks: since the start of the process, since
    the first step in its log, or since its first save began.
    """
    log, saved_before = out_dir / METRICS_FILE, finished_steps(out_dir / FOLDER)
    left_before = unfinished(out_dir)
    log_size = log_of(out_dir).stat().st_size if log_of(out_dir).exists() else 0
    process = start(out_dir, flags)
    began, began_at = time.monotonic(), time.time()
    if after_first_step is not None:
        # Resuming truncates the log at the checkpoint, so its first step is the one after it.
        first = (saved_before[-1] if saved_before else 0) + 1
        wait(process, lambda: f'"step": {first},' in last_lines(log, began_at))
    if into_save is not None:
        wait(process, lambda: bool(unfinished(out_dir) - left_before))
    deadline = time.monotonic() + (after_start or after_first_step or into_save or 0.0)
    wait(process, lambda: time.monotonic() >= deadline)
    process.kill()
    code = process.wait()
    if code == 0:
        return None
    if code != -9:
        raise TortureError(f"{out_dir}: exit code {code}, see {log_of(out_dir)}")
    check_start(out_dir, log_size, saved_before[-1] if saved_before else 0)
    steps = finished_steps(out_dir / FOLDER)
    logged = [record["step"] for record in read_metrics(out_dir / METRICS_FILE)]
    return Kill(
        seconds=time.monotonic() - began,
        step=max(logged, default=None),
        saved=steps[-1] if steps else None,
        hit=what_was_hit(unfinished(out_dir) - left_before, bool(logged)),
    )


def check(kill: Kill) -> None:
    """Raises TortureError if more than one interval is lost."""
    # No step is taken past an evaluation before its checkpoint is on disk.
    if kill.repeated > INTERVAL:
        raise TortureError(f"{kill.repeated} steps are repeated after {kill}")


def check_start(out_dir: Path, log_size: int, saved: int) -> None:
    """Raises TortureError if the newest process did not resume from the newest checkpoint."""
    printed = " ".join(log_of(out_dir).read_bytes()[log_size:].decode(errors="replace").split())
    resumed = re.search(r", from (?:step ([\d,]+)|the start) to step", printed)
    if resumed and int((resumed[1] or "0").replace(",", "")) != saved:
        raise TortureError(f"{out_dir} resumed {resumed[0]!r}, but step {saved} was saved")


def unfinished(out_dir: Path) -> set[tuple[str, int]]:
    """(name, inode) of each folder of an unfinished save or deletion."""
    found = set()
    for path in (out_dir / FOLDER).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.isdecimal() or not (path / MANIFEST).exists():
                found.add((path.name, path.stat().st_ino))
    return found


def what_was_hit(left: set[tuple[str, int]], has_log: bool) -> str:
    """What the killed process was doing."""
    names = {name for name, _ in left}
    if any("orbax-checkpoint-tmp" in name and "deleted" not in name for name in names):
        return "a save under way, being written"
    if any(name.isdecimal() for name in names):
        return "a save under way, without its manifest"
    if names:
        return "an old checkpoint being deleted"
    return "between saves" if has_log else "before the first step"


def last_lines(log: Path, since: float) -> str:
    """The end of a log, empty if nothing was written to it since `since`."""
    try:
        if log.stat().st_mtime < since:
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:  # a new run creates its log
        return ""


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Return once the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def start(out_dir: Path, flags: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jaxgpt.train", *FLAGS, *flags, "--out-dir", str(out_dir)]
    with log_of(out_dir).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def log_of(out_dir: Path) -> Path:
    return out_dir.with_suffix(".log")


def run_to_end(out_dir: Path) -> tuple[float, float]:
    """Seconds to the first step and from there to the end; TortureError if it fails."""
    process = start(out_dir)
    began = time.monotonic()
    wait(process, (out_dir / METRICS_FILE).exists)
    first_step = time.monotonic()
    if process.wait() != 0:
        raise TortureError(f"{out_dir}: exit code {process.returncode}, see {log_of(out_dir)}")
    return first_step - began, time.monotonic() - first_step


def contents(out_dir: Path) -> dict[str, Any]:
    """Every array of a run's last checkpoint as bytes, and every loss."""
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
