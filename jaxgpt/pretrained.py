"""Weights from elsewhere: found, checked, and made the start of a run.

Nothing here but `load_like` needs JAX, so that a wrong name or folder is answered at once.
"""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxgpt.config import Config, ConfigError, ModelConfig, flat_values, with_fields
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer, padded_vocab_size
from jaxgpt.data.tokenizer_files import RECOGNIZED, recognize_tokenizer
from jaxgpt.model import huggingface

# Names that everybody uses for what has an owner now.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "tokenizer.json"]


def start_from(
    cfg: Config, saved: Config | None, given: Collection[str]
) -> tuple[Config, Path | None]:
    """`cfg` with the architecture of the weights it starts from, and their folder.

    Without --init-from `cfg` is as it was. A run that goes on, `saved`, has its weights in its
    checkpoints and its architecture in its configuration; then there is no folder. `given` are
    the names of the flags that were typed.

    Raises:
        UserError: if there are no such weights, or a flag asks for another architecture.
    """
    init_from = cfg.init_from or (saved.init_from if saved else None)
    if init_from is None:
        return cfg, None
    cfg = with_fields(cfg, init_from=init_from)
    if saved is not None and saved.init_from == init_from:
        return _with_architecture(cfg, saved.model, saved.tokenizer, given), None
    folder = find_folder(init_from)
    model, tokenizer = read_folder(folder)
    return _with_architecture(cfg, model, tokenizer.name, given), folder


def load_like(folder: Path, model: ModelConfig, like: Any) -> Any:
    """The weights in `folder` as parameters of `model`, placed as those of `like` are."""
    import jax

    params = huggingface.load_params(folder, model)
    # Copies, because a training step donates them.
    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding, may_alias=False), params, like
    )


def read_folder(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The architecture of a Hugging Face folder, its vocabulary padded as ours is.

    Raises:
        UserError: if it is another kind of model, or has a tokenizer that there is none of here.
    """
    cfg = huggingface.read_model_config(folder)
    rows = cfg.vocab_size or 0
    name = recognize_tokenizer(folder, rows)
    if name is None:
        raise ConfigError(
            f"{folder}: its tokenizer, of {rows:,} ids, is none of {' and '.join(RECOGNIZED)}; "
            "jaxgpt has no other that Hugging Face's files are read for"
        )
    tokenizer = load_tokenizer(name)
    if rows < tokenizer.n_vocab:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.n_vocab:,} ids and its vocab_size is {rows:,}"
        )
    vocab_size = padded_vocab_size(rows)
    return dataclasses.replace(cfg, vocab_size=vocab_size, n_vocab=tokenizer.n_vocab), tokenizer


def find_folder(init_from: str) -> Path:
    """The local folder of a model: itself, or its copy from the Hub, downloaded if need be.

    Raises:
        ConfigError: if there is no such folder or model, or it cannot be downloaded.
    """
    path = Path(os.path.expanduser(init_from))
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            raise ConfigError(
                f"--init-from {init_from} is a run; take its weights out first: "
                f"python -m jaxgpt.export --out-dir {init_from} --to FOLDER"
            )
        return path
    is_name = init_from.count("/") == 1 and not init_from.startswith(("/", ".", "~"))
    if init_from not in GPT2_NAMES and not is_name:
        raise ConfigError(
            f"--init-from {init_from}: no such folder, and it is none of {', '.join(GPT2_NAMES)}"
        )
    return _download(f"openai-community/{init_from}" if init_from in GPT2_NAMES else init_from)


def _with_architecture(
    cfg: Config, model: ModelConfig, tokenizer: str, given: Collection[str]
) -> Config:
    asked = flat_values(cfg)
    names = ("n_layer", "n_head", "n_embd", "bias", "gelu", "vocab_size")
    found = {**{name: getattr(model, name) for name in names}, "tokenizer": tokenizer}
    faults = [
        f"--{name.replace('_', '-')} {asked[name]}: the weights of {cfg.init_from} have "
        f"{found[name]}; leave it out"
        for name in found
        if name in given and asked[name] not in (found[name], None)
    ]
    if "block_size" in given and asked["block_size"] > model.block_size:
        faults.append(
            f"--block-size {asked['block_size']}: the weights of {cfg.init_from} have positions "
            f"for {model.block_size} tokens; it may be shorter, not longer"
        )
    if faults:
        raise ConfigError("\n".join(faults))
    block_size = min(cfg.model.block_size, model.block_size)
    return with_fields(cfg, **found, n_vocab=model.n_vocab, block_size=block_size)


def _download(repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{repository} is not in the local cache, and the Hub cannot be reached; try again "
            "with a network (HF_ENDPOINT names a mirror), or give a folder: --init-from FOLDER"
        ) from None
    except Exception as fault:  # those of its HTTP library among them
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise ConfigError(
            f"{repository} cannot be downloaded ({type(fault).__name__}: {reason[:200]}); check "
            "the name, or give a folder that has config.json and model.safetensors"
        ) from None
