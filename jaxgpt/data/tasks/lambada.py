"""LAMBADA: the last word of a passage, cut off as in EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from jaxgpt.data.task import Figure, Question, RowScores, Task, accuracy, perplexity, tokenize_row

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer


class Record(msgspec.Struct):
    """A line of lambada_test.jsonl."""

    text: str


def question(record: Record, tokenizer: Tokenizer) -> Question:
    """A single row, whose completion is the last word."""
    context, space, word = record.text.rpartition(" ")
    if not space:
        raise ValueError("text is a single word")
    return Question([tokenize_row(context, " " + word, tokenizer)], label=0)


def figures(_: Sequence[Question], scores: RowScores) -> dict[str, Figure]:
    """`acc`, the share of last words that greedy decoding produces, and their `perplexity`."""
    return {
        "acc": accuracy(scores.hits_R),
        "perplexity": Figure(perplexity(scores.nats_R.mean())),
    }


TASK = Task(
    file="lambada_test.jsonl",
    hub={"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},
    record=Record,
    question=question,
    figures=figures,
)
