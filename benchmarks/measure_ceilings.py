"""Measure what a device reaches at best: a large matrix product, and a copy in its memory.

    python benchmarks/measure_ceilings.py --json benchmarks/results/gpu-ceilings.json

MFU is relative to a data sheet's peak, which no matrix product reaches; this is the peak that a
large product does reach.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxgpt.planning.gpus import GIB, lookup_gpu
from jaxgpt.run.device import versions


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: the first that JAX finds"
    )
    parser.add_argument("--size", type=int, default=8192, help="width of the square matrices")
    parser.add_argument("--copy-gib", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if min(args.size, args.repeats) < 1 or not args.copy_gib > 0:
        parser.error("--size, --copy-gib and --repeats must be above 0")
    try:
        device = jax.devices(args.device)[0]
    except RuntimeError as error:
        parser.error(
            f"--device {args.device}: JAX finds no such device ({str(error).splitlines()[0]})"
        )
    gpu = lookup_gpu(device.device_kind)
    copied = int(args.copy_gib * GIB)
    with jax.default_device(device):
        flops = 2 * args.size**3 / product_seconds(args.size, args.repeats)
        bytes_per_second = 2 * copied / copy_seconds(copied, args.repeats)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/measure_ceilings.py", *argv]),
        "device": device.device_kind,
        "versions": versions(),
        "product_size": args.size,
        "product_flops": flops,
        "product_of_peak": flops / gpu.half_flops if gpu and gpu.half_flops else None,
        # Each copied byte is read and written.
        "copy_bytes_per_second": bytes_per_second,
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def product_seconds(size: int, repeats: int) -> float:
    """Seconds of a bfloat16 matrix product, size x size."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    return seconds_of(jax.jit(jnp.matmul), (a, a), repeats)


def copy_seconds(nbytes: int, repeats: int) -> float:
    """Seconds to read and write `nbytes`; adding one keeps XLA from removing the copy."""
    a = jnp.arange(nbytes // 4, dtype=jnp.float32)
    return seconds_of(jax.jit(lambda a: a + 1), (a,), repeats)


def seconds_of(f: Callable, arguments: tuple, repeats: int) -> float:
    """Median seconds of a call, over windows of ten calls."""
    jax.block_until_ready(f(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(10):
            out = f(*arguments)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - begin) / 10)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
