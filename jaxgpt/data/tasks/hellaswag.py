"""HellaSwag: which of four endings follows, scored as in llm.c's dev/data/hellaswag.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from jaxgpt.data.task import Question, Task, multiple_choice_figures, tokenize_row

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer


class Record(msgspec.Struct):
    """A line of hellaswag_val.jsonl."""

    ctx: str
    endings: list[str]
    label: int | str  # a number in the published file, text on the Hub


def question(record: Record, tokenizer: Tokenizer) -> Question:
    """A row for each ending."""
    label = int(record.label)
    if not 0 <= label < len(record.endings):
        raise ValueError(f"label {label} is not one of the {len(record.endings)} endings")
    rows = [tokenize_row(record.ctx, " " + ending, tokenizer) for ending in record.endings]
    return Question(rows, label)


TASK = Task(
    file="hellaswag_val.jsonl",
    hub={"path": "Rowan/hellaswag", "split": "validation"},
    record=Record,
    question=question,
    figures=multiple_choice_figures,
)
