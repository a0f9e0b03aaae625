"""Check and measure jaxgpt in a quarter of an hour on one GPU, on a machine without network.

    python benchmarks/gpu/quarter_hour.py first 450    # right? how fast? where does the time go?
    python benchmarks/gpu/quarter_hour.py second 300   # kill -9 and resume, ablations, memory
    python benchmarks/gpu/quarter_hour.py trial 900    # both, tiny and on the CPU

The number is the seconds it may take; --skip leaves out some parts. Each part is a process with
its own limit; one that fails or hangs is recorded, and the next starts. A part for which too little
time is left is not started. After each part $OUT/NAME.json holds everything so far; a call writes
at most four files to $OUT.

Settings in the environment, with their defaults:
    OUT (runs/quarter-hour)          folder for the results
    QUARTER_WHEELS (.quarter/whl)    wheels to install first, for what the machine lacks
    NANOGPT (.quarter/nanogpt)       folder with nanoGPT's model.py, which three parts need
    TORCH_PYTHON (this one)          interpreter with PyTorch
    QUARTER_WORK (/tmp/quarter-hour) folder for runs and logs
"""

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from predictions import PREDICTIONS, as_text
from session import FINE, Session
from shapes import (
    ABLATIONS,
    ITEMS,
    MEMORY_ITEMS,
    SHORT,
    SIZES,
    SPEED_ITEMS,
    TINY_SHORT,
    TINY_SIZES,
    flags_of,
    model_flags,
    size_flags,
)

HERE = Path(__file__).absolute().parent
ROOT = HERE.parents[1]
LARGEST = 15_000_000  # bytes of a file in $OUT
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy"),
    *("torch", "triton", "nvidia-cudnn-cu13"),
)
# Imports everything except `prepare`, and names the packages that are missing.
IMPORT_ALL = """
import importlib, pkgutil, sys, jaxgpt
missing = set()
for found in pkgutil.walk_packages(jaxgpt.__path__, "jaxgpt."):
    if not found.name.startswith("jaxgpt.prep") and not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            missing.add(error.name or str(error))
if missing:
    names = ", ".join(sorted(missing))
    sys.exit(f"not installed: {names}; QUARTER_WHEELS names a folder of wheels")
"""
PARTS = (
    *("attention", "train", "float32", "bench-b32", "nanogpt-b32", "nanogpt-train"),
    *("trace", "steps", "nanogpt-b64", "ceilings", "resume", "ablations", "memory"),
)
SMI = ("name", "memory.total", "driver_version", "clocks.sm", "power.draw", "temperature.gpu")


# ---------------------------------------------------------------- parts


def first(s: Session) -> None:
    """Right? How fast, beside nanoGPT? Where does the time go?"""
    trial = ["--trial"] if s.trial else []
    s.run("attention", 20, 60, [sys.executable, HERE / "check_attention.py", *trial])
    run = run_flags(s, 20 if s.trial else 200)
    train = [sys.executable, HERE / "train_losses.py"]
    s.run("train", 40, 110, [*train, s.work / "run", *run, "--dtype", "bfloat16"])
    float32 = [*run, "--dtype", "float32", "--max-iters", "10" if s.trial else "60"]
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    s.run("float32", 40, 110, [*train, s.work / "run-float32", *float32], **exact)
    bench = [sys.executable, "-m", "jaxgpt.bench", "--json", *short(s)]
    s.run("bench-b32", 35, 90, [*bench, *flags_of(ITEMS["b32"], s.trial)])
    bench_nanogpt(s, "nanogpt-b32", 60, 150, 32)
    train_nanogpt(s, run)
    trace = [sys.executable, HERE / "trace_step.py", s.work / "trace"]
    briefly = ["--windows", "1", "--window-seconds", "0.5"]
    s.run("trace", 25, 90, [*trace, *flags_of(ITEMS["b32"], s.trial), *briefly])
    s.run("steps", 30, 130, steps_command(s, SPEED_ITEMS, 1))
    bench_nanogpt(s, "nanogpt-b64", 45, 120, 64)
    ceilings = [sys.executable, ROOT / "benchmarks" / "measure_ceilings.py", "--repeats", 3]
    small = ["--device", "cpu", "--size", 64, "--copy-gib", 0.001]
    s.run("ceilings", 15, 60, [*ceilings, *(small if s.trial else ["--device", "gpu"])])


def run_flags(s: Session, steps: int) -> list[str]:
    """A run on the embedded text, small enough to fit in float32 without flash attention, too."""
    flags = [*model_flags(s.trial), "--batch-size", "4" if s.trial else "8"]
    flags += ["--gradient-accumulation-steps", "1", "--dataset", "embedded"]
    flags += ["--max-iters", str(steps), "--lr-decay-iters", str(steps), "--warmup-iters", "20"]
    flags += ["--learning-rate", "6e-4", "--min-lr", "6e-5", "--log-interval", "1"]
    return [*flags, "--eval-interval", str(steps), "--eval-iters", "1", "--sample-tokens", "0"]


def bench_nanogpt(s: Session, name: str, least: float, limit: float, batch_size: int) -> None:
    """nanoGPT's step with torch.compile, whose default attention on Hopper is cuDNN's."""
    if nanogpt_can_run(s, name):
        sizes, batch_size = (TINY_SIZES, 4) if s.trial else (SIZES, batch_size)
        command = [torch_python(), ROOT / "benchmarks" / "bench_nanogpt.py", nanogpt_folder()]
        command += [*size_flags(sizes), "--batch-size", batch_size, "--accumulation", 4]
        where = ["--device", "cpu"] if s.trial else ["--device", "cuda", "--compile"]
        s.run(name, least, limit, [*command, *where, *short(s)])


def train_nanogpt(s: Session, run: Sequence[str]) -> None:
    """nanoGPT on the windows of our run."""
    if nanogpt_can_run(s, "nanogpt-train"):
        script, windows = HERE / "same_windows.py", s.work / "windows.npz"
        s.run("windows", 25, 40, [sys.executable, script, "write", windows, *run])
        command = [torch_python(), script, "train", windows, nanogpt_folder()]
        s.run("nanogpt-train", 25, 110, [*command, "cpu" if s.trial else "cuda"])


def nanogpt_can_run(s: Session, name: str) -> bool:
    reasons: list[str] = []
    if name in s.skip:
        reasons.append("as asked")
    if not (nanogpt_folder() / "model.py").is_file():
        reasons.append(f"no model.py in {nanogpt_folder()} (NANOGPT names another folder)")
    has_torch = "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)"
    if subprocess.run([torch_python(), "-c", has_torch]).returncode:
        reasons.append(f"no PyTorch for {torch_python()} (TORCH_PYTHON names another interpreter)")
    if reasons:
        s.record(name, f"skipped: {'; '.join(reasons)}", 0)
    return not reasons


def short(s: Session) -> list[str]:
    return TINY_SHORT if s.trial else SHORT


def nanogpt_folder() -> Path:
    return Path(os.environ.get("NANOGPT", ROOT / ".quarter" / "nanogpt")).absolute()


def torch_python() -> str:
    return os.environ.get("TORCH_PYTHON", sys.executable)


def steps_command(s: Session, items: Sequence[str], workers: int) -> list[object]:
    command = [sys.executable, HERE / "steps.py", *items, "--workers", workers]
    command += ["--seconds", max(1.0, s.left() - 25)]
    return [*command, *(["--trial", *TINY_SHORT] if s.trial else [])]


def second(s: Session) -> None:
    """Does a killed run resume? What does each choice cost? How much memory do presets take?"""
    trial = ["--trial"] if s.trial else []
    s.run("resume", 60, 135, [sys.executable, HERE / "kill_resume.py", s.work / "resume", *trial])
    ablations(s)
    for name in MEMORY_ITEMS:  # memory is counted over a whole process
        s.run("memory", 45, 150, steps_command(s, [name], 1))


def ablations(s: Session) -> None:
    """All items, compiled side by side; if that process ends early, the rest one by one."""
    if s.run("ablations", 40, 150, steps_command(s, ABLATIONS, 4)) is None:
        return
    found = s.results.setdefault("ablations", [])
    done = {result["item"] for result in found if "begun" not in result}
    while remaining := [name for name in ABLATIONS if name not in done]:
        known = len(found)
        s.run("ablations", 40, 60, steps_command(s, remaining, 1))
        if len(found) == known:  # the process could not start, or no time is left
            break
        done |= {result["item"] for result in found[known:]}  # with the one that ended the process


# ---------------------------------------------------------------- the call


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=PREDICTIONS)
    parser.add_argument("seconds", type=float)
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    args = parser.parse_args(argv)
    out = Path(os.environ.get("OUT", ROOT / "runs" / "quarter-hour")).absolute()
    work = Path(os.environ.get("QUARTER_WORK", "/tmp/quarter-hour")).absolute()
    shutil.rmtree(work / args.what, ignore_errors=True)
    (work / args.what).mkdir(parents=True)
    out.mkdir(parents=True, exist_ok=True)
    s = Session(args.what, args.seconds, out, work / args.what, environment_of(work), args.skip)
    s.log.write_bytes(b"")
    install_wheels(s, work / "site")
    s.about = describe(s)
    if s.run("imports", 0, 60, [sys.executable, "-c", IMPORT_ALL]):
        return 1
    for part in {"first": [first], "second": [second], "trial": [first, second]}[args.what]:
        part(s)
    bundle(s)
    s.about["device_afterwards"] = nvidia_smi()
    s.save()
    print(as_text(s.lines()))
    print(f"{time.monotonic() - s.began:.0f} s in all; {out / args.what}.json")
    return 0 if all(part["outcome"].startswith(FINE) for part in s.parts) else 1


def environment_of(work: Path) -> dict[str, str]:
    search = [ROOT, ROOT / "benchmarks", work / "site", os.environ.get("PYTHONPATH")]
    # XLA looks for ptxas on PATH where no wheel brings it.
    tools = [path.parent for path in sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))]
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, [os.environ["PATH"], *tools])),
        "PYTHONPATH": os.pathsep.join(str(path) for path in search if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def install_wheels(s: Session, site: Path) -> None:
    """Install what the machine lacks from a folder, into a folder that later calls find."""
    folder = Path(os.environ.get("QUARTER_WHEELS", ROOT / ".quarter" / "whl")).absolute()
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
        s.run("wheels", 0, 60, [*pip, "--no-compile", "--target", site, *wheels])


def describe(s: Session) -> dict[str, Any]:
    script = (
        "import json, importlib.metadata as m\n"
        "found = {}\n"  # of two versions, the first on the path is imported
        "for d in m.distributions(): found.setdefault(d.metadata['Name'], d.version)\n"
        f"print(json.dumps({{n: found.get(n) for n in {PACKAGES!r}}}))"
    )
    s.run("versions", 0, 30, [sys.executable, "-c", script])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python benchmarks/gpu/quarter_hour.py", s.name, f"{s.seconds:g}"]
            + ["--skip", *s.skip] * bool(s.skip)
        ),
        "device": nvidia_smi(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def nvidia_smi() -> str:
    """The card's name and state; 'cpu' without one."""
    query = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"


def bundle(s: Session) -> None:
    """Copy the program and the trace; shorten a long log."""
    traces = sorted((s.work / "trace").rglob("perfetto_trace.json.gz"))[-1:]
    for path in (s.work / "trace" / "program.txt.gz", *traces):
        if path.exists() and path.stat().st_size < LARGEST:
            shutil.copy(path, s.out)
    if s.log.stat().st_size > LARGEST:
        s.log.write_bytes(s.log.read_bytes()[-LARGEST:])


if __name__ == "__main__":
    sys.exit(main())
