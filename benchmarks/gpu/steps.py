"""Time steps of several kinds in one process, so that JAX starts once.

    python benchmarks/gpu/steps.py b32 b64 --workers 4

Prints a line of JSON when an item starts and one when it is measured, so that a crash shows which
item caused it. With --workers above 1 all items are compiled first, side by side.
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

from ablate_step import VARIANTS
from shapes import ITEMS, Item, flags_of

from jaxgpt import bench
from jaxgpt.config.command_line import parse_run
from jaxgpt.config.fields import Config
from jaxgpt.config.resolved import Origin, Resolved
from jaxgpt.data.loader import prefetch
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.run import device as hardware
from jaxgpt.run.bench_record import describe_run, memory, speeds
from jaxgpt.run.compile_cache import prepare_compile_cache
from jaxgpt.run.opening import find_devices

REPEATED_STEPS = 3  # of a step that should give the same bits twice


class Lowered(NamedTuple):
    """An item that is ready for XLA."""

    cfg: Resolved
    layout: Any
    training: Any
    program: Any  # a jax.stages.Lowered


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    args = parse_args(argv)
    configs = {name: config_of(ITEMS[name], args.trial) for name in args.items}
    hardware.prepare_environment(configs[args.items[0]])
    prepare_compile_cache(lambda reason: print(reason, file=sys.stderr))
    pool = ThreadPoolExecutor(args.workers)
    compiled: dict[str, Any] = {}

    def begin(name: str) -> None:
        """Lower now, since variants replace parts of modules; compile in `pool`."""
        lowered = lower(ITEMS[name], configs[name])
        compiled[name] = lowered, pool.submit(timed_compile, lowered)

    failed = []
    for name in args.items if args.workers > 1 else ():
        with reported(name, failed):
            begin(name)
    wait(future for _, future in compiled.values())  # autotuning would disturb the timing
    for name in args.items:
        if time.monotonic() - began > args.seconds:
            print(f"no time left for {name}", file=sys.stderr)
            break
        print(json.dumps({"item": name, "begun": True}), flush=True)
        if name not in failed:
            with reported(name, failed):
                if name not in compiled:
                    begin(name)
                lowered, future = compiled.pop(name)
                result = measure(ITEMS[name], lowered, *future.result(), args)
                print(json.dumps({"item": name, **result}), flush=True)
    return 1 if failed else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="+", choices=ITEMS)
    parser.add_argument("--workers", type=int, default=1, help="threads that compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no item after these")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--window-seconds", type=float, default=1.0)
    parser.add_argument("--trial", action="store_true", help="tiny steps on the CPU")
    return parser.parse_args(argv)


@contextlib.contextmanager
def reported(name: str, failed: list[str]) -> Iterator[None]:
    """Print an item's exception as its result, so that the next item still runs."""
    try:
        yield
    except Exception as error:
        failed.append(name)
        reason = f"{type(error).__name__}: {str(error)[:1500]}"
        print(json.dumps({"item": name, "failed": reason}), flush=True)
        traceback.print_exc()


def config_of(item: Item, trial: bool) -> Config:
    flags = flags_of(item, trial)
    return parse_run(
        bench.BenchFlags, flags, prog="steps", description="", default_preset=lambda: None
    )[0]


def lower(item: Item, asked: Config) -> Lowered:
    jax = hardware.import_jax()
    from jaxgpt.planning.memory import build_for
    from jaxgpt.training.build import lower_train_step

    n_vocab = load_tokenizer(asked.tokenizer).n_vocab
    cfg, layout = find_devices(asked, Origin.of(asked), n_vocab)
    # An option of this step alone: XLA_FLAGS would apply to the whole process.
    options = {"xla_gpu_deterministic_ops": True} if item.deterministic else {}
    if layout.device.platform != "gpu":
        options = {}
    with replaced(item.variant), jax.default_device(layout.device):
        training = build_for(cfg, layout.device, options, layout)
        program = lower_train_step(training, cfg.batch.accumulation, cfg.batch.global_micro_batch)
    return Lowered(cfg, layout, training, program)


@contextlib.contextmanager
def replaced(variant: str) -> Iterator[None]:
    """One of ablate_step.py's variants, undone at the end."""
    from jaxgpt.model import language_model
    from jaxgpt.training import build

    modules = {module: dict(vars(module)) for module in (build, language_model)}
    options = dict(build.GPU_OPTIONS)
    VARIANTS[variant]()
    try:
        yield
    finally:
        for module, before in modules.items():
            vars(module).update(before)
        build.GPU_OPTIONS.clear()
        build.GPU_OPTIONS.update(options)


def timed_compile(lowered: Lowered) -> tuple[Any, float]:
    """(the compiled step, seconds)"""
    before = time.perf_counter()
    return lowered.program.compile(), time.perf_counter() - before


def measure(
    item: Item, lowered: Lowered, step: Any, seconds: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Speed and memory of a compiled step."""
    import jax

    from jaxgpt.planning.memory import need_of

    cfg, layout, training, _ = lowered
    make_batch, _ = bench.make_batches(cfg, layout, None)
    with jax.default_device(layout.device):
        extra = {"same_bits": same_bits(training, step, make_batch)} if item.deterministic else {}
        state = training.init()
        with prefetch(make_batch, 0, bench.LONGEST) as batches:
            state, step_seconds, steps = bench.time_steps(
                step, state, batches, args.windows, args.window_seconds
            )
        return {
            **describe_run(cfg, layout.device),
            "attention": training.attention,
            "compile_seconds": seconds,
            **speeds(cfg, layout.device, step_seconds),
            "steps_per_window": steps,
            **memory(layout.device, need_of(cfg, step).peak_bytes),
            **extra,
        }


def same_bits(training: Any, step: Any, make_batch: Any) -> bool:
    """Whether a few steps from the same start give the same parameters, bit for bit."""
    import jax
    import numpy as np

    found = []
    for _ in range(2):
        state = training.init()
        for i in range(REPEATED_STEPS):
            state, _ = step(state, make_batch(i))
        found.append(jax.tree.map(np.asarray, state.params))
        del state
    return jax.tree.all(jax.tree.map(np.array_equal, *found))


if __name__ == "__main__":
    sys.exit(main())
