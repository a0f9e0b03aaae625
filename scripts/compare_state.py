"""Does AdamW in bfloat16 reach the loss that it reaches in float32?

    python scripts/compare_state.py --seeds 3 --json benchmarks/results/state-dtype.json

Trains one small GPT on the embedded novels once for each seed and each way of keeping the
optimizer's state, with the same batches, and evaluates each on the same windows. Gradients are
accumulated, so that the accumulator's dtype is tried as well.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxgpt.data.loader import WindowLoader, evaluation_windows
from jaxgpt.data.sources import open_split
from jaxgpt.data.tokenizer import load_tokenizer, padded_vocab_size
from jaxgpt.presets import load_preset
from jaxgpt.training.build import build_training
from jaxgpt.training.evaluation import evaluate

MICRO_BATCH = 3  # sequences; the demo's 12 are accumulated from four
WINDOWS = 1200


def train(state_dtype: str, seed: int, steps: int, beta2: float) -> dict[str, Any]:
    """One run's losses in nats a byte: of the last tenth of its steps, and of the validation."""
    preset = load_preset("demo")
    tokenizer = load_tokenizer(preset.tokenizer)
    model = dataclasses.replace(
        preset.model,
        n_vocab=tokenizer.n_vocab,
        vocab_size=padded_vocab_size(tokenizer.n_vocab),
    )
    optimizer = dataclasses.replace(preset.optimizer, state_dtype=state_dtype, beta2=beta2)
    accumulation = preset.effective_batch_size // MICRO_BATCH
    train, val = (open_split(None, split, tokenizer) for split in ("train", "val"))
    loader = WindowLoader(train, model.block_size, tokenizer.n_vocab, seed)
    training = build_training(
        model,
        optimizer,
        max_iters=steps,
        accumulation=accumulation,
        dtype="float32",
        seed=seed,
        device=jax.devices("cpu")[0],
    )
    state, losses = training.init(), []
    for step in range(steps):
        state, metrics = training.train_step(state, loader.batch(step, accumulation, MICRO_BATCH))
        losses.append(metrics["loss"])
    windows = evaluation_windows(val, model.block_size, WINDOWS, tokenizer.n_vocab)
    return {
        "state_dtype": state_dtype,
        "seed": seed,
        "train_loss": mean(float(loss) for loss in losses[-steps // 10 :]),
        "val_loss": evaluate(training.eval_step, state.params, windows, 60),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--beta2", type=float, default=0.99)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    runs = []
    for seed in range(args.seeds):
        for state_dtype in ("float32", "bfloat16"):
            runs.append(train(state_dtype, seed, args.steps, args.beta2))
            print(runs[-1], flush=True)
    for state_dtype in ("float32", "bfloat16"):
        losses = [run["val_loss"] for run in runs if run["state_dtype"] == state_dtype]
        spread = f" ± {stdev(losses) / len(losses) ** 0.5:.4f}" if len(losses) > 1 else ""
        print(f"{state_dtype:>9}: {mean(losses):.4f}{spread} nats a byte over {len(losses)} seeds")
    if args.json:
        command = f"python scripts/compare_state.py --seeds {args.seeds} --steps {args.steps} "
        command += f"--beta2 {args.beta2}"
        args.json.write_text(json.dumps({"command": command, "runs": runs}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
