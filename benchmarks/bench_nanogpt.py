"""Time nanoGPT's own model on random tokens; prints one JSON object. Needs PyTorch, not jaxgpt.

    python benchmarks/bench_nanogpt.py NANOGPT_DIR --n-layer 12 --n-head 12 --n-embd 768

compare_nanogpt.py runs it, one process per measurement. The step is that of nanoGPT's train.py:
micro-batches, clipping, AdamW (fused on a GPU), gradients set to None; on a GPU bfloat16 autocast
with TF32 allowed. Nothing is read from the device within a timed window.
"""

import argparse
import contextlib
import io
import json
import math
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

POOL = 4  # batches, drawn once and reused in rotation


def main() -> None:
    args = parse_args()
    started = time.perf_counter()
    torch.manual_seed(1337)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    choose_attention(args.attention)
    step = make_step(args)
    step()
    synchronize(args.device)
    first_step_seconds = time.perf_counter() - started
    seconds, steps = time_steps(step, args)
    tokens = args.accumulation * args.batch_size * args.block_size
    print(json.dumps(describe(args, tokens, seconds, steps, first_step_seconds)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("nanogpt", type=Path, metavar="NANOGPT_DIR", help="a clone of nanoGPT")
    for name in ("n-layer", "n-head", "n-embd", "block-size", "vocab-size", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--attention", choices=("default", "cudnn"), default="default")
    parser.add_argument("--warm-up", type=int, default=3, help="steps after the first, not timed")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--window-seconds", type=float, default=2.0)
    args = parser.parse_args()
    if not (args.nanogpt / "model.py").is_file():
        parser.error(f"{args.nanogpt} is not a clone of nanoGPT: model.py is missing")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch finds no GPU; install its CUDA version")
    return args


def choose_attention(attention: str) -> None:
    """'default' is PyTorch's own choice; 'cudnn' allows only cuDNN and the plain products."""
    if attention == "cudnn":
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)


def make_step(args: argparse.Namespace) -> Callable[[], None]:
    """One optimizer step of nanoGPT's model, from its folder."""
    code = runpy.run_path(str(args.nanogpt / "model.py"))
    sizes = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = code["GPTConfig"](**sizes, vocab_size=args.vocab_size, dropout=0.0, bias=False)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size and its optimizer
        plain = code["GPT"](config).to(args.device)
        optimizer = plain.configure_optimizers(0.1, 6e-4, (0.9, 0.95), args.device)
    model = torch.compile(plain) if args.compile else plain
    autocast = (
        torch.autocast("cuda", dtype=torch.bfloat16)
        if args.device == "cuda"
        else contextlib.nullcontext()
    )
    next_batch = make_batches(args)

    def step() -> None:
        for _ in range(args.accumulation):
            inputs_BT, targets_BT = next_batch()
            with autocast:
                _, loss = model(inputs_BT, targets_BT)
                loss = loss / args.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_batches(args: argparse.Namespace) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that returns (inputs, targets) on the device, int64 (B, T) as in nanoGPT."""
    shape = (POOL, args.batch_size, args.block_size + 1)
    # Only ids of the tokenizer: of 50,304 rows, GPT-2's are the first 50,257.
    pool = torch.randint(0, min(args.vocab_size, 50_257), shape)
    pairs = [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in pool]
    if args.device == "cuda":
        pairs = [(x.pin_memory(), y.pin_memory()) for x, y in pairs]
    turn = -1

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal turn
        turn += 1
        x, y = pairs[turn % POOL]
        return x.to(args.device, non_blocking=True), y.to(args.device, non_blocking=True)

    return next_batch


def time_steps(step: Callable[[], None], args: argparse.Namespace) -> tuple[list[float], int]:
    """(seconds per step in each window, steps in a window)."""

    def window(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(args.device)
        return (time.perf_counter() - begin) / steps

    steps = max(1, math.ceil(args.window_seconds / window(args.warm_up)))
    return [window(steps) for _ in range(args.windows)], steps


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def describe(
    args: argparse.Namespace,
    tokens: int,
    seconds: list[float],
    steps: int,
    first_step_seconds: float,
) -> dict:
    """The figures under the names that jaxgpt.bench gives them."""
    on_gpu = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": None if on_gpu else torch.get_num_threads(),
        "step_ms": 1e3 * statistics.median(seconds),
        "step_ms_windows": [1e3 * s for s in seconds],
        "steps_per_window": steps,
        "tokens_per_second": tokens / statistics.median(seconds),
        "first_step_seconds": first_step_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
    }


if __name__ == "__main__":
    sys.exit(main())
