"""Kill a run on the card with SIGKILL, resume it, and compare every loss with an undisturbed run.

    python benchmarks/gpu/kill_resume.py WORK

Two runs with --deterministic, or without it if that fails: A trains through, B is killed in its
middle and resumed. Then sample, evaluate and export read B. Prints one JSON object after each
stage; the last one is complete.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shapes import SMALL_SIZES, model_flags
from train_losses import losses_of

from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics

STEPS, TRIAL_STEPS = 600, 200


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="new folder for the runs")
    parser.add_argument("--trial", action="store_true", help="a tiny model on the CPU")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True)
    steps = TRIAL_STEPS if args.trial else STEPS
    result: dict = {"steps": steps, "seconds": {}, "exit_codes": {}}
    for deterministic in (True, False):  # if --deterministic fails, the rest is tested without it
        result["deterministic"] = deterministic
        flags = [*run_flags(args.trial, steps), f"--deterministic={deterministic}"]
        run_a = args.work / f"A-{deterministic}"
        if run(result, run_a.name, args.work, "train", [*flags, "--out-dir", str(run_a)]) == 0:
            break
    run_b = args.work / "B"
    result["killed_at"] = kill_in_the_middle(run_b, [*flags, "--out-dir", str(run_b)], steps)
    run(result, "resumed", args.work, "train", [*flags, "--out-dir", str(run_b)])
    result |= compare(losses_of(run_a), losses_of(run_b))
    print(json.dumps(result), flush=True)
    use(result, run_b, args)
    print(json.dumps(result), flush=True)
    return 1 if any(result["exit_codes"].values()) else 0


def run_flags(trial: bool, steps: int) -> list[str]:
    flags = [*model_flags(trial, SMALL_SIZES), "--dataset", "embedded", "--max-iters", str(steps)]
    flags += ["--batch-size", "4" if trial else "16", "--gradient-accumulation-steps", "2"]
    flags += ["--eval-interval", str(steps // 4), "--eval-iters", "2", "--sample-tokens", "0"]
    return [*flags, "--log-interval", "1", "--warmup-iters", "20", "--learning-rate", "1e-3"]


def run(result: dict, name: str, work: Path, command: str, flags: Sequence[str]) -> int:
    """Run a jaxgpt command to its end; returns its exit code."""
    began = time.monotonic()
    with (work / f"{name}.log").open("w") as log:
        words = [sys.executable, "-m", f"jaxgpt.{command}", *flags]
        code = subprocess.run(words, stdout=log, stderr=log).returncode
    result["seconds"][name] = round(time.monotonic() - began, 1)
    result["exit_codes"][name] = code
    if code:
        print((work / f"{name}.log").read_text()[-1500:], file=sys.stderr)
    return code


def kill_in_the_middle(folder: Path, flags: Sequence[str], steps: int) -> int | None:
    """Start a run and kill it shortly after its middle; returns the last step that it logged."""
    log = folder.with_suffix(".killed.log").open("w")
    words = [sys.executable, "-m", "jaxgpt.train", *flags]
    process = subprocess.Popen(words, stdout=log, stderr=log)
    while process.poll() is None and max(losses_of(folder), default=0) < steps // 2 + 7:
        time.sleep(0.02)
    process.kill()
    process.wait()
    return max(losses_of(folder), default=None)


def compare(a: dict[int, float], b: dict[int, float]) -> dict:
    """How many steps have bit-identical losses in both runs, and the first that differs."""
    both = sorted(a.keys() & b.keys())
    differ = [(step, a[step], b[step]) for step in both if a[step] != b[step]]
    return {"steps_equal": len(both) - len(differ), "first_different": differ[:1]}


def use(result: dict, folder: Path, args: argparse.Namespace) -> None:
    """Sample from, evaluate and export the resumed run."""
    device = ["--device", "cpu" if args.trial else "gpu"]
    run_dir = ["--out-dir", str(folder)]
    run(result, "sample", args.work, "sample", [*run_dir, *device, "--max-new-tokens", "50"])
    flags = [*run_dir, *device, "--as-in-training", "--json"]
    if run(result, "evaluate", args.work, "evaluate", flags) == 0:
        printed = (args.work / "evaluate.log").read_text()
        result["evaluated"] = json.loads(printed[printed.index("{") :])["validation"]["loss"]
        records = read_metrics(folder / METRICS_FILE)
        result["logged"] = [r["val/loss"] for r in records if "val/loss" in r][-1]
    run(result, "export", args.work, "export", [*run_dir, "--to", str(args.work / "exported")])


if __name__ == "__main__":
    sys.exit(main())
