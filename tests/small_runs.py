"""Small runs of the command line for the tests of faults, and what is looked at after them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from test_train import SMALL, last_params, losses

import jaxgpt
from jaxgpt.training.retention import finished_steps

ROOT = Path(jaxgpt.__file__).parents[1]
STEPS = ("--max-iters", "8")


def saved_steps(out_dir: Path) -> list[int]:
    return finished_steps(out_dir / "checkpoints")


def assert_same_end(out_dir: Path, straight: Path) -> None:
    assert last_params(out_dir) == last_params(straight)
    assert losses(out_dir) == losses(straight)


def started(
    out_dir: Path, *flags: str, out: int = subprocess.PIPE, **env: str
) -> subprocess.Popen[str]:
    """A run in a process of its own; `out` takes what it says, of pipes there are two."""
    command = [sys.executable, "-m", "jaxgpt.train", *SMALL, "--out-dir", str(out_dir), *flags]
    return subprocess.Popen(
        command,
        **dict(env={**os.environ, "PYTHONPATH": str(ROOT), **env}, text=True),
        **dict(stdout=out, stderr=out),
    )


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()
