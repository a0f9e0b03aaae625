"""Measure a model: `python -m jaxgpt.evaluate --out-dir runs/24gb`.

By default the loss is over the first 10,485,760 tokens of the validation split, in consecutive
windows, as llm.c and modded-nanogpt measure it, so that their 3.28 on FineWeb is comparable.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError, as_flag, bad_counts
from jaxgpt.config.flag_types import IntIfSet, PathIfSet, TextIfSet
from jaxgpt.config.mixture import Mixture, make_mixture
from jaxgpt.config.task_sources import TaskSources
from jaxgpt.data.loader import evaluation_windows, first_windows
from jaxgpt.data.manifest import check_manifest
from jaxgpt.data.sources import open_split
from jaxgpt.data.task import Figure, Question
from jaxgpt.data.tasks import TASKS, load_tasks
from jaxgpt.errors import explain_out_of_memory, make_main
from jaxgpt.files import user_path
from jaxgpt.run.console import make_console, print_table, waiting
from jaxgpt.weights.source import Weights, WeightsFlags, build_network, open_weights, prepare_device

PROG = "python -m jaxgpt.evaluate"
VAL_TOKENS = 10_485_760  # 10,240 windows of 1,024


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateFlags(WeightsFlags):
    """What to measure, and on what."""

    # a folder under data/ or a path, 'embedded', or a mixture; if unset, the run's own
    dataset: TextIfSet = None
    data_dir: PathIfSet = None  # folder with the token shards; if unset, data/<dataset>
    # tokens of the validation split to use, from its start; 0: all; if unset, 10,485,760
    val_tokens: IntIfSet = None
    block_size: IntIfSet = None  # length of the windows; if unset, the model's context
    as_in_training: bool = False  # use the windows of the run's own evaluations instead
    skip_loss: bool = False  # score the tasks only
    batch_size: int = 8  # sequences the device processes at a time
    json: bool = False  # print JSON instead of a table
    tasks: TaskSources = dataclasses.field(default_factory=TaskSources)

    def errors(self) -> list[str]:
        errors = super().errors()
        errors += bad_counts(self, "block_size", "batch_size", as_flags=True)
        if self.val_tokens is not None and self.val_tokens < 0:
            errors.append(f"--val-tokens {self.val_tokens} must be at least 0")
        errors += [
            f"--as-in-training uses the run's own windows; drop {as_flag(name)}"
            for name in ("block_size", "val_tokens")
            if self.as_in_training and getattr(self, name) is not None
        ]
        if self.as_in_training and self.skip_loss:
            errors.append("--as-in-training measures the loss, which --skip-loss leaves out")
        if self.skip_loss and not any(vars(self.tasks).values()):
            names = " or ".join(as_flag(name) for name in TASKS)
            errors.append(f"--skip-loss leaves nothing to measure; add {names}")
        if self.dataset == "embedded" and self.data_dir is not None:
            errors.append("--data-dir is not read with --dataset embedded; drop one of the two")
        return errors


class ValidationText(NamedTuple):
    """The windows that the loss is measured on."""

    name: str  # which windows of which file
    batches: Iterable[np.ndarray]  # (W, T+1) token ids each
    windows: int  # in all batches
    share: float  # of this text in the loss of a mixture


def run(argv: Sequence[str]) -> int:
    """Parse the flags; open the weights, the text and the tasks; measure; print."""
    flags = cli.parse_command(
        argv,
        EvaluateFlags,
        prog=PROG,
        description="Measure a model: validation loss, perplexity, bits per byte, tasks.",
    )
    weights = open_weights(flags)
    if flags.block_size is not None:
        weights = weights.with_context(flags.block_size)
    texts = {} if flags.skip_loss else open_texts(flags, weights)
    tasks = load_tasks(vars(flags.tasks), weights.tokenizer, weights.model.block_size)
    wanted_dtype = flags.dtype
    if flags.as_in_training and wanted_dtype == "auto" and weights.run is not None:
        wanted_dtype = weights.run.dtype  # a run on a GPU may have used --dtype float32
    device, dtype = prepare_device(flags.device, wanted_dtype)
    smaller = f"use smaller batches: --batch-size {max(1, flags.batch_size // 2)}"
    with explain_out_of_memory(lambda: smaller):
        result, figures = measure(weights, texts, tasks, flags.batch_size, device, dtype)
    if flags.json:
        result |= {name: flat_figures(figures[name], len(tasks[name])) for name in tasks}
        print(json.dumps(without_nan(result), indent=2))
    else:
        rows = {name: figures_text(figures[name], len(tasks[name])) for name in tasks}
        print_table("jaxgpt evaluation", result_rows(result) | rows)
    return 0


def measure(
    weights: Weights,
    texts: Mapping[str, ValidationText],
    tasks: Mapping[str, Sequence[Question]],
    batch_size: int,
    device: Any,
    dtype: str,
) -> tuple[dict[str, Any], dict[str, dict[str, Figure]]]:
    """(the model and its validation loss as JSON values, the figures of each task)."""
    import jax

    from jaxgpt.training.evaluation import measure_text
    from jaxgpt.training.scoring import score_tasks
    from jaxgpt.training.step import make_score_step

    m = weights.model
    result: dict[str, Any] = {"model": weights.name, "parameters": m.parameter_count()}
    result["padding_parameters"] = m.padding_parameters
    result |= {"step": weights.step, "dtype": dtype, "device": device.device_kind}
    with jax.default_device(device):
        params = weights.load(device)
        score_step = jax.jit(make_score_step(build_network(weights, device, dtype)))
        losses = {}
        for name, text in texts.items():
            batches = with_progress(text.batches, -(-text.windows // batch_size), "validation loss")
            loss = measure_text(score_step, params, batches, weights.tokenizer.byte_lengths())
            losses[name] = {"text": text.name, **loss._asdict()}
        if len(losses) == 1:
            (result["validation"],) = losses.values()
        elif losses:
            mean = sum(texts[name].share * loss["loss"] for name, loss in losses.items())
            result["mixture"] = {"loss": mean, "sources": losses}
        with waiting(f"scoring {' and '.join(tasks)}") if tasks else nullcontext():
            return result, score_tasks(tasks, score_step, params, m.block_size, batch_size)


def open_texts(flags: EvaluateFlags, weights: Weights) -> dict[str, ValidationText]:
    """The windows that the flags ask for, by source.

    Raises:
        UserError: if there is no text, or it was tokenized with another tokenizer.
    """
    if flags.as_in_training and weights.run is None:
        raise ConfigError(f"--as-in-training needs a run, and {weights.name} is not one; drop it")
    mixture = find_mixture(flags, weights)
    shares = mixture.stages[0].shares
    return {
        mixture.labels[name]: open_text(flags, weights, folder, float(shares.get(name, 0)))
        for name, folder in mixture.folders.items()
    }


def open_text(
    flags: EvaluateFlags, weights: Weights, folder: Path | None, share: float
) -> ValidationText:
    """The windows of one source."""
    block_size, n_vocab = weights.model.block_size, weights.tokenizer.n_vocab
    if folder is not None:
        check_manifest(folder, weights.tokenizer)
    tokens = open_split(folder, "val", weights.tokenizer)
    if flags.as_in_training:
        assert weights.run is not None
        windows_WT1 = evaluation_windows(tokens, block_size, weights.run.eval_windows, n_vocab)
        starts = range(0, len(windows_WT1), flags.batch_size)
        return ValidationText(
            f"{tokens.name}: {len(windows_WT1):,} windows, drawn as in the run's evaluations",
            [windows_WT1[start : start + flags.batch_size] for start in starts],
            len(windows_WT1),
            share,
        )
    available = (len(tokens) - 1) // block_size
    wanted = VAL_TOKENS if flags.val_tokens is None else flags.val_tokens
    count = min(max(1, wanted // block_size), available) if wanted else available
    which = "all" if count == available else "the first"
    return ValidationText(
        f"{tokens.name}: {which} {count:,} windows of {block_size:,}",
        first_windows(tokens, block_size, count, n_vocab, flags.batch_size),
        count,
        share,
    )


def find_mixture(flags: EvaluateFlags, weights: Weights) -> Mixture:
    """The datasets that the flags name, by default the run's own."""
    run = weights.run
    if flags.data_dir is not None:
        return make_mixture("data_dir", user_path(flags.data_dir, "--data-dir"))
    if run is not None and flags.dataset in (None, run.asked.dataset):
        return run.asked.mixture
    if flags.dataset is None:
        raise ConfigError(
            f"{weights.name} is not a run and has no dataset; add --data-dir FOLDER or --dataset "
            "embedded, or score tasks only with --skip-loss"
        )
    return make_mixture(flags.dataset, None)


def with_progress(batches: Iterable[np.ndarray], total: int, what: str) -> Iterable[np.ndarray]:
    """The batches, with a progress bar if standard error is a terminal."""
    console = make_console(stderr=True)
    hidden = not console.is_terminal
    return track(batches, what, total, console=console, disable=hidden, transient=True)


def result_rows(result: Mapping[str, Any]) -> dict[str, str]:
    """The table's rows for the model and its validation loss."""
    counts = "{parameters:,} parameters, {padding_parameters:,} of them padding".format(**result)
    rows = {"model": f"{result['model']}, {counts}, {result['dtype']}"}
    if "validation" in result:
        v = result["validation"]
        rows["text"] = v["text"]
        rows["loss"] = f"{v['loss']:.4f} +- {v['standard_error']:.4f} nats per token"
        rows["perplexity"] = f"{v['perplexity']:.2f}"
        rows["bits per byte"] = f"{v['bits_per_byte']:.4f}"
        rows["tokens"] = f"{v['tokens']:,} ({v['bytes']:,} bytes)"
    if "mixture" in result:
        rows["loss"] = f"{result['mixture']['loss']:.4f} nats per token, the sources' weighted mean"
        for name, v in result["mixture"]["sources"].items():
            rows[f"loss of {name}"] = (
                f"{v['loss']:.4f} +- {v['standard_error']:.4f}, {v['bits_per_byte']:.4f} bits per "
                f"byte; {v['text']}, {v['tokens']:,} tokens"
            )
    return rows


def figures_text(figures: Mapping[str, Figure], examples: int) -> str:
    """The table's row for a task."""
    parts = [
        f"{name} {value:.2f}" if error is None else f"{name} {value:.4f} +- {error:.4f}"
        for name, (value, error) in figures.items()
    ]
    return ", ".join([*parts, f"{examples:,} examples"])


def flat_figures(figures: Mapping[str, Figure], examples: int) -> dict[str, float]:
    """A task's figures as JSON values."""
    values: dict[str, float] = {}
    for name, (value, error) in figures.items():
        values[name] = value
        if error is not None:
            values[f"{name}_standard_error"] = error
    return {**values, "examples": examples}


def without_nan(value: Any) -> Any:
    """A JSON value with null for numbers that are not finite, which strict JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


main = make_main(PROG, run, read_only=True)

if __name__ == "__main__":
    sys.exit(main())
