"""An evaluation task turns records into rows of tokens, and the rows' scores into figures.

Rows are scored as completions, as llm.c scores HellaSwag: context and completion are tokenized
separately, and only the completion's tokens count. Everything here is NumPy; the model scores the
rows in `training/scoring.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:  # the command line needs the table, and must not wait for NumPy
    import numpy as np

    from jaxgpt.data.tokenizer import Tokenizer


class Row(NamedTuple):
    """A context followed by the completion to score."""

    tokens: np.ndarray  # (L,) uint16 or uint32
    scored: int  # tokens in the completion, at least 1


class Question(NamedTuple):
    """The rows of one record: the choices of a multiple-choice question, or a single row."""

    rows: list[Row]
    label: int  # index of the correct row


class RowScores(NamedTuple):
    """A model's scores of R rows."""

    nats_R: np.ndarray  # float64: summed loss of the completion
    means_R: np.ndarray  # float64: mean loss of the completion's tokens
    hits_R: np.ndarray  # bool: greedy decoding produces the completion


class Figure(NamedTuple):
    """A result of a task."""

    value: float
    standard_error: float | None = None  # if the value is a share of the questions


@dataclass(frozen=True, kw_only=True)
class Task:
    """An evaluation task."""

    file: str  # name of the published jsonl file, for --help
    hub: Mapping[str, str]  # where it is on the Hugging Face Hub: arguments of load_dataset
    record: type[msgspec.Struct]  # the fields of a record that are used
    # (record, tokenizer) -> its question; raises ValueError for a wrong record
    question: Callable[[Any, Tokenizer], Question]
    # (questions, scores of all their rows in order) -> figures by name
    figures: Callable[[Sequence[Question], RowScores], dict[str, Figure]]


def tokenize_row(context: str, completion: str, tokenizer: Tokenizer) -> Row:
    """The row of a context and its completion."""
    import numpy as np

    before, after = tokenizer.encode(context), tokenizer.encode(completion)
    if not len(before):  # the first scored token needs one before it
        before = np.array([tokenizer.eot], tokenizer.dtype)
    return Row(np.concatenate([before, after]), len(after))


def pick_choices(questions: Sequence[Question], scores: RowScores) -> tuple[np.ndarray, np.ndarray]:
    """(by_sum_Q, by_mean_Q): index of the row with the lowest summed and the lowest mean loss."""
    import numpy as np

    by_sum, by_mean, start = [], [], 0
    for question in questions:
        rows = slice(start, start + len(question.rows))
        by_sum.append(scores.nats_R[rows].argmin())
        by_mean.append(scores.means_R[rows].argmin())
        start = rows.stop
    return np.array(by_sum), np.array(by_mean)


def multiple_choice_figures(questions: Sequence[Question], scores: RowScores) -> dict[str, Figure]:
    """`acc` picks the choice with the lowest summed loss, `acc_norm` with the lowest mean loss.

    The mean is per token, as in llm.c; lm-evaluation-harness divides by characters.
    """
    import numpy as np

    labels_Q = np.array([question.label for question in questions])
    by_sum_Q, by_mean_Q = pick_choices(questions, scores)
    return {"acc": accuracy(by_sum_Q == labels_Q), "acc_norm": accuracy(by_mean_Q == labels_Q)}


def accuracy(is_right_Q: np.ndarray) -> Figure:
    """The share of questions answered correctly, with the standard error of a binomial share."""
    share = float(is_right_Q.mean())
    return Figure(share, math.sqrt(share * (1 - share) / len(is_right_Q)))


def perplexity(nats: float) -> float:
    """e to the power of a loss; infinite where that overflows."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf
