"""Validation loss on a fixed set of windows: the same weights always get the same number."""

import numpy as np

from jaxgpt.model.gpt import Params
from jaxgpt.training.step import EvalStep


def evaluate(
    eval_step: EvalStep, params: Params, windows_WT1: np.ndarray, batch_size: int
) -> float:
    """Mean loss in nats per token over `windows_WT1` (uint16), `batch_size` windows at a time.

    The last batch is filled up with windows seen before, which are not counted again.
    """
    W = len(windows_WT1)
    filled = np.arange(-(-W // batch_size) * batch_size) % W
    batches = filled.reshape(-1, batch_size)
    # Everything is dispatched before anything is read, so that the device never waits.
    losses = [eval_step(params, windows_WT1[rows]) for rows in batches]
    return float(np.concatenate([np.asarray(x, np.float64) for x in losses])[:W].mean())
