"""Export a run's model: `python -m jaxgpt.export --out-dir runs/24gb --to FOLDER or FILE.gguf`.

A folder is for transformers and vLLM, a .gguf file for llama.cpp and Ollama. Both are written
atomically, and need neither jaxgpt nor the run.
"""

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.flag_types import PathIfSet, TextIfSet, unless_none
from jaxgpt.data.tokenizer_files import has_files, write_tokenizer
from jaxgpt.errors import make_main, warn
from jaxgpt.files import user_path
from jaxgpt.run.integrity import read_manifest
from jaxgpt.run.retention import FOLDER, check_outside_checkpoints
from jaxgpt.weights import hub, huggingface
from jaxgpt.weights.gguf_file import (
    GgufDtype,
    modelfile_of,
    require_gguf,
    save_gguf,
    save_modelfile,
)
from jaxgpt.weights.model_card import model_card
from jaxgpt.weights.source import Weights, WeightsFlags, open_weights, prepare_device

PROG = "python -m jaxgpt.export"
DEFAULT_DTYPE: GgufDtype = "f16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """What to export, and where to."""

    out_dir: PathIfSet = None  # the run to export
    # the folder to write, which must be new or empty, or a new file that ends in .gguf
    to: PathIfSet = None
    # latest (the newest that is intact), best (by validation loss), or a step
    checkpoint: str = "latest"
    # dtype of the matrices in a .gguf file; if unset, f16 (a folder has float32)
    dtype: Annotated[
        GgufDtype | None, arg(metavar="{f32,f16,bf16,q8_0}", help_behavior_hint=unless_none)
    ] = None
    push: TextIfSet = None  # owner/name on the Hugging Face Hub, to upload the result to

    def errors(self) -> list[str]:
        errors = self.weights().errors() if self.out_dir else ["specify the run: --out-dir RUN"]
        if self.to is None:
            errors.append("specify what to write: --to FOLDER, or --to FILE.gguf")
        elif self.dtype is not None and not self.is_gguf:
            errors.append(f"--dtype {self.dtype} is for .gguf files: --to {self.to}.gguf")
        return errors

    @property
    def is_gguf(self) -> bool:
        return self.to is not None and self.to.suffix == ".gguf"

    def weights(self) -> WeightsFlags:
        return WeightsFlags(out_dir=self.out_dir, checkpoint=self.checkpoint)


def run(argv: Sequence[str]) -> int:
    """Parse the flags, open and load the weights, write and upload them, print what to do next."""
    flags = cli.parse_command(
        argv,
        ExportFlags,
        prog=PROG,
        description="Export a run's model for transformers, vLLM, llama.cpp or Ollama.",
    )
    assert flags.out_dir is not None
    assert flags.to is not None
    target = user_path(flags.to, "--to")
    # "." has no name, and is gone once it is replaced; `resolve` fails in a loop of links
    real_target = Path(os.path.realpath(target))
    check_is_free(target)
    if flags.is_gguf:
        check_is_free(modelfile_of(target))
    if flags.push is not None:
        hub.check_login(flags.push)
    weights = open_weights(flags.weights())
    assert weights.run is not None
    if flags.is_gguf:
        require_gguf(weights.tokenizer)
    device, _ = prepare_device("cpu", "float32")
    params = weights.load(device)
    checkpoint = user_path(flags.out_dir, "--out-dir") / FOLDER / str(weights.step)
    data = read_manifest(checkpoint).data
    card = model_card(
        weights, weights.run, data, library="gguf" if flags.is_gguf else "transformers"
    )
    try:
        if flags.is_gguf:
            files = write_gguf(target, weights, params, flags.dtype or DEFAULT_DTYPE)
        else:
            files = write_folder(real_target, weights, params, card)
    except OSError as error:
        raise ConfigError(f"--to {target} cannot be written: {error}") from None
    print_exported(target, weights, flags.is_gguf)
    if flags.push is not None:
        print(f"Uploaded: {hub.push(flags.push, real_target, files, card)}")
    return 0


def check_is_free(target: Path) -> None:
    """Raises ConfigError for a folder that is not empty, a file, or a place within a checkpoint."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target} already exists; choose another name")
    try:
        check_outside_checkpoints(target)
    except OSError as error:
        raise ConfigError(f"--to {target}: {error}") from None


def write_folder(folder: Path, weights: Weights, params: Any, card: str) -> list[Path]:
    """Write the complete folder, a real path, under a temporary name, then rename it.

    Returns its files. Raises OSError.
    """
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
    return sorted(folder.iterdir())


def write_gguf(path: Path, weights: Weights, params: Any, dtype: GgufDtype) -> list[Path]:
    """Write the .gguf file and a Modelfile beside it; returns both. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fallen_back = save_gguf(path, weights.model, params, weights.tokenizer, dtype)
    if weights.model.gelu == "erf":
        warn(
            "llama.cpp has only the tanh GELU; this model has the exact one, so logits will differ"
        )
    if fallen_back:
        warn(
            f"{len(fallen_back)} tensors are f16, because q8_0 needs rows of a multiple of 32: "
            f"{', '.join(fallen_back[:3])}, ..."
        )
    return [path, save_modelfile(path)]


def print_exported(target: Path, weights: Weights, is_gguf: bool) -> None:
    """Print what was written, and two ways to load it."""
    padding = weights.model.padding_parameters
    print(
        f"{weights.name}: {weights.model.describe_parameters()}, written to {target}"
        + (", the padding left out" if padding else "")
    )
    # A name without a slash could be that of a model on the Hub.
    path = str(target if target.is_absolute() else f"./{target}")
    commands = [
        f"python -m jaxgpt.sample --init-from {shlex.quote(path)}",
        f'transformers.AutoModelForCausalLM.from_pretrained("{path}")',
    ]
    if is_gguf:
        files = (target.stem, target, modelfile_of(target))
        name, model, modelfile = (shlex.quote(str(file)) for file in files)
        commands = [
            f"ollama create {name} -f {modelfile} && ollama run {name}",
            f'llama-completion -m {model} -no-cnv -p "Once upon a time"'
            "    # before December 2025: llama-cli",
        ]
    elif not has_files(weights.tokenizer):
        name = weights.tokenizer.name
        print(f"The folder has no tokenizer files: those of {name} cannot be exported.")
    print("\n  ".join(["Next:", *commands]))


main = make_main(PROG, run)

if __name__ == "__main__":
    sys.exit(main())
