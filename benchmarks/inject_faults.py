"""Have every file operation of a run, or of `prepare`, fail in turn, and check what is promised.

    python benchmarks/inject_faults.py train --every 5
    python benchmarks/inject_faults.py prepare --faults ENOSPC SIGKILL

For each kind of operation and each fault, one process after another meets the fault at a later
operation (every n-th with `--every n`), until one ends before its turn comes. Each must either do
all of its work, or end with one sentence and exit code 2, without a traceback. Started again, it
must do the rest, and the result must be an undisturbed run's. Otherwise the exit code is 1.
"""

import argparse
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kill_prepare
import torture

ROOT = Path(__file__).resolve().parents[1]
INJECTED = ROOT / "tests" / "helpers" / "injected"
OPERATIONS = ("open", "write", "fsync", "rename", "remove")
# The error once; with a plus, from then on. Signals only once.
FAULTS = ("ENOSPC", "ENOSPC+", "EIO", "EDQUOT", "EACCES", "EROFS+", "EMFILE")
FAULTS += ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")
# A short run; the flags that torture.py gives come first.
STEPS = ("--max-iters", "8", "--eval-interval", "4", "--warmup-iters", "2")
ENDS = {0, 2, 128 + 1, 128 + 2, 128 + 15}  # and by the signal itself, as a negative number


class Command:
    """A command, the folder that it fills, and how to read it."""

    def __init__(self, words: Sequence[str], contents: Callable[[Path], Any]):
        self.words, self.contents = list(words), contents

    def start(self, out: Path, injection: str = "", log: Path | None = None) -> tuple[int, str]:
        """(exit code, standard error) of one process."""
        path = os.pathsep.join([str(INJECTED), str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path}
        if injection:
            env |= {"INJECT": f"{injection} {out}", "INJECT_LOG": str(log)}
        command = [sys.executable, "-m", *self.words, str(out)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        return done.returncode, done.stderr


def train_command() -> Command:
    return Command(["jaxgpt.train", *torture.FLAGS, *STEPS, "--out-dir"], torture.contents)


def prepare_command(work: Path) -> Command:
    texts = work / "texts"
    texts.mkdir()
    for number in range(6):
        lines = [json.dumps({"text": f"Text {number}, line {i}. " * 9}) for i in range(60)]
        (texts / f"{number}.jsonl").write_text("\n".join(lines))
    flags = (
        "--tokenizer",
        "byte",
        "--shard-tokens",
        "20K",
        "--unit-bytes",
        "15K",
        "--workers",
        "2",
    )
    return Command(["jaxgpt.prepare", str(texts), *flags, "--out"], kill_prepare.contents)


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "prepare"])
    parser.add_argument("--every", type=int, default=1, help="try each n-th operation")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--faults", nargs="+", default=FAULTS)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        command = train_command() if args.command == "train" else prepare_command(work)
        code, err = command.start(work / "undisturbed" / "out")  # shards are named after the folder
        assert code == 0, err
        result = sweep(command, work, args.operations, args.faults, args.every)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**result, "command": " ".join(sys.argv)}, indent=1) + "\n")
    return 1 if result["broken"] else 0


def sweep(
    command: Command, work: Path, operations: Sequence[str], faults: Sequence[str], every: int
) -> dict[str, Any]:
    """Meet every fault at every n-th operation; returns counts, and what broke a promise."""
    expected = command.contents(work / "undisturbed" / "out")
    ends, broken = Counter[str](), []
    for operation in operations:
        for fault in faults:
            number = 1
            while (found := meet(command, work, operation, number, fault, expected)) is not None:
                end, reason = found
                ends[end] += 1
                if reason:
                    broken.append(f"{operation} {number} {fault}: {reason}")
                line = f"{operation} {number} {fault}: {end}{' BROKEN: ' * bool(reason)}{reason}"
                print(line, file=sys.stderr, flush=True)
                number += every
    return {"faults met": sum(ends.values()), "ends": dict(ends), "broken": broken}


def meet(
    command: Command, work: Path, operation: str, number: int, fault: str, expected: Any
) -> tuple[str, str] | None:
    """(how the process ended, which promise it broke); None if its turn never came."""
    out, log = work / "injected" / "out", work / "log"
    shutil.rmtree(out.parent, ignore_errors=True)
    log.unlink(missing_ok=True)
    name = fault.rstrip("+")
    what = name if name.startswith("SIG") else str(getattr(errno, name))
    lasts = "+" if fault.endswith("+") else ""
    code, err = command.start(out, f"{operation} {number}{lasts} {what}", log)
    if not log.exists():
        return None
    problems = []
    if "Traceback" in err:
        problems.append(f"a traceback: {err.strip()[-300:]}")
    if code not in ENDS and code >= 0:
        problems.append(f"exit code {code}: {err.strip()[-300:]}")
    if code == 2 and not err.strip():
        problems.append("no sentence")
    again, err = command.start(out)
    if again != 0:
        problems.append(f"started again: exit code {again}: {err.strip()[-300:]}")
    elif command.contents(out) != expected:
        problems.append("another result")
    return f"exit code {code}", "; ".join(problems)


if __name__ == "__main__":
    sys.exit(main())
