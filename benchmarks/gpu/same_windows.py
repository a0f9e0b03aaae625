"""Train nanoGPT on the windows that a run of jaxgpt gets, in the same order.

    python benchmarks/gpu/same_windows.py write windows.npz FLAGS    # train's flags; no device
    python benchmarks/gpu/same_windows.py train windows.npz NANOGPT_DIR cuda    # PyTorch alone

`train` prints the loss of every step as one JSON object: nanoGPT's model, optimizer and schedule,
as in its train.py.
"""

import contextlib
import io
import json
import math
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
OPTIMIZER = (
    "learning_rate",
    "min_lr",
    "warmup_iters",
    "weight_decay",
    "beta1",
    "beta2",
    "grad_clip",
)


def write(path: Path, flags: Sequence[str]) -> None:
    """Save windows_SBT1 (S steps, uint16) and the run's settings."""
    from jaxgpt import bench
    from jaxgpt.config.command_line import parse_run
    from jaxgpt.data.loader import WindowLoader
    from jaxgpt.data.sources import open_split
    from jaxgpt.data.tokenizer import load_tokenizer
    from jaxgpt.planning.train_command import resolve_new

    asked, _, _ = parse_run(
        bench.BenchFlags, flags, prog="same_windows", description="", default_preset=lambda: None
    )
    cfg = resolve_new(asked, "float32")
    tokenizer = load_tokenizer(asked.tokenizer)
    train = open_split(None, "train", tokenizer)
    loader = WindowLoader(train, cfg.model.block_size, tokenizer.n_vocab, asked.seed)
    steps = range(asked.max_iters)
    windows = np.stack([loader.batch(step, 1, asked.batch_size)[0] for step in steps])
    settings = {name: getattr(cfg.model, name) for name in MODEL}
    settings |= {name: getattr(cfg.optimizer, name) for name in OPTIMIZER}
    settings["lr_decay_iters"] = cfg.optimizer.lr_decay_iters or asked.max_iters
    np.savez(path, windows=windows, settings=json.dumps(settings))
    print(json.dumps({"windows": windows.shape, **settings}))


def train(path: Path, nanogpt: Path, device: str) -> None:
    """Run nanoGPT's loop over the windows."""
    import torch

    began = time.perf_counter()
    torch.manual_seed(1337)
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    saved = np.load(path)
    s = json.loads(str(saved["settings"]))
    code = runpy.run_path(str(nanogpt / "model.py"))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size and its optimizer
        plain = code["GPT"](code["GPTConfig"](**{name: s[name] for name in MODEL}, dropout=0.0))
        plain.to(device)
        betas = (s["beta1"], s["beta2"])
        optimizer = plain.configure_optimizers(s["weight_decay"], s["learning_rate"], betas, device)
    on_card = device == "cuda"
    model = torch.compile(plain) if on_card else plain
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if on_card else contextlib.nullcontext()
    losses = []
    for step, window_BT1 in enumerate(saved["windows"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        tokens_BT1 = torch.from_numpy(window_BT1.astype(np.int64)).to(device)
        with autocast:
            _, loss = model(tokens_BT1[:, :-1].contiguous(), tokens_BT1[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), s["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    # Steps are counted from 1, as jaxgpt logs them.
    found = {step: float(loss) for step, loss in enumerate(losses, start=1)}
    print(json.dumps({"losses": found, "seconds": time.perf_counter() - began}))


def learning_rate(step: int, s: dict[str, Any]) -> float:
    """nanoGPT's schedule: linear warmup, then a cosine."""
    if step < s["warmup_iters"]:
        return s["learning_rate"] * (step + 1) / (s["warmup_iters"] + 1)
    share = (step - s["warmup_iters"]) / max(1, s["lr_decay_iters"] - s["warmup_iters"])
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return s["min_lr"] + cosine * (s["learning_rate"] - s["min_lr"])


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), sys.argv[3:])
    else:
        train(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
