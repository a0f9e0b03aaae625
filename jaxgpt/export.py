"""Export a run's model for transformers: `python -m jaxgpt.export --out-dir runs/24gb --to FOLDER`.

The folder is written atomically and needs neither jaxgpt nor the run.
"""

import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.flag_types import PathIfSet
from jaxgpt.data.tokenizer_files import has_files, write_tokenizer
from jaxgpt.errors import run_command
from jaxgpt.files import user_path
from jaxgpt.run.integrity import read_manifest
from jaxgpt.run.retention import FOLDER
from jaxgpt.weights import huggingface
from jaxgpt.weights.model_card import model_card
from jaxgpt.weights.source import Weights, WeightsFlags, open_weights, prepare_device

PROG = "python -m jaxgpt.export"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """What to export, and where to."""

    out_dir: PathIfSet = None  # the run to export
    to: PathIfSet = None  # the folder to write; must be new or empty
    checkpoint: str = "latest"  # latest, best (by validation loss), or a step

    def errors(self) -> list[str]:
        """Every error in the flags, one sentence each."""
        errors = self.weights().errors() if self.out_dir else ["specify the run: --out-dir RUN"]
        if self.to is None:
            errors.append("specify the folder to write: --to FOLDER")
        return errors

    def weights(self) -> WeightsFlags:
        return WeightsFlags(out_dir=self.out_dir, checkpoint=self.checkpoint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(PROG, partial(run, sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Parse the flags, open and load the weights, write the folder, and print what to do next."""
    flags = cli.parse_command(
        argv,
        ExportFlags,
        prog=PROG,
        description="Export a run's model as a folder that transformers loads.",
    )
    assert flags.out_dir is not None
    assert flags.to is not None
    folder = user_path(flags.to, "--to")
    check_is_free(folder)
    weights = open_weights(flags.weights())
    assert weights.run is not None
    device, _ = prepare_device("cpu", "float32")
    params = weights.load(device)
    checkpoint = user_path(flags.out_dir, "--out-dir") / FOLDER / str(weights.step)
    card = model_card(weights, weights.run, read_manifest(checkpoint).data)
    try:
        write_folder(folder, weights, params, card)
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be written: {error}") from None
    print_exported(folder, weights)
    return 0


def check_is_free(folder: Path) -> None:
    """Raises ConfigError if the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to {folder} already exists; name another folder, or delete it")


def write_folder(folder: Path, weights: Weights, params: Any, card: str) -> None:
    """Write the complete folder under a temporary name, then rename it. Raises OSError."""
    folder = folder.resolve()  # "." has no name
    part = folder.with_name(f".jaxgpt-export.{os.getpid()}.tmp")  # a name may have 255 bytes
    part.mkdir(parents=True)
    try:
        huggingface.save_model(part, weights.model, params, weights.tokenizer.eot)
        if has_files(weights.tokenizer):
            write_tokenizer(part, weights.tokenizer, weights.model.block_size)
        (part / "README.md").write_text(card, encoding="utf-8", errors="replace")
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def print_exported(folder: Path, weights: Weights) -> None:
    """Print what was written, and two ways to load it."""
    padding = weights.model.padding_parameters
    print(
        f"{weights.name}: {weights.model.describe_parameters()}, written to {folder}"
        + (", the padding left out" if padding else "")
    )
    if not has_files(weights.tokenizer):
        name = weights.tokenizer.name
        print(f"The folder has no tokenizer files: those of {name} cannot be exported.")
    # A name without a slash could be that of a model on the Hub.
    path = folder if folder.is_absolute() else f"./{folder}"
    print(
        f"Next:\n  python -m jaxgpt.sample --init-from {path}\n"
        f'  transformers.AutoModelForCausalLM.from_pretrained("{path}")'
    )


if __name__ == "__main__":
    sys.exit(main())
