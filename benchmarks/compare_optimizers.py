"""Compare optimizers from the same initialization and on the same batches.

    python benchmarks/compare_optimizers.py --seeds 3 \\
        optimizer=adamw,learning_rate=6e-3 optimizer=muon,learning_rate=6e-3

Trains one small GPT for each seed and each variant, a comma-separated list of settings as in a
preset file, and evaluates each on the same windows during training. `--data-dir` names a folder
made by `jaxgpt.prepare`, to replace the novels in the package. Runs that are in the `--json` file
are not repeated, so that a stopped command can be resumed, and a grid of rates can be extended by
more seeds for the best of them.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxgpt.config.command_line import RunFlags, parse_run
from jaxgpt.config.resolved import Resolved, choose_dtype
from jaxgpt.data.loader import WindowLoader, evaluation_windows
from jaxgpt.data.sources import open_split
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.planning.train_command import resolve_new
from jaxgpt.training.build import Training, build_training
from jaxgpt.training.evaluation import evaluate

EVALUATIONS = 10  # points of each curve of the validation loss


def config_of(variant: str, common: Sequence[str], seed: int) -> Resolved:
    """The configuration of a run: `common` flags, then those of the variant."""
    flags = [*common, *(f"--{pair}" for pair in variant.split(",") if pair), f"--seed={seed}"]
    asked, _, _ = parse_run(
        RunFlags,
        flags,
        prog="compare_optimizers",
        description=__doc__ or "",
        default_preset=lambda: "demo",
    )
    return resolve_new(asked, choose_dtype(asked.dtype, "cpu", (0, 0)))


def build(cfg: Resolved) -> Training:
    """The functions of a run, on the CPU."""
    return build_training(
        cfg.model,
        cfg.optimizer,
        max_iters=cfg.asked.max_iters,
        accumulation=cfg.batch.accumulation,
        dtype=cfg.dtype,
        seed=cfg.asked.seed,
        device=jax.devices("cpu")[0],
    )


def train(cfg: Resolved, data_dir: Path | None, windows: int) -> dict[str, list[float]]:
    """One run's curve: steps, and the validation loss at each, in nats per token."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    splits = (open_split(data_dir, split, tokenizer) for split in ("train", "val"))
    train, val = splits
    loader = WindowLoader(train, cfg.model.block_size, tokenizer.n_vocab, cfg.asked.seed)
    accumulation, max_iters = cfg.batch.accumulation, cfg.asked.max_iters
    training = build(cfg)
    held_out = evaluation_windows(val, cfg.model.block_size, windows, tokenizer.n_vocab)
    state, steps, losses = training.init(), [], []
    for step in range(1, max_iters + 1):
        batch = loader.batch(step - 1, accumulation, cfg.batch.batch_size)
        state, _ = training.train_step(state, batch)
        if step % max(1, max_iters // EVALUATIONS) == 0 or step == max_iters:
            steps.append(step)
            losses.append(evaluate(training.eval_step, state.params, held_out, 50))
    return {"steps": steps, "val_loss": losses}


def load_runs(path: Path | None, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Runs recorded by an earlier command; SystemExit if its setting was another."""
    if path is None or not path.exists():
        return []
    recorded = json.loads(path.read_text())
    if recorded["setting"] != setting:
        sys.exit(
            f"{path} was recorded with {recorded['setting']}, not {setting}; name another file"
        )
    return recorded["runs"]


def save_runs(
    path: Path | None, setting: Mapping[str, Any], runs: list[dict[str, Any]], **more: Any
) -> None:
    """Record all runs so far, with the command and versions of the last one."""
    if path is None:
        return
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "versions": {"jax": jax.__version__},
        "setting": setting,
        **more,
        "runs": runs,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Train every variant with every seed in turn, and print each one's last loss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+", metavar="name=value,...")
    parser.add_argument("--flags", default="", help="flags of train for all variants, quoted")
    parser.add_argument(
        "--data-dir", type=Path, help="folder with token shards; default: the novels"
    )
    parser.add_argument("--windows", type=int, default=1200, help="windows of the validation split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the curves")
    args = parser.parse_args(argv)
    text = args.data_dir.name if args.data_dir else "embedded"
    setting = {"flags": args.flags, "text": text, "windows": args.windows}
    runs = load_runs(args.json, setting)
    for seed in range(args.seeds):
        for variant in args.variants:
            run = next((r for r in runs if (r["variant"], r["seed"]) == (variant, seed)), None)
            if run is None:
                cfg = config_of(variant, shlex.split(args.flags), seed)
                run = {"variant": variant, "seed": seed, **train(cfg, args.data_dir, args.windows)}
                runs.append(run)
                save_runs(args.json, setting, runs)
            print(f"seed {seed}  {variant}: {run['val_loss'][-1]:.4f}", flush=True)
    for variant in args.variants:
        losses = [run["val_loss"][-1] for run in runs if run["variant"] == variant]
        spread = f" ± {stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
        print(f"{mean(losses):.4f}{spread} over {len(losses)} seeds: {variant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
