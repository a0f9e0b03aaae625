"""Tokens per second and memory of nanoGPT's own code and of jaxgpt, at the same shapes.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/compare_nanogpt.py nanoGPT --shapes demo --json demo.json           # on a CPU
    python benchmarks/compare_nanogpt.py nanoGPT --device gpu --shapes gpt2-124m-b32      # on a GPU

One process at a time. nanoGPT runs once in every setting that might be its fastest; its best then
alternates with jaxgpt, and each ratio is of two adjacent runs. Settings: eager and torch.compile on
a CPU; on a GPU torch.compile with PyTorch's default attention and with cuDNN's. A setting that
fails, for lack of memory for instance, is recorded as failed. Both train with AdamW on random
tokens, without dropout and biases, with the same vocabulary; nanoGPT's GELU is erf, jaxgpt's tanh,
as in their train commands.

Memory on a GPU is each framework's own count of its peak, and nvidia-smi's figure for the card, for
which JAX's preallocation is turned off.

`--torch-python` runs nanoGPT with another interpreter, if PyTorch and JAX need different ones.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import card_bytes, processor

ROOT = Path(__file__).absolute().parents[1]
BENCH_NANOGPT = Path(__file__).absolute().with_name("bench_nanogpt.py")


class Shape(NamedTuple):
    """A model, and the sequences in one step."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch_size: int
    accumulation: int


GPU_SHAPES = {
    "gpt2-124m-b64": Shape(12, 12, 768, 1024, 50304, 64, 4),
    "gpt2-124m-b32": Shape(12, 12, 768, 1024, 50304, 32, 4),
    "gpt2-124m-b12": Shape(12, 12, 768, 1024, 50304, 12, 4),
    "gpt2-350m-b32": Shape(24, 16, 1024, 1024, 50304, 32, 4),
    "24gb": Shape(10, 10, 640, 1024, 50304, 32, 16),
}
CPU_SHAPES = {
    "demo": Shape(4, 4, 128, 64, 320, 12, 1),
    "6L-384": Shape(6, 6, 384, 256, 50304, 4, 1),
}
SHAPES = {
    **GPU_SHAPES,
    **CPU_SHAPES,
    "tiny": Shape(1, 2, 16, 8, 320, 2, 2),  # to try this script
}
LOOK_SECONDS = 5.0  # between reads of the card's memory: too rare to slow a run down
# The one most likely to be best comes last: its run then starts the alternation.
SETTINGS = {
    "cpu": {"eager": (), "compiled": ("--compile",)},
    "gpu": {
        "compiled": ("--compile",),
        "compiled, cuDNN attention": ("--compile", "--attention", "cudnn"),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    model = args.nanogpt / "model.py"
    # Paths of this machine mean nothing on another.
    here = {str(args.nanogpt): "NANOGPT_DIR", args.torch_python: "TORCH_PYTHON"}
    words = [here.get(word, word) for word in argv]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/compare_nanogpt.py", *words]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "nanogpt_model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "shapes": {},
    }
    for name in args.shapes:
        try:
            result["shapes"][name] = compare(name, args, make_keep(args.json, result, name))
        except RunError as error:
            sys.exit(str(error))
        write(args.json, result)
    return 0


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


Keep = Callable[[dict[str, Any]], dict[str, Any]]


def make_keep(path: Path | None, result: dict[str, Any], name: str) -> Keep:
    """A function that saves a run of the shape `name` and returns it.

    It writes after each run, so that an interrupted command keeps what it has measured.
    """
    runs: list[dict[str, Any]] = []

    def keep(run: dict[str, Any]) -> dict[str, Any]:
        runs.append(run)
        write(path, {**result, "unfinished": {name: runs}})
        return run

    return keep


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT_DIR", help="a clone of nanoGPT")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, help="default: all shapes for the device"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of jaxgpt")
    parser.add_argument("--windows", type=int, default=5, help="timed windows of each run")
    parser.add_argument("--window-seconds", type=float, default=2.0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one run")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--bench-flags", default="", help="more flags for jaxgpt.bench")
    parser.add_argument("--json", type=Path, help="file for all results")
    args = parser.parse_args(argv)
    if not (args.nanogpt / "model.py").is_file():
        parser.error(
            f"{args.nanogpt} is not a clone of nanoGPT (model.py is missing); run "
            "`git clone https://github.com/karpathy/nanoGPT` and name its folder"
        )
    if args.rounds < 1 or args.windows < 1 or not args.window_seconds > 0 or not args.timeout > 0:
        parser.error("--rounds, --windows, --window-seconds and --timeout must be above 0")
    try:
        found = subprocess.run([args.torch_python, "-c", "import torch"], capture_output=True)
    except OSError as error:
        parser.error(f"--torch-python {args.torch_python} does not run: {error.strerror}")
    if found.returncode:
        parser.error(
            f"nanoGPT needs PyTorch, which {args.torch_python} cannot import; `pip install "
            "torch`, or name an interpreter that has it with --torch-python"
        )
    args.shapes = args.shapes or list(GPU_SHAPES if args.device == "gpu" else CPU_SHAPES)
    return args


class RunError(Exception):
    """A failed run; the message has its command and its last lines of output."""


def compare(name: str, args: argparse.Namespace, keep: Keep) -> dict[str, Any]:
    """Run every setting of nanoGPT, then jaxgpt and the best of them in turn; `keep` each run.

    Raises:
        RunError: if none of nanoGPT's settings runs, or a later run fails.
    """
    shape = SHAPES[name]
    tried = [keep(try_nanogpt(shape, setting, args)) for setting in SETTINGS[args.device]]
    if all("failed" in run for run in tried):
        raise RunError(tried[-1]["failed"])
    best = max(tried, key=lambda run: run.get("tokens_per_second", 0.0))
    # If another setting ran after the best one, the best runs again, next to ours.
    turns = [best if best is tried[-1] else keep(run_nanogpt(shape, best["setting"], args))]
    for _ in range(args.rounds):
        turns.append(keep(run_jaxgpt(shape, args)))
        turns.append(keep(run_nanogpt(shape, best["setting"], args)))
    runs = tried + [run for run in turns if run is not best]
    ours, theirs = turns[1::2], turns[::2]
    # Each of our runs relative to the nanoGPT runs before and after it.
    ratios = [
        turns[i]["tokens_per_second"] / turns[j]["tokens_per_second"]
        for i in range(1, len(turns), 2)
        for j in (i - 1, i + 1)
    ]
    found = {
        "shape": shape._asdict(),
        "nanogpt_setting": best["setting"],
        "nanogpt_tokens_per_second": middle(theirs, "tokens_per_second"),
        "jaxgpt_tokens_per_second": middle(ours, "tokens_per_second"),
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_range": [min(ratios), max(ratios)],
        "nanogpt_peak_bytes": middle(theirs, "peak_bytes"),
        "jaxgpt_peak_bytes": middle(ours, "peak_bytes"),
        "memory_ratio": middle(ours, "peak_bytes") / middle(theirs, "peak_bytes"),
        "peak_bytes_are": "of the device, by each framework's own count"
        if args.device == "gpu"
        else "of the process, its largest resident set",
        "nanogpt_card_bytes": middle(theirs, "card_bytes"),
        "jaxgpt_card_bytes": middle(ours, "card_bytes"),
        "jaxgpt_mfu": ours[0]["mfu"],
        "versions": {**theirs[0]["versions"], **ours[0]["versions"]},
        "device": ours[0]["device"],
        "runs": runs,
    }
    print(
        f"{name}: jaxgpt {found['jaxgpt_tokens_per_second']:,.0f} tokens/s, nanoGPT "
        f"({best['setting']}) {found['nanogpt_tokens_per_second']:,.0f}: "
        f"{found['speed_ratio']:.3f} times its speed ({min(ratios):.3f} to {max(ratios):.3f}), "
        f"{found['memory_ratio']:.2f} times its memory"
    )
    return found


def middle(runs: Sequence[dict[str, Any]], key: str) -> Any:
    """The median of a figure, None if a run lacks it."""
    figures = [run[key] for run in runs]
    return None if None in figures else statistics.median(figures)


def try_nanogpt(shape: Shape, setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """`run_nanogpt`, or a record of its failure."""
    try:
        return run_nanogpt(shape, setting, args)
    except RunError as error:
        print(f"nanoGPT, {setting}: {error}", file=sys.stderr)
        return {"program": "nanoGPT", "setting": setting, "failed": str(error)}


def run_nanogpt(shape: Shape, setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """One process of nanoGPT."""
    flags = (*SETTINGS[args.device][setting], "--accumulation", str(shape.accumulation))
    device = "cuda" if args.device == "gpu" else "cpu"
    command = [args.torch_python, str(BENCH_NANOGPT), str(args.nanogpt), "--device", device]
    found = run([*command, *sizes(shape), *windows(args), *flags], args)
    return {"program": "nanoGPT", "setting": setting, **found}


def run_jaxgpt(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One process of jaxgpt."""
    tokenizer = "byte" if shape.vocab_size < 50257 else "gpt2"
    command = [sys.executable, "-m", "jaxgpt.bench", "--preset", "demo", "--synthetic", "--json"]
    flags = ("--gradient-accumulation-steps", str(shape.accumulation), "--tokenizer", tokenizer)
    flags += ("--optimizer", "adamw")
    where = ("--device", args.device, *shlex.split(args.bench_flags))
    found = run([*command, *sizes(shape), *windows(args), *flags, *where], args)
    return {"program": "jaxgpt", "setting": args.bench_flags or "default", **found}


def sizes(shape: Shape) -> list[str]:
    values = shape._asdict()
    del values["accumulation"]
    return [word for name, n in values.items() for word in (f"--{name.replace('_', '-')}", str(n))]


def windows(args: argparse.Namespace) -> list[str]:
    return ["--windows", str(args.windows), "--window-seconds", str(args.window_seconds)]


def run(command: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON that a command prints; if it counts no memory, with its largest resident set.

    Raises:
        RunError: if it fails or exceeds --timeout.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if args.device == "gpu":
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.TemporaryDirectory() as cache,
    ):
        # Without compiled programs of earlier runs in either framework, so that each start compiles
        # and first_step_seconds can be compared.
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        code, resident, card = wait(process, args.timeout, args.device == "gpu")
        out.seek(0)
        err.seek(0)
        if code:
            why = f"ended with code {code}" if code > 0 else f"took more than {args.timeout:g} s"
            tail = "".join(err.readlines()[-15:])
            raise RunError(f"a run {why}: {shlex.join(command)}\n{tail}")
        text = out.read()
    found = {**json.loads(text[text.index("{") :]), "card_bytes": card}
    if found.get("peak_bytes_from") == "compiled memory_analysis" or found["peak_bytes"] is None:
        found |= {"peak_bytes": resident, "peak_bytes_from": "largest resident set"}
    return found


def wait(process: subprocess.Popen, timeout: float, on_card: bool) -> tuple[int, int, int | None]:
    """(exit code, bytes of the largest resident set, most bytes seen in use on the card).

    A process that exceeds `timeout` seconds is killed.
    """
    begin = looked = time.monotonic()
    card: int | None = None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, 1024 * usage.ru_maxrss, card
        now = time.monotonic()
        if now > begin + timeout:
            process.kill()
        if on_card and now > looked + LOOK_SECONDS:
            looked = now
            card = max(filter(None, (card, card_bytes())), default=None)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
