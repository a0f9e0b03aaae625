"""Run every measurement that needs a GPU, in one command that can be stopped and resumed.

    python benchmarks/run_gpu_benchmarks.py NANOGPT_DIR --seconds 540   # run again for the rest

Each measurement is its own process and writes one JSON file; a measurement whose file exists is not
repeated. --parts selects: ceilings (a large matrix product and a copy), nanogpt (every shape beside
nanoGPT), train (a run's step beside the step alone), ablations (one part of the step replaced at a
time, at GPT-2 124M, and --deterministic), memory (`plan`'s prediction for a preset, and what its
step used).

--trial runs the same on tiny shapes on any machine.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).absolute().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NANOGPT_SHAPES = ("gpt2-124m-b32", "gpt2-124m-b64", "24gb", "gpt2-350m-b32", "gpt2-124m-b12")
PRESETS = ("24gb", "gpt2-124m", "80gb-350m", "24gb-774m")
SHORT = "--synthetic --windows 3 --window-seconds 1"
GPT2 = (
    "--preset demo --optimizer adamw --tokenizer gpt2 --vocab-size 50304 --n-layer 12 --n-head 12 "
    "--n-embd 768 --block-size 1024 --batch-size 32 --gradient-accumulation-steps 4 --device gpu "
    f"{SHORT}"
)
RUN = "--preset 24gb --dataset embedded --device gpu"
RUN_TINY = (
    "--preset demo --optimizer adamw --n-layer 1 --n-head 2 --n-embd 16 --block-size 8 "
    "--batch-size 2 --gradient-accumulation-steps 2 --device cpu --windows 1 --window-seconds 0.01"
)
TINY = f"{RUN_TINY} --synthetic"
# name -> (variant of ablate_step.py, flags)
ABLATIONS = {
    "as-it-is": ("as-it-is", ""),
    "attention-plain": ("attention-plain", ""),
    "loss-full": ("loss-full", ""),
    "remat-light": ("as-it-is", "--remat light"),
    "remat-full": ("as-it-is", "--remat full"),
    "layers-scanned": ("as-it-is", "--scan-layers True"),
    "multisteps-plain": ("multisteps-plain", ""),
    "scheduler-on": ("scheduler-on", ""),
    "scheduler-on-remat-full": ("scheduler-on", "--remat full"),
    "triton-gemm-on": ("triton-gemm-on", ""),
    "deterministic": ("as-it-is", "--deterministic=True"),
    # Repeated at the end, to show the drift of the card itself.
    "as-it-is-again": ("as-it-is", ""),
}
# Seconds that must be left to start a measurement.
LEAST, LEAST_BESIDE_NANOGPT = 45.0, 240.0


class Job(NamedTuple):
    """One measurement."""

    name: str  # its file's name, without .json
    command: list[str]
    writes: bool  # takes --json; otherwise its standard output is the file
    least: float = LEAST


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    left, failed = [], []
    for job in jobs(args):
        path = args.out / f"{job.name}.json"
        if path.exists():
            continue
        seconds = end - time.monotonic()
        if seconds < job.least:
            left.append(job.name)
            continue
        begin = time.monotonic()
        outcome = measure(job, path, min(seconds, args.longest))
        print(f"{job.name}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
        if outcome != "done":
            failed.append(job.name)
    if left:
        print(f"no time left for {', '.join(left)}; run the same command again")
    if failed:
        print(f"failed: {', '.join(failed)}; their output is in *.log beside the files")
    return 1 if failed or left else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT_DIR", help="a clone of nanoGPT")
    parts = ("ceilings", "nanogpt", "train", "ablations", "memory")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--seconds", type=float, default=540, help="time limit of this command")
    parser.add_argument("--longest", type=float, default=420, help="time limit of one measurement")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--trial", action="store_true", help="tiny shapes, on the CPU")
    args = parser.parse_args(argv)
    if "nanogpt" in args.parts and not (args.nanogpt / "model.py").is_file():
        parser.error(f"{args.nanogpt} is not a clone of nanoGPT: model.py is missing")
    return args


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """All measurements of the selected parts, the most important first."""
    scripts = ROOT / "benchmarks"
    if "ceilings" in args.parts:
        small = ["--size", "64", "--copy-gib", "0.001"] if args.trial else []
        where = ["--device", "cpu" if args.trial else "gpu"]
        command = [sys.executable, str(scripts / "measure_ceilings.py"), *where, *small]
        yield Job("gpu-ceilings", command, writes=False)
    if "nanogpt" in args.parts:
        flags = ["--torch-python", args.torch_python, "--rounds", "1"]
        flags += ["--device", "cpu" if args.trial else "gpu"]
        if args.trial:
            flags += ["--windows", "1", "--window-seconds", "0.01"]
        least = LEAST if args.trial else LEAST_BESIDE_NANOGPT
        for shape in ("tiny",) if args.trial else NANOGPT_SHAPES:
            script = [sys.executable, str(scripts / "compare_nanogpt.py"), str(args.nanogpt)]
            command = [*script, "--shapes", shape, *flags]
            yield Job(f"speed-gpu-{shape}", command, writes=True, least=least)
    if "train" in args.parts:
        script = [sys.executable, str(scripts / "compare_train.py")]
        flags = shlex.split(f"{RUN_TINY} --steps 31" if args.trial else RUN)
        yield Job("train-beside-bench", [*script, *flags], writes=True)
    if "ablations" in args.parts:
        for name, (variant, flags) in ABLATIONS.items():
            script = [sys.executable, str(scripts / "ablate_step.py"), variant]
            shape = TINY if args.trial else GPT2
            yield Job(f"ablation-{name}", [*script, *shlex.split(f"{shape} {flags}")], writes=False)
    if "memory" in args.parts:
        for preset in ("demo",) if args.trial else PRESETS:
            bench = [sys.executable, "-m", "jaxgpt.bench", "--preset", preset, "--json"]
            yield Job(f"memory-real-{preset}", [*bench, *shlex.split(SHORT)], writes=False)
            plan = [sys.executable, "-m", "jaxgpt.plan", "--preset", preset, "--json"]
            card = ["--gpu", "h200"] if args.trial else []  # default: the card in this machine
            yield Job(f"memory-plan-{preset}", [*plan, *card], writes=False)


def measure(job: Job, path: Path, seconds: float) -> str:
    """Run one; returns 'done', or how it ended. Only then does its file exist."""
    log, part = path.with_suffix(".log"), path.with_suffix(".part")
    command = [*job.command, "--json", str(part)] if job.writes else job.command
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search}
    with log.open("w") as errors, (log if job.writes else part).open("a") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            outcome = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            # With its children, which would keep the card's memory.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"stopped after {seconds:.0f} seconds"
    if outcome == "done":
        json.loads(part.read_text())
        part.replace(path)
        log.unlink()
    else:
        part.unlink(missing_ok=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
