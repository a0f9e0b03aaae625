"""How well a model completes: HellaSwag's endings, LAMBADA's last words.

Rows are scored in batches of one width each, a power of two, so that few shapes are compiled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxgpt.data.tasks import Question, Row
from jaxgpt.model.gpt import Params
from jaxgpt.training.evaluation import perplexity
from jaxgpt.training.step import ScoreStep


class RowScores(NamedTuple):
    """What a model makes of rows, in their order."""

    nats_R: np.ndarray  # float64: loss of the scored tokens, summed
    means_R: np.ndarray  # float64: the same, divided by their number
    hits_R: np.ndarray  # bool: each scored token is the one the model finds likeliest


def score_rows(
    score_step: ScoreStep, params: Params, rows: Sequence[Row], block_size: int, batch_size: int
) -> RowScores:
    """Score rows of at most block_size + 1 tokens, `batch_size` at a time."""
    nats_R, hits_R = np.zeros(len(rows)), np.zeros(len(rows), bool)
    pending = []
    for chosen, width in _batches(rows, block_size, batch_size):
        tokens_BT1 = _padded([rows[r].tokens for r in chosen], width, batch_size)
        # Everything is dispatched before anything is read, so that the device never waits.
        pending.append((chosen, score_step(params, tokens_BT1)))
    for chosen, (losses_BT, hits_BT) in pending:
        losses, hits = np.asarray(losses_BT, np.float64), np.asarray(hits_BT)
        for b, r in enumerate(chosen):
            end = len(rows[r].tokens) - 1  # position t predicts token t + 1
            scored = slice(end - rows[r].scored, end)
            nats_R[r], hits_R[r] = losses[b, scored].sum(), hits[b, scored].all()
    return RowScores(nats_R, nats_R / [row.scored for row in rows], hits_R)


def hellaswag_answers(
    questions: Sequence[Question], scores: RowScores
) -> tuple[np.ndarray, np.ndarray]:
    """(by_sum_Q, by_mean_Q): the ending that each question's losses choose, summed or averaged."""
    by_sum, by_mean, start = [], [], 0
    for question in questions:
        rows = slice(start, start + len(question.rows))
        by_sum.append(scores.nats_R[rows].argmin())
        by_mean.append(scores.means_R[rows].argmin())
        start = rows.stop
    return np.array(by_sum), np.array(by_mean)


def score_hellaswag(
    score_step: ScoreStep,
    params: Params,
    questions: Sequence[Question],
    block_size: int,
    batch_size: int,
) -> dict[str, float]:
    """`acc` (the sum of losses chooses) and `acc_norm` (the mean does), as in llm.c."""
    rows = [row for question in questions for row in question.rows]
    scores = score_rows(score_step, params, rows, block_size, batch_size)
    by_sum_Q, by_mean_Q = hellaswag_answers(questions, scores)
    labels_Q = np.array([question.label for question in questions])
    return {
        **_with_error("acc", by_sum_Q == labels_Q),
        **_with_error("acc_norm", by_mean_Q == labels_Q),
        "examples": len(questions),
    }


def score_lambada(
    score_step: ScoreStep,
    params: Params,
    questions: Sequence[Question],
    block_size: int,
    batch_size: int,
) -> dict[str, float]:
    """`acc`, the share of last words that greedy decoding writes, and their `perplexity`."""
    rows = [question.rows[0] for question in questions]
    scores = score_rows(score_step, params, rows, block_size, batch_size)
    return {
        **_with_error("acc", scores.hits_R),
        "perplexity": perplexity(scores.nats_R.mean()),
        "examples": len(questions),
    }


def score_benchmarks(
    benchmarks: Mapping[str, Sequence[Question]],
    score_step: ScoreStep,
    params: Params,
    block_size: int,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """The figures of each benchmark, by its name."""
    score = {"hellaswag": score_hellaswag, "lambada": score_lambada}
    return {
        name: score[name](score_step, params, questions, block_size, batch_size)
        for name, questions in benchmarks.items()
    }


def _with_error(name: str, is_right_Q: np.ndarray) -> dict[str, float]:
    share = float(is_right_Q.mean())
    error = math.sqrt(share * (1 - share) / len(is_right_Q))
    return {name: share, f"{name}_standard_error": error}


def _batches(
    rows: Sequence[Row], block_size: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Row numbers, those of one width together, and the width: positions that predict."""
    by_width: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        needed = len(row.tokens) - 1
        width = min(block_size, max(32, 1 << (needed - 1).bit_length()))
        by_width.setdefault(width, []).append(r)
    for width, chosen in by_width.items():
        for start in range(0, len(chosen), batch_size):
            yield chosen[start : start + batch_size], width


def _padded(rows: list[np.ndarray], width: int, batch_size: int) -> np.ndarray:
    """(B, T1) uint16; filled up behind, where nothing that is scored can see it."""
    tokens_BT1 = np.zeros((batch_size, width + 1), np.uint16)
    for b, tokens in enumerate(rows):
        tokens_BT1[b, : len(tokens)] = tokens
    return tokens_BT1
