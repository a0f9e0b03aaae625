"""How good a model is: `python -m jaxgpt.evaluate --out-dir runs/24gb`.

By default the loss is that of the first 10,485,760 tokens of the validation split, end to end, as
llm.c and modded-nanogpt take it, so that their 3.28 on FineWeb compares.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.flag_types import IntIfSet, PathIfSet, TextIfSet
from jaxgpt.data.loader import evaluation_windows, first_windows
from jaxgpt.data.manifest import check_manifest
from jaxgpt.data.shards import TokenStream
from jaxgpt.data.sources import open_split
from jaxgpt.data.tasks import load_benchmarks
from jaxgpt.errors import UserError, explain_out_of_memory, fail
from jaxgpt.run.console import print_table, waiting
from jaxgpt.weights.source import Weights, WeightsFlags, build_network, open_weights, prepare_device

PROG = "python -m jaxgpt.evaluate"
VAL_TOKENS = 10_485_760  # 10,240 windows of 1,024


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags(WeightsFlags):
    """What to measure, and on what."""

    dataset: TextIfSet = None  # a folder under data/, or 'embedded'; if unset, the run's own
    data_dir: PathIfSet = None  # folder with the token shards; if unset, data/<dataset>
    # from the start of the validation split; 0: the whole of it; if unset, 10,485,760
    val_tokens: IntIfSet = None
    as_in_training: bool = False  # the windows that the run itself evaluates on, and no others
    skip_loss: bool = False  # the benchmarks alone
    hellaswag: TextIfSet = None  # hellaswag_val.jsonl, or 'datasets' to have it fetched
    lambada: TextIfSet = None  # lambada_test.jsonl, or 'datasets' to have it fetched
    batch_size: int = 8  # sequences the device holds at a time
    json: bool = False  # one JSON object instead of a table

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""
        errors = super().errors()
        if self.val_tokens is not None and self.val_tokens < 0:
            errors.append(f"--val-tokens {self.val_tokens} must be at least 0")
        if self.batch_size < 1:
            errors.append(f"--batch-size {self.batch_size} must be at least 1")
        if self.as_in_training and self.val_tokens is not None:
            errors.append("--as-in-training measures the run's own windows; drop --val-tokens")
        if self.as_in_training and self.skip_loss:
            errors.append("--as-in-training is about the loss, which --skip-loss leaves out")
        if self.skip_loss and not (self.hellaswag or self.lambada):
            errors.append("--skip-loss leaves nothing to do without --hellaswag or --lambada")
        if self.dataset == "embedded" and self.data_dir is not None:
            errors.append("--data-dir is not read with --dataset embedded")
        return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = cli.parse_command(
        sys.argv[1:] if argv is None else argv,
        EvaluateFlags,
        prog=PROG,
        description="Measure a model: validation loss, perplexity, bits per byte, benchmarks.",
    )
    smaller = f"hold less at a time with --batch-size {max(1, flags.batch_size // 2)}"
    try:
        with explain_out_of_memory(lambda: smaller):
            run(flags)
    except UserError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def run(flags: EvaluateFlags) -> None:
    """Read everything, measure, and print."""
    weights = open_weights(flags)
    m, tokenizer = weights.model, weights.tokenizer
    text = None if flags.skip_loss else open_text(flags, weights)
    sources = {"hellaswag": flags.hellaswag, "lambada": flags.lambada}
    benchmarks = load_benchmarks(sources, tokenizer, m.block_size)
    if flags.as_in_training and flags.dtype == "auto" and weights.run is not None:
        # A run on a card may have been told float32, and its losses are logged in that.
        flags = dataclasses.replace(flags, dtype=weights.run.dtype)
    device, dtype = prepare_device(flags)

    import jax

    from jaxgpt.training.evaluation import measure_text
    from jaxgpt.training.scoring import score_benchmarks
    from jaxgpt.training.step import make_score_step

    result: dict[str, Any] = {"model": weights.name, "parameters": m.parameter_count(padding=False)}
    result |= {"step": weights.step, "dtype": dtype, "device": device.device_kind}
    with jax.default_device(device):
        params = weights.load(device)
        score_step = jax.jit(make_score_step(build_network(weights, device, dtype)))
        if text is not None:
            name, batches, count = text
            shown = with_progress(batches, -(-count // flags.batch_size), "validation loss")
            loss = measure_text(score_step, params, shown, tokenizer.byte_lengths())
            result["validation"] = {"text": name, **loss._asdict()}
        with waiting(f"scoring {' and '.join(benchmarks)}") if benchmarks else nullcontext():
            size = flags.batch_size
            result |= score_benchmarks(benchmarks, score_step, params, m.block_size, size)
    if flags.json:
        print(json.dumps(without_nan(result), indent=2))
    else:
        print_result(result)


def open_text(flags: EvaluateFlags, weights: Weights) -> tuple[str, Iterable[np.ndarray], int]:
    """What is measured, in words; its windows in batches; how many windows there are.

    Raises:
        UserError: if there is no text, or it is not made of this tokenizer's tokens.
    """
    block_size, n_vocab = weights.model.block_size, weights.tokenizer.n_vocab
    run = weights.run
    if flags.as_in_training and run is None:
        raise ConfigError(f"--as-in-training is for runs: {weights.name} is none")
    tokens = open_val_split(flags, weights)
    available = (len(tokens) - 1) // block_size
    if flags.as_in_training:
        assert run is not None
        windows_WT1 = evaluation_windows(tokens, block_size, run.eval_windows, n_vocab)
        starts = range(0, len(windows_WT1), flags.batch_size)
        own = [windows_WT1[first : first + flags.batch_size] for first in starts]
        name = f"{tokens.name}: the {len(windows_WT1):,} windows of the run's own evaluations"
        return name, own, len(windows_WT1)
    wanted = VAL_TOKENS if flags.val_tokens is None else flags.val_tokens
    count = min(max(1, wanted // block_size), available) if wanted else available
    batches = first_windows(tokens, block_size, count, n_vocab, flags.batch_size)
    what = "all" if count == available else "the first"
    return f"{tokens.name}: {what} {count:,} windows of {block_size:,}", batches, count


def open_val_split(flags: EvaluateFlags, weights: Weights) -> TokenStream:
    """The validation split that the flags name, or else the run's own."""
    run = weights.run
    dataset = flags.dataset or (run.asked.dataset if run and flags.data_dir is None else None)
    data_dir = flags.data_dir
    if data_dir is None and dataset not in (None, "embedded"):
        of_run = run is not None and flags.dataset in (None, run.asked.dataset)
        data_dir = run.asked.data_dir if run and of_run else Path("data") / str(dataset)
    if dataset == "embedded":
        return open_split(None, "val", weights.tokenizer)
    if data_dir is None:
        raise ConfigError(
            f"{weights.name} has no text of its own; say which with --data-dir FOLDER or --dataset "
            "embedded, or measure benchmarks alone with --skip-loss"
        )
    data_dir = data_dir.expanduser()
    check_manifest(data_dir, weights.tokenizer)
    return open_split(data_dir, "val", weights.tokenizer)


def with_progress(batches: Iterable[np.ndarray], total: int, what: str) -> Iterable[np.ndarray]:
    """The batches, with a bar on the terminal while they last."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(batches, what, total, console=console, disable=hidden, transient=True)


def print_result(result: dict[str, Any]) -> None:
    """A table of what was measured."""
    rows = {"model": f"{result['model']}, {result['parameters']:,} parameters, {result['dtype']}"}
    if "validation" in result:
        v = result["validation"]
        rows["text"] = v["text"]
        rows["loss"] = f"{v['loss']:.4f} +- {v['standard_error']:.4f} nats per token"
        rows["perplexity"] = f"{v['perplexity']:.2f}"
        rows["bits per byte"] = f"{v['bits_per_byte']:.4f}"
        rows["tokens"] = f"{v['tokens']:,} ({v['bytes']:,} bytes)"
    for name in ("hellaswag", "lambada"):
        if name in result:
            rows[name] = _in_words(result[name])
    print_table("jaxgpt evaluation", rows)


def _in_words(scores: dict[str, float]) -> str:
    parts = [
        f"{name} {scores[name]:.4f} +- {scores[f'{name}_standard_error']:.4f}"
        for name in ("acc", "acc_norm")
        if name in scores
    ]
    if "perplexity" in scores:
        parts.append(f"perplexity {scores['perplexity']:.2f}")
    return ", ".join([*parts, f"{scores['examples']:,} examples"])


def without_nan(value: Any) -> Any:
    """A JSON value whose numbers are all finite: strict JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
