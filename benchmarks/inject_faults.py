"""Have every file operation of a run, or of `prepare`, fail in turn, and check what is promised.

    python benchmarks/inject_faults.py train --every 5
    python benchmarks/inject_faults.py prepare --faults ENOSPC SIGKILL

For each kind of operation and each fault, one process after another meets the fault at a later
operation, until one ends before its turn comes. With `--every n` each fault meets every n-th
operation, the next fault those after them, so that n faults meet all of them. Each process must
either do all of its work, or end with one sentence and exit code 2, without a traceback. Started
again, it must do the rest, and the result must be an undisturbed run's. Otherwise the exit code is
1. The command is forked from this process, which has imported everything but computes nothing;
`prepare` has one worker.
"""

import argparse
import errno
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxgpt.run.compile_cache import prepare_compile_cache

prepare_compile_cache(print)  # before JAX is imported

import kill_prepare  # noqa: E402
import torture  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
INJECTED = ROOT / "tests" / "helpers" / "injected"
sys.path.insert(0, str(INJECTED.parents[1]))
from helpers.injected.sitecustomize import Injection, install  # noqa: E402

FORK = multiprocessing.get_context("fork")
OPERATIONS = ("fsync", "rename", "remove", "open", "write")  # what is promised depends on the first
# The error once; with a plus, from then on. Signals only once.
FAULTS = ("ENOSPC", "ENOSPC+", "EIO", "EDQUOT", "EACCES", "EROFS+", "EMFILE")
FAULTS += ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")
# A short run; the flags that torture.py gives come first.
STEPS = ("--max-iters", "8", "--eval-interval", "4", "--warmup-iters", "2")
ENDS = {0, 2, 128 + 1, 128 + 2, 128 + 15}  # and by the signal itself, as a negative number


class Command:
    """A command, the folder that it fills, and how to read it."""

    def __init__(
        self,
        run: Callable[[Sequence[str]], int],
        flags: Sequence[str],
        contents: Callable[[Path], Any],
    ):
        """`flags` lack the folder, which comes last."""
        self.run, self.flags, self.contents = run, list(flags), contents

    def start(self, out: Path, injection: str = "", log: Path | None = None) -> tuple[int, str]:
        """(exit code, standard error) of one process."""
        with tempfile.TemporaryFile() as err:
            process = FORK.Process(None, self._run, args=(err.fileno(), out, injection, log))
            process.start()
            process.join()
            err.seek(0)
            assert process.exitcode is not None
            return process.exitcode, err.read().decode(errors="replace")

    def _run(self, err: int, out: Path, injection: str, log: Path | None) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        os.dup2(err, 2)
        sys.modules["__main__"] = ModuleType("__main__")  # or workers import this script and JAX
        path = [str(INJECTED), str(ROOT), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        if injection:
            os.environ |= {"INJECT": f"{injection} {out}", "INJECT_LOG": str(log)}  # for workers
            install(Injection(os.environ["INJECT"]))
        sys.exit(self.run([*self.flags, str(out)]))


def train_command() -> Command:
    from jaxgpt import train
    from jaxgpt.run import evaluator, metrics, preflight  # noqa: F401 (before the forks)

    return Command(train.main, [*torture.FLAGS, *STEPS, "--out-dir"], run_contents)


def run_contents(out: Path) -> Any:
    """What a run has made; read in another process, as JAX does not survive a fork."""
    with ProcessPoolExecutor(1, FORK) as pool:
        return pool.submit(torture.contents, out).result()


def prepare_command(work: Path) -> Command:
    from jaxgpt import prepare
    from jaxgpt.preparation import pipeline  # noqa: F401 (before the forks)

    texts = work / "texts"
    texts.mkdir()
    for number in range(6):
        lines = [json.dumps({"text": f"Text {number}, line {i}. " * 9}) for i in range(60)]
        (texts / f"{number}.jsonl").write_text("\n".join(lines))
    flags = ["--tokenizer", "byte", "--shard-tokens", "20K", "--unit-bytes", "15K"]
    return Command(
        prepare.main, [str(texts), *flags, "--workers", "1", "--out"], kill_prepare.contents
    )


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "prepare"])
    parser.add_argument("--every", type=int, default=1, help="try each n-th operation")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--faults", nargs="+", default=FAULTS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no faults after these")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        command = train_command() if args.command == "train" else prepare_command(work)
        code, err = command.start(work / "undisturbed" / "out")  # shards are named after the folder
        assert code == 0, err
        stop = time.monotonic() + 60 * args.minutes
        result = sweep(command, work, args.operations, args.faults, args.every, stop)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**result, "command": " ".join(sys.argv)}, indent=1) + "\n")
    return 1 if result["broken"] else 0


def sweep(
    command: Command,
    work: Path,
    operations: Sequence[str],
    faults: Sequence[str],
    every: int,
    stop: float = math.inf,
) -> dict[str, Any]:
    """Meet every fault at every n-th operation; returns counts, and what broke a promise.

    No fault is begun after `stop`, of `time.monotonic`.
    """
    expected = command.contents(work / "undisturbed" / "out")
    ends, broken = Counter[str](), []
    for operation in operations:
        for turn, fault in enumerate(faults):
            number = 1 + turn % every
            while time.monotonic() < stop:
                found = meet(command, work, operation, number, fault, expected)
                if found is None:
                    break
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
