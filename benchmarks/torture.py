"""Kill runs with `kill -9` at random moments, resume them, and see that nothing is lost.

    python benchmarks/torture.py --kills 100 --json benchmarks/results/torture.json

Runs the real command line on the demo's text, with a small model and many checkpoints, so that
there is much to hit. Of four kills one falls into the start of a process, one anywhere in its
training, and two are held back until a save is under way. Half of the processes also save between
evaluations, while they train. A run that was killed must go on from its newest finished checkpoint,
repeat one checkpoint interval at most, and end with the bits and the losses of one that nothing
disturbed. Exit code 1 and a sentence if not.
"""

import argparse
import contextlib
import dataclasses
import json
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
RUN_KILLS = 10  # about as many as it takes to get through one run
OFTEN = ["--checkpoint-minutes", "0.01"]  # some saves between two evaluations
# Seconds on a machine at rest, and on a busy one, where later kills hit the steps after it.
QUICKEST_SAVE, LONGEST_SAVE = 0.1, 1.5


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
    seconds_to_first_step, seconds_of_training = run_to_end(undisturbed)
    expected = contents(undisturbed)
    done: list[Kill] = []
    runs = 0
    while len(done) < kills:
        out_dir = work / f"run-{runs}"
        runs += 1
        while len(done) < kills:
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
            if kill is None:  # it got to its end: the machine is quicker than it was
                seconds_to_first_step /= 2
                seconds_of_training /= 2
                break
            done.append(kill)
            check(kill)
            told = f"kill {len(done)}: run {runs}, {kill.hit}, step {kill.step}, saved {kill.saved}"
            print(told, flush=True)
        run_to_end(out_dir)
        if contents(out_dir) != expected:
            raise TortureError(f"{out_dir} does not end as {undisturbed} does")
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
    """Start or resume a run and kill it; None if it had got to its end by then.

    One of three clocks says when, in seconds: from the start of the process, from the first step
    that it logs, or from the first save that it has under way.
    """
    log, saved_before = out_dir / METRICS_FILE, finished_steps(out_dir / FOLDER)
    left_before = unfinished(out_dir)
    said_before = log_of(out_dir).stat().st_size if log_of(out_dir).exists() else 0
    process = start(out_dir, flags)
    began, began_at = time.monotonic(), time.time()
    if after_first_step is not None:
        # Resuming cuts the log at the checkpoint, so the first step is the next one after it.
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
        raise TortureError(f"{out_dir} ended with exit code {code}: see {log_of(out_dir)}")
    check_start(out_dir, said_before, saved_before[-1] if saved_before else 0)
    steps = finished_steps(out_dir / FOLDER)
    logged = [record["step"] for record in read_metrics(out_dir / METRICS_FILE)]
    return Kill(
        seconds=time.monotonic() - began,
        step=max(logged, default=None),
        saved=steps[-1] if steps else None,
        hit=what_was_hit(unfinished(out_dir) - left_before, bool(logged)),
    )


def check(kill: Kill) -> None:
    """Raises TortureError if more is lost than may be."""
    # No step is taken past an evaluation before its checkpoint is on disk.
    if kill.repeated > INTERVAL:
        raise TortureError(f"{kill.repeated} steps are repeated after {kill}")


def check_start(out_dir: Path, said_before: int, saved: int) -> None:
    """Raises TortureError if the newest process went on from elsewhere than what was saved."""
    said = " ".join(log_of(out_dir).read_bytes()[said_before:].decode(errors="replace").split())
    went_on = re.search(r", from (?:step ([\d,]+)|the start) to step", said)
    if went_on and int((went_on[1] or "0").replace(",", "")) != saved:
        raise TortureError(f"{out_dir} went on {went_on[0]!r}, and {saved} was saved")


def unfinished(out_dir: Path) -> set[tuple[str, int]]:
    """(name, inode) of each folder of a save or deletion that is under way or was when killed."""
    found = set()
    for path in (out_dir / FOLDER).glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if not path.name.isdecimal() or not (path / MANIFEST).exists():
                found.add((path.name, path.stat().st_ino))
    return found


def what_was_hit(left: set[tuple[str, int]], has_log: bool) -> str:
    """In words, what the killed process was at."""
    names = {name for name, _ in left}
    if any("orbax-checkpoint-tmp" in name and "deleted" not in name for name in names):
        return "a save under way, being written"
    if any(name.isdecimal() for name in names):
        return "a save under way, without its manifest"
    if names:
        return "an old checkpoint being deleted"
    return "between saves" if has_log else "before the first step"


def last_lines(log: Path, since: float) -> str:
    """The end of a log, empty if nothing was written to it since then."""
    try:
        if log.stat().st_mtime < since:
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 20_000))
            return file.read().decode(errors="replace")
    except FileNotFoundError:  # a new run begins its log anew
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
    """Seconds to the first step and from there to the end; TortureError if it does not end well."""
    process = start(out_dir)
    began = time.monotonic()
    wait(process, (out_dir / METRICS_FILE).exists)
    first_step = time.monotonic()
    if process.wait() != 0:
        raise TortureError(f"{out_dir} ended with code {process.returncode}: {log_of(out_dir)}")
    return first_step - began, time.monotonic() - first_step


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
