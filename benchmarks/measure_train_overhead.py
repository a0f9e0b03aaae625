"""What `train` adds to the step that `bench` times, and how many tokens its loader can feed.

    python benchmarks/measure_train_overhead.py --json benchmarks/results/train-overhead.json

`loader`: batches of the 24gb preset (16 x 32 windows of 1,025 tokens), read in order from token
files that were dropped from Linux's page cache, where it supports that.

`host`: seconds per step for reading metrics, the log and the progress bar, at the preset's
log_interval; and the share of a core that drawing the bar takes.

`checkpoint`: seconds for which a checkpoint of the preset's model blocks the loop (while the copy
that is written in the background is made), and until it is on disk.

No GPU is used. The sum is compared with the preset's step on an RTX 4090, predicted from a
published MFU, as if none of it overlapped with the device's work; the loader and the bar do.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jaxgpt.config.presets import load_preset
from jaxgpt.config.resolved import Resolved
from jaxgpt.data.loader import WindowLoader, prefetch
from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import write_shard
from jaxgpt.planning.gpus import find_gpu
from jaxgpt.planning.speed import mfu_of, tokens_per_second
from jaxgpt.planning.train_command import resolve_new
from jaxgpt.run.device import versions
from jaxgpt.run.metrics import MetricsLog
from jaxgpt.run.reporter import Reporter, SkipCounter

CARD = "rtx4090"
BAR_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=float, default=500e6, help="tokens in the files")
    parser.add_argument("--steps", type=int, default=40, help="batches to read")
    parser.add_argument("--folder", type=Path, help="folder for the files, on a real disk")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.tokens < 1e6 or args.steps < 1:
        parser.error("--tokens must be at least 1e6 and --steps at least 1")
    cfg = resolve_new(load_preset("24gb"), "bfloat16")
    step_seconds = cfg.tokens_per_step / tokens_per_second(cfg, find_gpu(CARD))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        loader = measure_loader(cfg, Path(folder), int(args.tokens), args.steps)
        host, bar = measure_host(cfg, Path(folder))
        checkpoint = measure_checkpoint(dataclasses.replace(cfg, dtype="float32"), Path(folder))
    shares = {
        "loader": loader["seconds_per_batch"] / step_seconds,
        "metrics and log": host / step_seconds,
        "drawing the bar": bar,
        "checkpoint": checkpoint["seconds"] / (60 * cfg.asked.checkpoint_minutes),
    }
    mfu = mfu_of(find_gpu(CARD))
    assert mfu is not None
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/measure_train_overhead.py", *argv]),
        "versions": versions(),
        "cores": os.cpu_count(),
        "loader": loader,
        "host_seconds_per_step": host,
        "checkpoint": checkpoint,
        "step_seconds": step_seconds,
        "step_seconds_are": f"predicted for one {CARD}, MFU {mfu.value:g}, {mfu.source}",
        "shares": shares,
        "share_together": sum(shares.values()),
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure_loader(cfg: Resolved, folder: Path, tokens: int, steps: int) -> dict[str, Any]:
    """Batches from files dropped from the page cache, through the prefetching thread of `train`."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(max(1, tokens // 100_000_000)):  # the size of a shard
        path = folder / f"train_{number:06}.bin"
        write_shard(path, rng.integers(0, 50_257, min(tokens, 100_000_000), np.uint16))
        paths.append(path)
    forgotten = [forget(path) for path in paths]
    loader = WindowLoader(
        load_split(folder, "train", 50_257), cfg.model.block_size, 50_257, cfg.asked.seed
    )
    A = cfg.batch.accumulation
    begin = time.perf_counter()
    with prefetch(lambda i: loader.batch(i, A, cfg.batch.batch_size), 0, steps) as batches:
        for _ in batches:
            pass
    seconds = (time.perf_counter() - begin) / steps
    return {
        "tokens_in_files": len(loader.tokens),
        "files_were_cold": all(forgotten),
        "seconds_per_batch": seconds,
        "tokens_per_second": cfg.tokens_per_step / seconds,
    }


def forget(path: Path) -> bool:
    """Ask Linux to drop a file from its page cache; False where it has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    return True


def measure_host(cfg: Resolved, folder: Path, steps: int = 2000) -> tuple[float, float]:
    """(seconds per step for metrics, log and bar, share of a core for drawing the bar)."""
    device = SimpleNamespace(device_kind="cpu", memory_stats=lambda: None)
    metrics = {"loss": np.float32(3), "grad_norm": 1.0, "learning_rate": 1e-3, "skipped_steps": 0}
    os.environ["TERM"] = "xterm"
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        MetricsLog(folder / "run") as log,
        contextlib.ExitStack() as stack,
    ):
        nowhere.isatty = lambda: True  # the bar is drawn as on a terminal
        reporter = Reporter(cfg, device, log, SkipCounter(0), start=0)
        assert reporter.console.is_terminal
        stack.enter_context(reporter)
        seconds = []
        for first in range(0, steps, cfg.asked.log_interval):
            begin = time.perf_counter()
            for step in range(first + 1, first + cfg.asked.log_interval + 1):
                reporter.log_if_due(step, reporter.read(step, metrics))
            seconds.append((time.perf_counter() - begin) / cfg.asked.log_interval)
        begin, used = time.perf_counter(), time.process_time()
        time.sleep(BAR_SECONDS)
        share = (time.process_time() - used) / (time.perf_counter() - begin)
    return statistics.median(seconds), share


def measure_checkpoint(cfg: Resolved, folder: Path) -> dict[str, float]:
    """Seconds for which saving the state of `cfg` blocks the loop, and until it is on disk."""
    import jax

    from jaxgpt.planning.memory import build_for
    from jaxgpt.run.checkpoint import Checkpoints

    state = jax.block_until_ready(build_for(cfg, jax.devices("cpu")[0]).init())
    with Checkpoints(folder / "saved", cfg.asked.keep_checkpoints) as checkpoints:
        begin = time.perf_counter()
        checkpoints.begin(state, config=cfg.flat(), data={})
        still = time.perf_counter() - begin
        checkpoints.finish()
        checkpoints.wait()
        return {"seconds_standing_still": still, "seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    sys.exit(main())
