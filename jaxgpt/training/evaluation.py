"""Validation loss on a fixed set of windows: a deterministic function of the weights."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxgpt.data.task import perplexity
from jaxgpt.model.blocks import Params
from jaxgpt.training.step import EvalStep, ScoreStep


def evaluate(
    eval_step: EvalStep, params: Params, windows_WT1: np.ndarray, batch_size: int
) -> float:
    """Mean loss in nats per token over `windows_WT1`, `batch_size` windows at a time."""
    return float(window_losses(eval_step, params, windows_WT1, batch_size).mean())


def window_losses(
    eval_step: EvalStep, params: Params, windows_WT1: np.ndarray, batch_size: int
) -> np.ndarray:
    """(W,): the loss of each window in nats per token, `batch_size` windows at a time.

    The last batch is padded with earlier windows, which are not counted again.
    """
    W = len(windows_WT1)
    batches = (np.arange(-(-W // batch_size) * batch_size) % W).reshape(-1, batch_size)
    # All batches are dispatched before a loss is read, so that the device never waits.
    losses = [eval_step(params, windows_WT1[rows]) for rows in batches]
    return np.concatenate([np.asarray(x, np.float64) for x in losses])[:W]


class TextLoss(NamedTuple):
    """How well a model predicts a text."""

    loss: float  # nats per token
    standard_error: float  # of the loss, assuming independent windows
    perplexity: float
    bits_per_byte: float
    tokens: int  # predicted
    bytes: int  # of text that these tokens encode; end-of-text tokens encode none


def measure_text(
    score_step: ScoreStep,
    params: Params,
    batches: Iterable[np.ndarray],
    byte_lengths_V: np.ndarray,
) -> TextLoss:
    """The loss over batches of windows, each (W, T+1); only the last may be smaller.

    Bits per byte exclude end-of-text tokens, both their nats and their bytes.
    """
    means, nats, byte_count, tokens = [], 0.0, 0, 0
    shape: tuple[int, int] | None = None
    for windows_WT1 in batches:
        W, T1 = windows_WT1.shape
        shape = shape or (W, T1)
        padded_BT1 = np.resize(windows_WT1, shape)  # the last batch, so that one shape is compiled
        losses_WT = np.asarray(score_step(params, padded_BT1)[0], np.float64)[:W]
        lengths_WT = byte_lengths_V[windows_WT1[:, 1:]]
        means.append(losses_WT.mean(axis=1))
        nats += float(losses_WT[lengths_WT > 0].sum())
        byte_count += int(lengths_WT.sum())
        tokens += losses_WT.size
    means_W = np.concatenate(means)
    loss = float(means_W.mean())
    error = means_W.std(ddof=1) / math.sqrt(len(means_W)) if len(means_W) > 1 else math.nan
    return TextLoss(
        loss=loss,
        standard_error=float(error),
        perplexity=perplexity(loss),
        bits_per_byte=nats / math.log(2) / byte_count if byte_count else math.nan,
        tokens=tokens,
        bytes=byte_count,
    )
