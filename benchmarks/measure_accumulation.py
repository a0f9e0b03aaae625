"""Compare accumulation through optax.MultiSteps with a sum written by hand.

    python benchmarks/measure_accumulation.py --json benchmarks/results/accumulation.json

Three steps of one model on the same tokens, in one process, in turn:
ours        a scan that runs MultiSteps' accumulating half, then its other half once
by hand     a scan that adds gradients, then the same optimizer without MultiSteps
plain loop  a scan over MultiSteps: the optimizer runs on every micro-batch
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.optimizer import OptimizerConfig
from jaxgpt.model.attention import plain_attention
from jaxgpt.model.network import build_model, init_params
from jaxgpt.run.device import versions
from jaxgpt.training.optimizer import make_accumulator, make_optimizer
from jaxgpt.training.schedule import make_schedule
from jaxgpt.training.step import init_state, make_train_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_iters=2)
# Few tokens per micro-batch and many parameters, so that work on gradients dominates.
MODEL = ModelConfig(
    n_layer=4, n_head=4, n_embd=256, block_size=64, vocab_size=320, n_vocab=257, bias=False
)


Step = Callable[[Any, np.ndarray], tuple[Any, Any]]


def build(model: ModelConfig, accumulation: int) -> dict[str, tuple[Step, Callable[[], Any]]]:
    """name -> (step, to be jitted with its state donated; function that makes a new state)."""
    graphdef = build_model(model, "float32", plain_attention)
    schedule = make_schedule(OPTIMIZER, max_iters=1000)
    optimizer = make_optimizer(OPTIMIZER, schedule, accumulation)
    accumulator = make_accumulator(OPTIMIZER, accumulation)

    def loss_and_grads(params: Any, tokens_BT1: jax.Array) -> tuple[jax.Array, Any]:
        def loss_fn(params: Any) -> jax.Array:
            return nnx.merge(graphdef, params).loss(tokens_BT1)

        return jax.value_and_grad(loss_fn)(params)

    def by_hand(state: Any, tokens_ABT1: jax.Array) -> tuple[Any, Any]:
        params, opt_state = state

        def add(total: Any, tokens_BT1: jax.Array) -> tuple[Any, jax.Array]:
            loss, grads = loss_and_grads(params, tokens_BT1)
            return jax.tree.map(jnp.add, total, grads), loss

        total, losses_A = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tokens_ABT1)
        mean = jax.tree.map(lambda g: g / len(tokens_ABT1), total)
        updates, opt_state = optimizer.inner_opt.update(mean, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses_A.mean()

    def plain_loop(state: Any, tokens_ABT1: jax.Array) -> tuple[Any, Any]:
        def micro_step(state: Any, tokens_BT1: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = state
            loss, grads = loss_and_grads(params, tokens_BT1)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, losses_A = jax.lax.scan(micro_step, state, tokens_ABT1)
        return state, losses_A.mean()

    def params() -> Any:
        return init_params(model, jax.random.key(0))

    return {
        "ours": (
            make_train_step(graphdef, optimizer, accumulator, schedule),
            lambda: init_state(params(), optimizer, jax.random.key(1)),
        ),
        "by hand": (by_hand, lambda: (p := params(), optimizer.inner_opt.init(p))),
        "plain loop": (plain_loop, lambda: (p := params(), optimizer.init(p))),
    }


def measure(
    model: ModelConfig, accumulation: int, batch_size: int, rounds: int, names: Sequence[str]
) -> dict[str, list[float]]:
    """Seconds of each step in each round, the steps in turn; the first two rounds do not count."""
    shape = (accumulation, batch_size, model.block_size + 1)
    tokens_ABT1 = np.random.default_rng(0).integers(0, model.n_vocab, shape).astype(np.uint16)
    built = build(model, accumulation)
    steps = {name: jax.jit(built[name][0], donate_argnums=0) for name in names}
    states = {name: built[name][1]() for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name in names if turn % 2 else reversed(names):
            begin = time.perf_counter()
            states[name], _ = jax.block_until_ready(steps[name](states[name], tokens_ABT1))
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if min(args.accumulation, args.batch_size) < 1 or args.rounds < 2:
        parser.error("--accumulation and --batch-size must be at least 1, --rounds at least 2")
    names = ("ours", "by hand", "plain loop")
    seconds = measure(MODEL, args.accumulation, args.batch_size, args.rounds, names)
    medians = {name: 1e3 * statistics.median(seconds[name]) for name in names}
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/measure_accumulation.py", *argv]),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "parameters": MODEL.parameter_count(),
        "accumulation": args.accumulation,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "step_ms": medians,
        "step_ms_quartiles": {
            name: [1e3 * q for q in statistics.quantiles(seconds[name])[::2]] for name in names
        },
        "ours_over_by_hand": medians["ours"] / medians["by hand"],
        "plain_loop_over_by_hand": medians["plain loop"] / medians["by hand"],
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
