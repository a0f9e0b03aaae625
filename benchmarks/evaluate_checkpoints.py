"""Evaluate nanoGPT's and jaxgpt's checkpoints alike: nats per byte over the whole validation split.

Used by compare_loss.py. Each model is evaluated by its own code, in float32 on the CPU.
"""

import contextlib
import io
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.sources import embedded_tokens
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.run.folder import load_saved


def mean_loss(context: int, batch_loss: Callable[[np.ndarray], Any]) -> float:
    """Nats per byte of 'val'; `batch_loss` gives the mean over int64 windows (B, T+1)."""
    tokens = embedded_tokens(load_tokenizer("byte"))["val"].astype(np.int64)
    batches = list(consecutive_windows(tokens, context))
    predicted = [windows[:, 1:].size for windows in batches]
    return float(np.average([float(batch_loss(x)) for x in batches], weights=predicted))


def consecutive_windows(tokens: np.ndarray, context: int, batch: int = 64) -> Iterator[np.ndarray]:
    """Windows (B, T+1) that predict every token but the first once; the last is shorter."""
    complete = (len(tokens) - 1) // context
    windows = tokens[np.arange(complete)[:, None] * context + np.arange(context + 1)]
    for first in range(0, complete, batch):
        yield windows[first : first + batch]
    if complete * context < len(tokens) - 1:
        yield tokens[None, complete * context :]


def evaluate_nanogpt(folder: Path) -> tuple[int, int, float]:
    """(step, context, loss) of a trained copy's checkpoint, by the copy's own model.py."""
    import torch

    saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    code = runpy.run_path(str(folder / "model.py"))
    with contextlib.redirect_stdout(io.StringIO()):
        model = code["GPT"](code["GPTConfig"](**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])

    @torch.no_grad()
    def batch_loss(windows: np.ndarray) -> Any:
        tokens = torch.from_numpy(windows)
        _, loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
        return loss

    context = saved["model_args"]["block_size"]
    return saved["iter_num"], context, mean_loss(context, batch_loss)


def evaluate_jaxgpt(out_dir: Path) -> tuple[int, int, float]:
    """(step, context, loss) of a run's newest checkpoint, from the model's logits in float32."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import optax
    from flax import nnx

    from jaxgpt.run.checkpoint import Checkpoints
    from jaxgpt.training.build import build_training

    cfg = load_saved(out_dir)
    assert cfg is not None, "the run has finished"
    cpu = jax.devices("cpu")[0]
    training = build_training(  # the schedule does not matter here
        cfg.model,
        cfg.optimizer,
        max_iters=1,
        accumulation=1,
        dtype="float32",
        seed=0,
        device=cpu,
    )
    with Checkpoints(out_dir, cfg.asked.keep_checkpoints) as checkpoints:
        step = checkpoints.latest_step
        assert step is not None, "every run saves at its end"
        params = checkpoints.restore(step, training.state_like).params

    @jax.jit
    def batch_loss(tokens_BT1: jax.Array) -> jax.Array:
        logits_BTV = nnx.merge(training.graphdef, params)(tokens_BT1[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT1[:, 1:]).mean()

    return step, cfg.model.block_size, mean_loss(cfg.model.block_size, batch_loss)
