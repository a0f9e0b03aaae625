"""Running the command `prepare`, and reading its results."""

import hashlib
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.data.shards import load_split
from jaxgpt.preparation.documents import ReadOptions
from jaxgpt.preparation.inputs import find_inputs, work_units
from jaxgpt.preparation.readers import read_slice
from jaxgpt.prepare import main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
build = runpy.run_path(str(BENCHMARKS / "build_fineweb_like.py"))["build"]
SMALL = ("--shard-tokens", "30K", "--unit-bytes", "100K")


def prepare(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a command, which must be one line with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        prepare(*arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def start(
    children: list[subprocess.Popen], *arguments: object, session: bool = False
) -> subprocess.Popen:
    """Start the command as a process of its own, which the fixture `children` ends."""
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxgpt.prepare", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )
    children.append(child)
    return child


def wait_until(is_true: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def wait_for(folder: Path, pattern: str) -> None:
    wait_until(lambda: any(folder.glob(pattern)))


def worker_pids(parent: int) -> list[int]:
    """The worker processes of a command; beside them multiprocessing has a process of its own."""
    # -ww: however long the interpreter's path is, the line is not cut
    command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)]
    found = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split(None, 1) for line in found.stdout.splitlines()]
    return [int(pid) for pid, command in lines if "spawn_main" in command]


def contents(out: Path) -> dict[str, str]:
    """SHA-256 of every shard and manifest, by name."""
    files = [*out.glob("*.bin"), *out.glob("manifest*.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def stream(out: Path, split: str) -> np.ndarray:
    tokens = load_split(out, split, 50_257)  # type: ignore[arg-type]
    return np.array(tokens.window(0, len(tokens)))


def read_documents(path: Path, unit_bytes: int = 10**9, **options: Any) -> list[Any]:
    """All documents of a file, through as many slices as its size makes."""
    found: list[Any] = []
    for unit in work_units(find_inputs([str(path)]), unit_bytes):
        for slice in unit:
            for batch in read_slice(slice, ReadOptions(**options)):
                found += batch.documents
    return found
