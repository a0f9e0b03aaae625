"""The runs that are measured on a card, as flags of `train` and `bench`, and tiny ones for a trial.

Imports nothing from jaxgpt, so that quarter_hour.py runs without any installed package.
"""

from typing import NamedTuple

SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
TINY_SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 320}
SMALL_SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 50304}
SHORT = ["--windows", "3", "--window-seconds", "1.5"]
TINY_SHORT = ["--windows", "2", "--window-seconds", "0.05"]


class Item(NamedTuple):
    """One step that steps.py times."""

    batch_size: int | None = 32  # of GPT-2 124M
    preset: str | None = None  # in place of GPT-2 124M
    accumulation: int = 4
    variant: str = "as-it-is"  # of ablate_step.py
    deterministic: bool = False


ITEMS = {
    "24gb": Item(None, "24gb", 16),
    "b32": Item(32),
    "b64": Item(64),
    "as-it-is": Item(),
    "triton-gemm-on": Item(variant="triton-gemm-on"),
    "scheduler-on": Item(variant="scheduler-on"),
    "deterministic": Item(deterministic=True),
    "attention-plain": Item(variant="attention-plain"),
    "fusion-tiles": Item(variant="fusion-tiles"),
    "command-buffers": Item(variant="command-buffers"),
    "no-command-buffers": Item(variant="no-command-buffers"),
    # Memory hardly depends on accumulation, and a full step of these takes seconds.
    "24gb-774m": Item(None, "24gb-774m", 8),
    "80gb-350m": Item(None, "80gb-350m", 2),
}
# Memory is counted over a whole process: these share one, so they ascend.
SPEED_ITEMS = ("24gb", "b32", "b64")
ABLATIONS = (
    *("as-it-is", "fusion-tiles", "command-buffers", "no-command-buffers"),
    *("triton-gemm-on", "scheduler-on", "deterministic", "attention-plain"),
)
MEMORY_ITEMS = ("80gb-350m", "24gb-774m")


def flags_of(item: Item, trial: bool) -> list[str]:
    """The flags of `bench` for an item."""
    if item.preset is not None and not trial:
        model = ["--preset", item.preset, "--device", "gpu"]
    else:
        model = model_flags(trial)
        model += ["--batch-size", "4" if trial else str(item.batch_size)]
    model += ["--deterministic", str(item.deterministic)]
    accumulation = 2 if trial else item.accumulation
    return [*model, "--gradient-accumulation-steps", str(accumulation), "--synthetic"]


def model_flags(trial: bool, sizes: dict[str, int] = SIZES) -> list[str]:
    """GPT-2 124M (or `sizes`) on the card; a tiny model with byte tokens on the CPU for a trial."""
    tokenizer, device = ("byte", "cpu") if trial else ("gpt2", "gpu")
    words = ["--preset", "demo", "--optimizer", "adamw", "--tokenizer", tokenizer]
    return [*words, "--device", device, *size_flags(TINY_SIZES if trial else sizes)]


def size_flags(sizes: dict[str, int]) -> list[str]:
    return [word for name, n in sizes.items() for word in (f"--{name.replace('_', '-')}", str(n))]
