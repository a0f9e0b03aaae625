"""Measure the training step on this machine: `python -m jaxgpt.bench --preset 24gb`.

The step that `train` compiles is timed, on batches loaded as `train` loads them. Devices run
asynchronously, so a window of steps ends when its last result is ready; compiling and the first
steps, which fill the allocator's pool, are not timed.
"""

import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.config.checks import bad_amounts, bad_counts
from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.fields import Config
from jaxgpt.config.flag_types import PathIfSet
from jaxgpt.config.resolved import Resolved
from jaxgpt.data.loader import prefetch
from jaxgpt.data.mixture import MixtureLoader
from jaxgpt.data.shards import Wanted
from jaxgpt.data.sources import open_split
from jaxgpt.data.token_file import token_dtype
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, make_main, warn
from jaxgpt.files import user_path
from jaxgpt.planning.local_gpus import preset_of_this_machine
from jaxgpt.run import device as hardware
from jaxgpt.run.bench_record import describe_run, memory, print_result, speeds
from jaxgpt.run.compile_cache import prepare_compile_cache
from jaxgpt.run.console import waiting
from jaxgpt.run.opening import find_devices, find_tokenizer, load_step, make_loader, origin_of_data

if TYPE_CHECKING:  # it imports JAX, which comes after the command line
    from jaxgpt.training.layout import Layout

PROG = "python -m jaxgpt.bench"
WARM_UP_STEPS = 3
TRACED_STEPS = 3
LONGEST = 2**31 - 1  # steps that batches are offered for; a time limit ends the measurement


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchFlags(RunFlags):
    """How long to measure, and the form of the result; `train`'s flags describe the run."""

    synthetic: bool = False  # random tokens, even if the preset's data exists
    windows: int = 5  # number of timed windows, each of several steps
    window_seconds: float = 2.0  # shortest duration of a window
    json: bool = False  # print one JSON object
    profile: PathIfSet = None  # folder for a trace of a few steps, for TensorBoard or Perfetto


def run(argv: Sequence[str]) -> int:
    """Measure the run that argv describes, and print the result. Raises UserError."""
    started = time.perf_counter()
    asked, flags, given = parse_run(
        BenchFlags,
        argv,
        prog=PROG,
        description="Measure the training step: speed, memory, and how long it takes to start.",
        default_preset=preset_of_this_machine,
    )
    if errors := errors_of(asked, flags):
        raise UserError("\n".join(errors))
    result = measure(asked, flags, given, started)
    result["command"] = shlex.join([*PROG.split(), *argv])
    if flags.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result)
    return 0


def errors_of(asked: Config, flags: BenchFlags) -> list[str]:
    """A sentence for each error in the command's own flags."""
    errors = bad_counts(flags, "windows") + bad_amounts(flags, "window_seconds", zero=False)
    if asked.init_from is not None:
        errors.append(
            f"init_from {asked.init_from}: speed does not depend on the weights; give their "
            "architecture instead (--arch, --n-layer, --n-head, --n-embd, --block-size)"
        )
    if flags.profile is not None and flags.profile.exists() and not flags.profile.is_dir():
        errors.append(f"profile {flags.profile} is a file; name a folder for the trace")
    return errors


def measure(
    asked: Config, flags: BenchFlags, given: Collection[str], started: float
) -> dict[str, Any]:
    """Compile, warm up and time the step of a run; returns JSON values."""
    hardware.prepare_environment(asked)
    prepare_compile_cache(warn)
    origin = origin_of_data(asked, given)
    tokenizer = find_tokenizer(asked, origin)
    tokens = open_tokens(asked, tokenizer, flags, given)
    jax = hardware.import_jax()

    from jaxgpt.run.preflight import compile_to_fit

    cfg, layout = find_devices(asked, origin, tokenizer.n_vocab)
    device = layout.device
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    before = time.perf_counter()
    with (
        jax.default_device(device),
        compile_to_fit(cfg, asked.open_choices, layout) as (cfg, training, need, _),
    ):
        compile_seconds = time.perf_counter() - before
        make_batch, source = make_batches(cfg, layout, tokens)
        state = training.init()
        with prefetch(make_batch, 0, LONGEST) as batches:
            state, _ = jax.block_until_ready(training.train_step(state, next(batches)))
            first_step_seconds = time.perf_counter() - started
            with waiting("measuring"):
                state, step_seconds, steps = time_steps(
                    training.train_step, state, batches, flags.windows, flags.window_seconds
                )
            if flags.profile is not None:
                folder = user_path(flags.profile, "--profile")
                trace(training.train_step, state, batches, folder)
    return {
        **describe_run(cfg, device),
        "attention": training.attention,
        "data": source,
        **speeds(cfg, device, step_seconds),
        "steps_per_window": steps,
        "compile_seconds": compile_seconds,
        "first_step_seconds": first_step_seconds,
        "programs_from_cache": events.count("/jax/compilation_cache/cache_hits"),
        **memory(device, need.peak_bytes),
    }


# ---------------------------------------------------------------- tokens


def open_tokens(
    asked: Config, tokenizer: Tokenizer, flags: BenchFlags, given: Collection[str]
) -> MixtureLoader | None:
    """The loader of a run; None for random tokens, if data is missing and none was named.

    Raises:
        DataError: if the data that the flags name is missing or damaged.
    """
    folders = asked.mixture.folders
    named = bool({"data_dir", "dataset"} & set(given))
    absent = any(folder is not None and not folder.is_dir() for folder in folders.values())
    if flags.synthetic or (absent and not named):
        return None
    wanted = Wanted(in_mixture=asked.mixture.has_several)
    streams = {
        name: open_split(folder, "train", tokenizer, wanted) for name, folder in folders.items()
    }
    return make_loader(asked, streams, asked.model.block_size, tokenizer.n_vocab)


def make_batches(
    cfg: Resolved, layout: "Layout", loader: MixtureLoader | None
) -> tuple[Callable[[int], Any], str]:
    """(step -> tokens_ABT1 on the devices of `layout`, a description of them)."""
    if loader is not None:
        return partial(load_step, cfg, layout, loader), ", ".join(
            source.tokens.name for source in loader.loaders
        )
    shape = (cfg.batch.accumulation, cfg.batch.global_micro_batch, cfg.model.block_size + 1)
    rng = np.random.default_rng(cfg.asked.seed)
    # Not all zeros: looking up a single row, and a softmax that has learned one token, are cheaper.
    n_vocab = cfg.model.n_vocab or 1
    drawn = [rng.integers(0, n_vocab, shape, token_dtype(n_vocab)) for _ in range(4)]
    return (
        lambda step: layout.load_batch(shape, lambda rows: drawn[step % len(drawn)][:, rows]),
        "random tokens",
    )


# ---------------------------------------------------------------- measuring


def time_steps(
    train_step: Any, state: Any, batches: Iterator[Any], windows: int, window_seconds: float
) -> tuple[Any, list[float], int]:
    """(state, seconds per step in each window, steps in a window), after a warm-up."""
    import jax

    def window(state: Any, steps: int) -> tuple[Any, float]:
        before = time.perf_counter()
        for tokens_ABT1 in itertools.islice(batches, steps):
            state, _ = train_step(state, tokens_ABT1)
        jax.block_until_ready(state)
        return state, (time.perf_counter() - before) / steps

    state, seconds = window(state, WARM_UP_STEPS)
    steps = max(1, math.ceil(window_seconds / seconds))
    found = []
    for _ in range(windows):
        state, seconds = window(state, steps)
        found.append(seconds)
    return state, found, steps


def trace(train_step: Any, state: Any, batches: Iterator[Any], folder: Path) -> None:
    """Run a few steps under JAX's profiler, which writes into `folder`.

    Raises:
        UserError: if it cannot be written.
    """
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            for tokens_ABT1 in itertools.islice(batches, TRACED_STEPS):
                state, _ = train_step(state, tokens_ABT1)
            jax.block_until_ready(state)
    except OSError as error:
        raise UserError(
            f"--profile {folder}: the trace cannot be written ({error.strerror}); name another "
            "folder"
        ) from None
    quoted = shlex.quote(str(folder))
    warn(f"a trace of {TRACED_STEPS} steps is in {folder}: tensorboard --logdir {quoted}, or")
    warn("its perfetto_trace.json.gz in Perfetto")


main = make_main(PROG, run, read_only=True)

if __name__ == "__main__":
    sys.exit(main())
