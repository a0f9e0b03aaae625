"""HellaSwag and LAMBADA as rows of tokens to be scored by a model.

Both are scored as completions, the way llm.c scores HellaSwag: a row is a context and what may
follow it, tokenized one after the other, and only what follows counts.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, first_line

FROM_DATASETS = "datasets"  # instead of a file: fetch it through the library of that name
ON_THE_HUB = {
    "hellaswag": {"path": "Rowan/hellaswag", "split": "validation"},
    "lambada": {"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},
}


class BenchmarkError(UserError):
    """A benchmark that cannot be read; the message names the file, the line and the remedy."""


class Row(NamedTuple):
    """A context and what is scored after it."""

    tokens: np.ndarray  # (L,) uint16
    scored: int  # how many of its last tokens count, at least 1


class Question(NamedTuple):
    """Rows of which one is right, or a single row to be got right word for word."""

    rows: list[Row]
    label: int  # the right one


def load_benchmarks(
    sources: Mapping[str, str | None], tokenizer: Tokenizer, block_size: int
) -> dict[str, list[Question]]:
    """The benchmarks that have a source, by name; raises as `load_benchmark` does."""
    return {
        name: load_benchmark(name, source, tokenizer, block_size)
        for name, source in sources.items()
        if source is not None
    }


def load_benchmark(name: str, source: str, tokenizer: Tokenizer, block_size: int) -> list[Question]:
    """The questions of 'hellaswag' or 'lambada' from a jsonl file, or from the Hub by 'datasets'.

    Contexts lose their beginning where a row is longer than block_size + 1 tokens.

    Raises:
        BenchmarkError: if it cannot be read, or a scored part is longer than block_size.
    """
    read = {"hellaswag": _hellaswag, "lambada": _lambada}[name]
    questions = []
    for where, values in _records(name, source):
        try:
            question = read(values, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BenchmarkError(
                f"{where} is not a {name} record; {_EXPECTED[name]} is what there should be"
            ) from None
        longest = max(row.scored for row in question.rows)
        if longest > block_size:
            raise BenchmarkError(
                f"{where} has {longest} tokens to score, and the model sees {block_size} at a time"
            )
        rows = [Row(row.tokens[-block_size - 1 :], row.scored) for row in question.rows]
        questions.append(Question(rows, question.label))
    if not questions:
        raise BenchmarkError(f"{source} holds no record of {name}")
    return questions


_EXPECTED = {
    "hellaswag": '{"ctx": "...", "endings": ["...", ...], "label": 0}',
    "lambada": '{"text": "... last"}',
}


def _hellaswag(values: Mapping[str, Any], tokenizer: Tokenizer) -> Question:
    rows = [_row(values["ctx"], " " + ending, tokenizer) for ending in values["endings"]]
    label = int(values["label"])
    if isinstance(values["endings"], str) or not 0 <= label < len(rows):
        raise ValueError("no such ending")
    return Question(rows, label)


def _lambada(values: Mapping[str, Any], tokenizer: Tokenizer) -> Question:
    # The last word is what is asked for (EleutherAI's lm-evaluation-harness cuts it the same way).
    context, word = values["text"].rsplit(" ", 1)
    return Question([_row(context, " " + word, tokenizer)], 0)


def _row(context: str, ending: str, tokenizer: Tokenizer) -> Row:
    before = tokenizer.encode(context)
    if not len(before):  # something must stand before the first token that is scored
        before = np.array([tokenizer.eot], np.uint16)
    after = tokenizer.encode(ending)
    return Row(np.concatenate([before, after]), len(after))


def _records(name: str, source: str) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record."""
    if source == FROM_DATASETS:
        for index, record in enumerate(_fetched(name)):
            yield f"{ON_THE_HUB[name]['path']}, record {index}", record
        return
    try:
        # By "\n" alone: a text may hold other characters that str.splitlines takes for line ends.
        lines = Path(source).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(
            f"--{name} {source} cannot be read ({error}); give the published jsonl file, or "
            f"'{FROM_DATASETS}' to have it fetched"
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{source}, line {number}", json.loads(line)
            except (ValueError, RecursionError):
                raise BenchmarkError(
                    f"{source}, line {number} is no JSON; download it again"
                ) from None


def _fetched(name: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise BenchmarkError(
            f"--{name} {FROM_DATASETS} needs the library: pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(**ON_THE_HUB[name])
    except Exception as error:  # its own, the Hub's and the HTTP library's
        reason = first_line(error)
        raise BenchmarkError(
            f"{ON_THE_HUB[name]['path']} cannot be fetched ({type(error).__name__}: "
            f"{reason[:200]}); give the published file instead: --{name} FILE.jsonl"
        ) from None
