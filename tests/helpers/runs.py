"""Small training runs for the tests, and checks of what they leave."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import jaxgpt
from jaxgpt.run.metrics_file import read_metrics
from jaxgpt.run.orbax_path import orbax_path
from jaxgpt.run.retention import finished_steps

ROOT = Path(jaxgpt.__file__).parents[1]
SMALL = [
    # AdamW: Muon's step takes a second longer to compile, each time.
    *("--preset", "demo", "--optimizer", "adamw", "--n-layer", "1", "--n-head", "2"),
    *("--n-embd", "16", "--block-size", "16", "--batch-size", "4", "--effective-batch-size", "8"),
    *("--eval-iters", "2", "--log-interval", "1", "--eval-interval", "4", "--sample-tokens", "0"),
    *("--lr-decay-iters", "10"),  # the same for runs of any length, which so share compiled steps
]


def train(out_dir: Path, *flags: str) -> int:
    from jaxgpt.train import main

    return main([*SMALL, "--out-dir", str(out_dir), *flags])


def last_params(out_dir: Path) -> dict[str, bytes]:
    """The newest checkpoint's arrays, by path."""
    import jax
    from orbax.checkpoint import v1 as ocp

    newest = finished_steps(out_dir / "checkpoints")[-1]
    with orbax_path((out_dir / "checkpoints").absolute()) as path:
        tree = ocp.load_checkpointables(path / str(newest))["state"]
    tree.pop("key")
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def losses(out_dir: Path) -> dict[int, tuple[float | None, float | None]]:
    records = read_metrics(out_dir / "metrics.jsonl")
    assert len(records) == len({r["step"] for r in records}), "a step is in the log twice"
    return {r["step"]: (r.get("train/loss"), r.get("val/loss")) for r in records}


STEPS = ("--max-iters", "8")


def saved_steps(out_dir: Path) -> list[int]:
    return finished_steps(out_dir / "checkpoints")


def assert_same_end(out_dir: Path, straight: Path) -> None:
    assert last_params(out_dir) == last_params(straight)
    assert losses(out_dir) == losses(straight)


def started(
    out_dir: Path, *flags: str, out: int = subprocess.PIPE, **env: str
) -> subprocess.Popen[str]:
    """A run in a process of its own; `out` is its standard output and standard error."""
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
