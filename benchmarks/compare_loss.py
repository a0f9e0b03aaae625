"""Train nanoGPT and jaxgpt on the same bytes: time and final loss.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/compare_loss.py nanoGPT --part demo --repeats 3 --json demo.json
    python benchmarks/compare_loss.py nanoGPT --part curve --seeds 3 --json curve.json

`demo` runs nanoGPT's CPU setting, from its README, and `--preset demo`; the time is that of the
whole command. `curve` gives both the same setting, so that their losses should differ only by seed
noise. Two differences remain: nanoGPT's erf-GELU against jaxgpt's tanh (less than 5e-4 apart), and
windows drawn with replacement against shuffled windows.

The printed losses cannot be compared: nanoGPT's validation loss is of a random sample, and its
`iter 99` is jaxgpt's step 100. So this script evaluates both final models on every byte of the
validation split. nanoGPT's folder is only read; copies of it run. nanoGPT needs PyTorch.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from evaluate_checkpoints import evaluate_jaxgpt, evaluate_nanogpt
from machine import processor

from jaxgpt.data.sources import embedded_tokens
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.run.metrics_file import METRICS_FILE, read_metrics

ROOT = Path(__file__).absolute().parents[1]
NANOGPT_FILES = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
SEED_LINE = r"torch\.manual_seed\(1337\b"  # in nanoGPT's train.py, which has no flag for it

SHAPE = "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --dropout=0.0"
# From nanoGPT's README on training without a GPU; the rest is in the config file that it names.
NANOGPT_CPU = f"--device=cpu --compile=False --eval_iters=20 --log_interval=1 {SHAPE}"
DEMO_STEPS = 2000
# Every setting is given, so that neither program's defaults and presets matter.
CURVE = (
    f"{SHAPE} --bias=False --gradient_accumulation_steps=1 --learning_rate=1e-3 --min_lr=1e-4 "
    "--warmup_iters=100 --weight_decay=0.1 --beta1=0.9 --beta2=0.99 --grad_clip=1.0 "
    "--device=cpu --dtype=float32 --log_interval=1 --eval_iters=3"
)
CURVE_STEPS = 1000
TENTHS = (0, 1, 4, 9)  # parts of a run over which the training loss is averaged
WITHIN = 3  # standard errors; means closer than this agree


class Run(NamedTuple):
    """One finished training run."""

    program: str
    command: str
    seconds: float  # the whole command
    load_before: float  # the machine's load average over the minute before
    step: int  # optimizer steps behind the evaluated checkpoint
    context: int  # tokens
    val_loss: float  # nats per byte, over the whole validation split
    logged_val_loss: float  # the program's own last estimate
    train_losses: dict[int, float]  # by step, counted from 1


def main() -> None:
    args = parse_args()
    check_nanogpt(args.nanogpt)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        write_data(work / "data")
        results: dict[str, Any] = {"about": describe(args.nanogpt)}
        if args.part in ("demo", "both"):
            results["demo"] = demo(args.nanogpt, work, args.repeats, args.steps)
        if args.part in ("curve", "both"):
            results["curve"] = curve(args.nanogpt, work, args.seeds, args.steps or CURVE_STEPS)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT_DIR", help="a clone of nanoGPT")
    parser.add_argument("--part", choices=("demo", "curve", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each program in part demo")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of part curve, 3 or more")
    parser.add_argument(
        "--steps", type=int, help="steps of each run, a multiple of 250; for trials"
    )
    parser.add_argument("--work", type=Path, help="new folder that keeps logs and models")
    parser.add_argument("--json", type=Path, help="file for all results")
    args = parser.parse_args()
    if args.repeats < 1 or args.seeds < 3 or (args.steps or 250) % 250:
        parser.error("--repeats must be 1 or more, --seeds 3 or more, --steps a multiple of 250")
    if args.work and args.work.exists():
        parser.error(f"--work {args.work} exists; name a new folder")
    return args


def check_nanogpt(folder: Path) -> None:
    """Raises UserError if nanoGPT cannot run from `folder`."""
    missing = [name for name in NANOGPT_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a clone of nanoGPT ({missing[0]} is missing); run "
            "`git clone https://github.com/karpathy/nanoGPT` and name its folder"
        )
    if importlib.util.find_spec("torch") is None:
        raise UserError("nanoGPT needs PyTorch, which is not installed: `pip install torch`")


# The two parts


def demo(nanogpt: Path, work: Path, repeats: int, steps: int | None) -> list[dict[str, Any]]:
    """Both programs in turn. nanoGPT's checkpoint is its best by its own estimate, not its last."""
    theirs = (
        f"{NANOGPT_CPU} --max_iters={steps or DEMO_STEPS} --lr_decay_iters={steps or DEMO_STEPS}"
    )
    ours = "--preset=demo --device=cpu" + (f" --max_iters={steps}" if steps else "")
    runs = []
    for turn in range(repeats):
        runs.append(run_nanogpt(nanogpt, work / f"demo-nanogpt-{turn}", theirs))
        runs.append(run_jaxgpt(work / f"demo-jaxgpt-{turn}", ours))
    print_runs("demo: each at its own setting", runs)
    time_ratio = mean(r.seconds for r in runs[1::2]) / mean(r.seconds for r in runs[::2])
    change = mean(r.val_loss for r in runs[1::2]) - mean(r.val_loss for r in runs[::2])
    print(f"jaxgpt: {time_ratio:.2f} x nanoGPT's time, loss {change:+.4f}")
    return [run._asdict() for run in runs]


def curve(nanogpt: Path, work: Path, seeds: int, steps: int) -> list[dict[str, Any]]:
    both = f"{CURVE} --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}"
    theirs = f"{both} --compile=False --always_save_checkpoint=True"
    ours = f"--preset=demo {both} --optimizer=adamw --dataset=embedded --tokenizer=byte"
    ours += " --sample_tokens=0"
    runs = []
    for seed in range(1, seeds + 1):
        runs.append(run_nanogpt(nanogpt, work / f"curve-nanogpt-{seed}", theirs, seed))
        runs.append(run_jaxgpt(work / f"curve-jaxgpt-{seed}", f"{ours} --seed={seed}"))
    print_runs("curve: both at one setting", runs)
    for tenth in TENTHS:
        first, last = steps * tenth // 10 + 1, steps * (tenth + 1) // 10
        losses = [mean(run.train_losses[i] for i in range(first, last + 1)) for run in runs]
        print_comparison(f"training loss, steps {first}-{last}", losses[::2], losses[1::2])
    losses = [run.val_loss for run in runs]
    print_comparison("validation loss", losses[::2], losses[1::2])
    return [run._asdict() for run in runs]


def standard_errors(a: Sequence[float], b: Sequence[float]) -> float:
    """Welch's t: by how many standard errors b's mean exceeds a's; NaN without variance."""
    error = (stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b)) ** 0.5
    return (mean(b) - mean(a)) / error if error else float("nan")


# The two programs


def write_data(folder: Path) -> None:
    """The embedded novels as nanoGPT's data, with the byte tokenizer's 257 ids.

    Without meta.pkl nanoGPT would use 50,304 ids. jaxgpt's padded 320 would not help it: they are
    no faster there, and nanoGPT's softmax includes the padding.
    """
    tokenizer = load_tokenizer("byte")
    folder.mkdir(parents=True)
    for split, tokens in embedded_tokens(tokenizer).items():
        tokens.astype("<u2").tofile(folder / f"{split}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.n_vocab}))


def run_nanogpt(nanogpt: Path, folder: Path, flags: str, seed: int | None = None) -> Run:
    """Train a copy of nanoGPT in `folder`; seed None keeps its own."""
    for name in NANOGPT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(nanogpt / name, folder / name)
    if seed is not None:
        train = folder / "train.py"
        train.write_text(with_seed(train.read_text(), seed))
    shutil.copytree(folder.parent / "data", folder / "data" / "novels")
    command = ["train.py", NANOGPT_FILES[-1], *flags.split(), "--dataset=novels", "--out_dir=out"]
    timing = run_logged(command, folder, folder / "log.txt")
    train_losses, logged = read_nanogpt_log((folder / "log.txt").read_text())
    return Run("nanoGPT", *timing, *evaluate_nanogpt(folder), logged, train_losses)


def run_jaxgpt(folder: Path, flags: str) -> Run:
    """Train this checkout of jaxgpt in `folder`."""
    folder.mkdir()
    command = ["-m", "jaxgpt.train", *flags.split(), f"--out_dir={folder / 'out'}"]
    timing = run_logged(command, ROOT, folder / "log.txt")
    records = read_metrics(folder / "out" / METRICS_FILE)
    logged = [r["val/loss"] for r in records if "val/loss" in r][-1]
    train_losses = {r["step"]: r["train/loss"] for r in records if "train/loss" in r}
    return Run("jaxgpt", *timing, *evaluate_jaxgpt(folder / "out"), logged, train_losses)


def with_seed(train: str, seed: int) -> str:
    """nanoGPT's train.py with another seed; raises UserError if the line differs."""
    changed, count = re.subn(SEED_LINE, f"torch.manual_seed({seed}", train)
    if count != 1:
        raise UserError(
            f"nanoGPT's train.py has {count} lines like {SEED_LINE!r}, expected 1; use an "
            "unchanged clone, or --part demo, which does not change the seed"
        )
    return changed


def run_logged(arguments: list[str], folder: Path, log: Path) -> tuple[str, float, float]:
    """Run Python in `folder`; returns the command, its seconds and the load average before it."""
    command = shlex.join(["python", *arguments])
    print(command, flush=True)
    load, begin = os.getloadavg()[0], time.monotonic()
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, stdout=file, stderr=file)
    seconds = time.monotonic() - begin
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"exit code {done.returncode}; the last lines of output:\n{tail}")
    return command, seconds, load


def read_nanogpt_log(text: str) -> tuple[dict[int, float], float]:
    """Training loss by step, counted as jaxgpt does, and its last estimate on 'val'."""
    steps = re.findall(r"^iter (\d+): loss ([^,\s]+)", text, re.MULTILINE)
    estimates = re.findall(r"^step \d+: .*val loss (\S+)", text, re.MULTILINE)
    return {int(i) + 1: float(loss) for i, loss in steps}, float(estimates[-1])


# Output


def describe(nanogpt: Path) -> dict[str, Any]:
    """Everything the numbers depend on besides the commands."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "jax", "flax", "numpy")},
        "nanogpt_sha256": {name: sha256(nanogpt / name) for name in NANOGPT_FILES},
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def print_runs(title: str, runs: Sequence[Run]) -> None:
    print(f"\n{title}\n            seconds  load before   step  context  val loss  own estimate")
    for run in runs:
        print(
            f"{run.program:10}{run.seconds:9.1f}{run.load_before:13.2f}{run.step:7}"
            f"{run.context:9}{run.val_loss:10.4f}{run.logged_val_loss:14.4f}"
        )


def print_comparison(name: str, theirs: Sequence[float], ours: Sequence[float]) -> None:
    errors = standard_errors(theirs, ours)
    sides = [f"{mean(x):.4f} (sd {stdev(x):.4f})" for x in (theirs, ours)]
    difference = f"{mean(ours) - mean(theirs):+.4f}, {errors:+.1f} standard errors"
    verdict = "agree" if abs(errors) <= WITHIN else "DIFFER"
    print(f"{name:30} nanoGPT {sides[0]}  jaxgpt {sides[1]}  {difference}: {verdict}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"compare_loss.py: {error}", file=sys.stderr)
        sys.exit(2)
