"""Write a run's model for Hugging Face: `python -m jaxgpt.export --out-dir runs/24gb --to FOLDER`.

The folder appears whole or not at all, and needs neither jaxgpt nor its run any more.
"""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.config import command_line as cli
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.fields import names_with
from jaxgpt.config.flag_types import PathIfSet
from jaxgpt.config.resolved import Resolved
from jaxgpt.config.roles import Role
from jaxgpt.data.tokenizer_files import has_files, write_tokenizer
from jaxgpt.errors import UserError, fail
from jaxgpt.run.integrity import read_manifest
from jaxgpt.run.retention import FOLDER
from jaxgpt.weights.source import Weights, WeightsFlags, huggingface, open_weights, prepare_device

PROG = "python -m jaxgpt.export"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """What to export, and where to."""

    out_dir: PathIfSet = None  # the run whose model is exported
    to: PathIfSet = None  # the folder to write; it must not be there yet, or be empty
    checkpoint: str = "latest"  # which of the run's: latest, best (by validation loss), or a step

    def errors(self) -> list[str]:
        """What is wrong with them, a sentence for each error."""
        errors = self.weights().errors() if self.out_dir else ["--out-dir RUN says what to export"]
        if self.to is None:
            errors.append("--to FOLDER says where to")
        return errors

    def weights(self) -> WeightsFlags:
        return WeightsFlags(out_dir=self.out_dir, checkpoint=self.checkpoint, device="cpu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = cli.parse_command(
        sys.argv[1:] if argv is None else argv,
        ExportFlags,
        prog=PROG,
        description="Write a run's model as a folder that transformers loads.",
    )
    try:
        run(flags)
    except UserError as error:
        fail(PROG, str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def run(flags: ExportFlags) -> None:
    """Read the checkpoint and write the folder."""
    assert flags.to is not None
    folder = flags.to.expanduser()
    check_is_free(folder)
    weights = open_weights(flags.weights())
    assert weights.run is not None
    assert flags.out_dir is not None
    assert weights.step is not None
    device, _ = prepare_device(flags.weights())

    checkpoint = flags.out_dir.expanduser() / FOLDER / str(weights.step)
    data = read_manifest(checkpoint)["data"]
    try:
        write_folder(folder, weights, weights.load(device), model_card(weights, weights.run, data))
    except OSError as error:
        raise ConfigError(f"--to {folder} cannot be written: {error}") from None
    count = weights.model.parameter_count(padding=False)
    print(f"{weights.name}: {count:,} parameters written to {folder}")
    if not has_files(weights.tokenizer):
        print(
            f"without tokenizer files, which are written for gpt2 and byte: {weights.run.tokenizer}"
        )
    print(
        f"Next:\n  python -m jaxgpt.sample --init-from {_as_path(folder)}\n"
        f'  transformers.AutoModelForCausalLM.from_pretrained("{_as_path(folder)}")'
    )


def check_is_free(folder: Path) -> None:
    """Raises ConfigError if something is in the way."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--to {folder} is there already; name another folder, or delete it")


def write_folder(folder: Path, weights: Weights, params: Any, card: str) -> None:
    """Write everything beside `folder` first, and give it its name when it is complete."""
    folder = folder.resolve()  # "." has no name
    part = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    part.mkdir(parents=True)
    try:
        huggingface.save_model(part, weights.model, params, weights.tokenizer.eot)
        if has_files(weights.tokenizer):
            write_tokenizer(part, weights.tokenizer, weights.model.block_size)
        (part / "README.md").write_text(card, encoding="utf-8")
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_card(weights: Weights, run: Resolved, data: dict[str, Any]) -> str:
    """README.md: what the model is, what it was trained on, how well it does, and all settings."""
    m, step = weights.model, weights.step or 0
    loss = "not evaluated at this step"
    if weights.val_loss is not None:
        windows = min(run.eval_windows, (data["val_tokens"] - 1) // m.block_size)
        loss = f"{weights.val_loss:.4f} nats per token on {windows:,} windows"
    source, dataset = "the four Jane Austen novels that come with jaxgpt", run.asked.dataset
    if run.asked.data_dir is not None:  # the folder that was read, whatever --dataset was left at
        dataset = run.asked.data_dir.absolute().name
        source = f"{dataset} (token files)"
    rows = {
        "parameters": f"{m.parameter_count(padding=False):,}",
        "architecture": f"GPT-2: {m.n_layer} layers, {m.n_head} heads, width {m.n_embd}, context "
        f"{m.block_size}, biases {'yes' if m.bias else 'no (exported as zeros)'}, "
        f"{m.gelu} GELU",
        "started from": _without_folder(run.init_from) or "random weights",
        "data": f"{source}, {data['train_tokens']:,} {run.tokenizer} tokens",
        "trained on": f"{step * run.tokens_per_step:,} tokens in {step:,} steps",
        "validation loss": loss,
    }
    if weights.tokenizer.bpe is not None and has_files(weights.tokenizer):
        rows["tokenizer"] = "GPT-2's, by OpenAI under its Modified MIT License"
    settings = {k: v for k, v in run.flat().items() if k not in names_with(Role.LOCAL)}
    settings |= {name: _without_folder(settings[name]) for name in ("preset", "init_from")}
    settings["dataset"] = dataset
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2, jaxgpt]",
        "---",
        "",
        "# A GPT-2 trained with jaxgpt",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "A language model that continues text and has learned to follow no instructions. Whatever "
        "its training text says and leaves out, it says and leaves out too.",
        "",
        "## The configuration it was trained with",
        "",
        "```json",
        json.dumps(settings, indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _without_folder(name: str | None) -> str | None:
    # A file of this machine is called by its name alone.
    return Path(name).name if name and Path(name).is_absolute() else name


def _as_path(folder: Path) -> str:
    # A bare name could be that of a model on the Hub.
    return str(folder) if folder.is_absolute() else f"./{folder}"


if __name__ == "__main__":
    sys.exit(main())
