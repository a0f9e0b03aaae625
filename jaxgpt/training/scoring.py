"""Scores a model on the rows of evaluation tasks.

Rows are batched by width, rounded up to a power of two, so that few shapes are compiled.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxgpt.data.task import Figure, Question, Row, RowScores
from jaxgpt.data.tasks import TASKS
from jaxgpt.model.blocks import Params
from jaxgpt.training.step import ScoreStep


def score_tasks(
    tasks: Mapping[str, Sequence[Question]],
    score_step: ScoreStep,
    params: Params,
    block_size: int,
    batch_size: int,
) -> dict[str, dict[str, Figure]]:
    """The figures of each task, by the task's name."""
    scored = {}
    for name, questions in tasks.items():
        rows = [row for question in questions for row in question.rows]
        scores = score_rows(score_step, params, rows, block_size, batch_size)
        scored[name] = TASKS[name].figures(questions, scores)
    return scored


def score_rows(
    score_step: ScoreStep, params: Params, rows: Sequence[Row], block_size: int, batch_size: int
) -> RowScores:
    """Score rows of at most block_size + 1 tokens, `batch_size` at a time."""
    nats_R, hits_R = np.zeros(len(rows)), np.zeros(len(rows), bool)
    pending = []
    for chosen, width in _batches(rows, block_size, batch_size):
        tokens_BT1 = _padded([rows[r].tokens for r in chosen], width, batch_size)
        # Dispatch every batch before reading a result, so that the device never waits.
        pending.append((chosen, score_step(params, tokens_BT1)))
    for chosen, (losses_BT, hits_BT) in pending:
        losses, hits = np.asarray(losses_BT, np.float64), np.asarray(hits_BT)
        for b, r in enumerate(chosen):
            end = len(rows[r].tokens) - 1  # position t predicts token t + 1
            scored = slice(end - rows[r].scored, end)
            nats_R[r], hits_R[r] = losses[b, scored].sum(), hits[b, scored].all()
    return RowScores(nats_R, nats_R / [row.scored for row in rows], hits_R)


def _batches(
    rows: Sequence[Row], block_size: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """(indices of up to `batch_size` rows, the width that they are padded to)."""
    by_width: dict[int, list[int]] = {}
    for r, row in enumerate(rows):
        needed = len(row.tokens) - 1
        width = min(block_size, max(32, 1 << (needed - 1).bit_length()))
        by_width.setdefault(width, []).append(r)
    for width, chosen in by_width.items():
        for start in range(0, len(chosen), batch_size):
            yield chosen[start : start + batch_size], width


def _padded(rows: list[np.ndarray], width: int, batch_size: int) -> np.ndarray:
    """(B, T1), zeros at the end, which causal attention hides from the scored tokens."""
    tokens_BT1 = np.zeros((batch_size, width + 1), rows[0].dtype)
    for b, tokens in enumerate(rows):
        tokens_BT1[b, : len(tokens)] = tokens
    return tokens_BT1
