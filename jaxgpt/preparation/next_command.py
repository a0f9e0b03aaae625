"""The command that trains on prepared tokens: what `prepare` prints last."""

import shlex
from itertools import chain, count
from pathlib import Path

from jaxgpt.data.manifest import Manifest

SMALL_DATA = 5_000_000  # training tokens below which the demo's model is large enough
DEMO_BLOCK_SIZE = 64  # configs/demo.toml

# With more ids than this the demo's 1,000 steps take a CPU far longer than the minute they should.
DEMO_VOCABULARY = 5_000
SHORT_RUN = ["--max-iters", "200", "--warmup-iters", "20", "--eval-interval", "100"]


def train_command(out: Path, manifest: Manifest, has_gpu: bool) -> str:
    """A command that runs on this machine: of the card's preset, or of the demo's size.

    The tokenizer needs no flag: training takes the one in the manifest.
    """
    words = ["python", "-m", "jaxgpt.train"]
    splits = manifest.splits
    is_small = splits.train.tokens < SMALL_DATA
    if is_small or not has_gpu:
        words += ["--preset", "demo"]
    if is_small or not has_gpu or out != Path("data/fineweb"):
        words += ["--dataset", out.name]
    if out.parent != Path("data"):
        words += ["--data-dir", str(out)]
    if is_small or not has_gpu:
        # A window of the smaller split has block_size tokens and one more.
        fitting = min(splits.train.tokens, splits.val.tokens) - 1
        if fitting < DEMO_BLOCK_SIZE:
            words += ["--block-size", str(1 << max(fitting, 1).bit_length() - 1)]
        if manifest.tokenizer.n_vocab > DEMO_VOCABULARY:
            words += SHORT_RUN
        words += ["--out-dir", str(_free_folder(Path("runs") / out.name))]
    return shlex.join(words)


def _free_folder(folder: Path) -> Path:
    """`folder`, with a number appended if it exists."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())
