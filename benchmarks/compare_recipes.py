"""Compare recipes on a CPU at equal steps, FLOPs or time: GPT-2, the modern network, one change.

    python benchmarks/compare_recipes.py --json benchmarks/results/recipes-demo.json
    python benchmarks/compare_recipes.py gpt2-adamw gpt2-muon modern --equal steps flops time \\
        --json benchmarks/results/recipes-demo.json

Every recipe runs with one seed at each of `--rates` times its own learning rates, and at the best
of them with all seeds. `--equal` keeps the steps, or gives each recipe as many as cost what
`--steps` of the first cost. A step's time is the median of several rounds in which the recipes take
turns, measured once for a `--json` file: start it on an idle machine. Runs in that file are not
repeated. `--table` prints what is recorded without training. Another text: `--data-dir` (see
compare_optimizers.py).
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from compare_optimizers import build, config_of, load_runs, save_runs, train
from flax import nnx

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.resolved import Resolved
from jaxgpt.model import qwen3
from jaxgpt.model.gelu import gelu
from jaxgpt.model.layer_norm import LayerNorm
from jaxgpt.model.layers import linears_of_norm, make_linear
from jaxgpt.planning.speed import model_flops_per_token


def plain_mlp(activation: Callable[[jax.Array], jax.Array]) -> type[nnx.Module]:
    """An MLP of two matrices in place of SwiGLU's three, with GPT-2's width."""

    class PlainMLP(nnx.Module):
        def __init__(self, cfg: ModelConfig, dtype: Any, rngs: nnx.Rngs):
            D, F = cfg.n_embd, 4 * cfg.n_embd
            self.up_proj = make_linear(cfg, D, F, dtype, rngs)
            self.down_proj = make_linear(cfg, F, D, dtype, rngs, residual=True)

        def __call__(self, x_BTD: jax.Array, norm: Any) -> jax.Array:
            return self.down_proj(activation(linears_of_norm([self.up_proj], norm, x_BTD)[0]))

    return PlainMLP


class Recipe(NamedTuple):
    """Settings on top of the preset `demo`, and parts that replace those of `model/qwen3.py`."""

    settings: str
    parts: Mapping[str, Any] = {}


LAYER_NORM = {"RMSNorm": lambda width, epsilon: LayerNorm(width, use_bias=False)}
GELU_MLP, RELU2_MLP = {"MLP": plain_mlp(gelu)}, {"MLP": plain_mlp(lambda x: nnx.relu(x) ** 2)}
MODERN = "preset=demo-modern"
RECIPES = {
    "gpt2-adamw": Recipe("optimizer=adamw"),
    "gpt2-muon": Recipe("optimizer=muon"),
    # The network, a part at a time.
    "+ rotary": Recipe("arch=llama", LAYER_NORM | GELU_MLP),
    "+ RMSNorm, QK-norm": Recipe("arch=qwen3", GELU_MLP),
    "+ SwiGLU": Recipe("arch=qwen3,mlp_width=352"),
    "+ ReLU^2 instead": Recipe("arch=qwen3", RELU2_MLP),
    # The preset, and one part of it taken back or added.
    "modern": Recipe(MODERN),
    "modern, AdamW": Recipe(f"{MODERN},optimizer=adamw"),
    "modern, ReLU^2": Recipe(MODERN, RELU2_MLP),
    "modern, tied head": Recipe(f"{MODERN},tied_head=True,embedding_norm=False"),
    "modern, no embedding norm": Recipe(f"{MODERN},embedding_norm=False"),
    "modern, zero init": Recipe(f"{MODERN},zero_init=True"),
    "modern, cosine": Recipe(f"{MODERN},schedule=cosine"),
    "modern, plain decay": Recipe(f"{MODERN},cautious_weight_decay=False"),
    "modern, constant decay": Recipe(f"{MODERN},weight_decay_schedule=constant"),
    "modern, no momentum warm-up": Recipe(f"{MODERN},momentum_warmup_iters=0"),
}
TIMED_STEPS, TIMED_ROUNDS = 20, 7


def recipe_config(name: str, flags: Sequence[str], seed: int, steps: int, rate: float) -> Resolved:
    """The configuration of a run; `rate` multiplies the recipe's learning rates."""
    cfg = config_of(f"{RECIPES[name].settings},max_iters={steps}", flags, seed)
    return dataclasses.replace(cfg, optimizer=cfg.optimizer.scaled(rate))


def with_parts(name: str) -> Any:
    """A context in which models are built with the recipe's parts."""
    return (
        mock.patch.multiple(qwen3, **RECIPES[name].parts) if RECIPES[name].parts else nullcontext()
    )


def step_seconds(names: Sequence[str], flags: Sequence[str]) -> dict[str, float]:
    """Seconds of a training step of each recipe, timed in turn."""
    runs: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        cfg = recipe_config(name, flags, 0, TIMED_STEPS, 1.0)
        A, B = cfg.batch.accumulation, cfg.batch.batch_size
        tokens = np.zeros((A, B, cfg.model.block_size + 1), np.uint16)
        with with_parts(name):
            training = build(cfg)
            state, _ = training.train_step(training.init(), tokens)
        runs[name] = (training.train_step, state, tokens)
    for _ in range(TIMED_ROUNDS):
        for name, (step, state, tokens) in runs.items():
            start = time.perf_counter()
            for _ in range(TIMED_STEPS):
                state, metrics = step(state, tokens)
            metrics["loss"].block_until_ready()
            times[name].append((time.perf_counter() - start) / TIMED_STEPS)
            runs[name] = (step, state, tokens)
    return {name: median(seconds) for name, seconds in times.items()}


def steps_of(
    equal: str, args: argparse.Namespace, names: Sequence[str], seconds: dict[str, float]
) -> dict[str, int]:
    """Steps of each recipe, to the nearest ten; adds what it has to time to `seconds`."""
    flags = shlex.split(args.flags)
    costs = dict.fromkeys(names, 1.0)
    if equal == "flops":
        models = {name: recipe_config(name, flags, 0, 10, 1.0).model for name in names}
        costs = {name: float(model_flops_per_token(model)) for name, model in models.items()}
    elif equal == "time":
        if set(names) - seconds.keys():
            seconds |= step_seconds(names, flags)
        costs = {name: seconds[name] for name in names}
    first = costs[names[0]]
    return {
        name: max(10, round(args.steps * first / cost / 10) * 10) for name, cost in costs.items()
    }


HEADER = "| equal | recipe | steps | rates x | nats per token | seeds | against the first |"


def summary(equal: str, runs: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> str:
    """Rows of a table: each recipe's loss at its best rate, and its distance from the first."""
    lines = []
    first: list[float] = []
    for name, count in steps.items():
        rate = best_rate(runs, name, count)
        losses = [r["val_loss"][-1] for r in select(runs, name, count) if r["rate"] == rate]
        first = first or losses
        error = standard_error(losses)
        both = (error**2 + standard_error(first) ** 2) ** 0.5
        change = mean(losses) - mean(first)
        against = f"{change:+.4f}" + (f", {change / both:+.1f} standard errors" if both else "")
        lines.append(
            f"| {equal} | {name} | {count:,} | {rate:g} | {mean(losses):.4f} ± {error:.4f} "
            f"| {len(losses)} | {against if losses is not first else ''} |"
        )
    return "\n".join(lines)


def standard_error(losses: Sequence[float]) -> float:
    return stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0


def select(runs: Sequence[Mapping[str, Any]], name: str, steps: int) -> list[Mapping[str, Any]]:
    """The runs of a recipe with so many steps."""
    return [r for r in runs if (r["recipe"], r["max_iters"]) == (name, steps)]


def best_rate(runs: Sequence[Mapping[str, Any]], name: str, steps: int) -> float:
    """The rate at which the first seed's last loss is least."""
    tried = [r for r in select(runs, name, steps) if r["seed"] == 0]
    return min(tried, key=lambda r: r["val_loss"][-1])["rate"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--equal", nargs="+", choices=("steps", "flops", "time"), default=["steps"])
    parser.add_argument("--steps", type=int, default=1000, help="of the first recipe")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", default="", help="flags of train for all recipes, quoted")
    parser.add_argument("--data-dir", type=Path, help="token shards; default: the novels")
    parser.add_argument("--windows", type=int, default=1200, help="windows of the validation split")
    parser.add_argument("--json", type=Path, help="file for the curves")
    parser.add_argument("--table", action="store_true", help="print the file's runs and stop")
    args = parser.parse_args(argv)
    names = args.recipes or list(RECIPES)
    if unknown := set(names) - RECIPES.keys():
        parser.error(f"no such recipe: {', '.join(sorted(unknown))}")
    text = args.data_dir.name if args.data_dir else "embedded"
    setting = {"flags": args.flags, "text": text, "windows": args.windows}
    runs = load_runs(args.json, setting)
    measured = args.json is not None and args.json.exists()
    seconds = json.loads(args.json.read_text())["step_seconds"] if measured else {}
    steps: dict[str, int] = {}

    def run(name: str, rate: float, seed: int) -> None:
        key = {"recipe": name, "max_iters": steps[name], "rate": rate, "seed": seed}
        if any(key.items() <= done.items() for done in runs):
            return
        cfg = recipe_config(name, shlex.split(args.flags), seed, steps[name], rate)
        with with_parts(name):
            runs.append({**key, **train(cfg, args.data_dir, args.windows)})
        save_runs(args.json, setting, runs, step_seconds=seconds)
        print(f"{name}, rates x {rate:g}, seed {seed}: {runs[-1]['val_loss'][-1]:.4f}", flush=True)

    lines = [HEADER, "|---" * 7 + "|"]
    for equal in args.equal:
        steps = steps_of(equal, args, names, seconds)
        for name in () if args.table else names:
            for rate in args.rates:
                run(name, rate, 0)
            for seed in range(1, args.seeds):
                run(name, best_rate(runs, name, steps[name]), seed)
        lines.append(summary(equal, runs, steps))
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
