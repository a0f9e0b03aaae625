"""Models as Hugging Face folders: found here or on the Hub, and made out.

Nothing here needs JAX, so that a wrong name or folder is answered at once.
"""

import dataclasses
import os
from pathlib import Path

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.resolved import padded_vocab_size
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_files import RECOGNIZED, recognize_tokenizer
from jaxgpt.errors import first_line
from jaxgpt.weights import huggingface

# Names that everybody uses for what has an owner now.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", "tokenizer.json"]


def find_folder(init_from: str) -> Path:
    """The local folder of a model: itself, or its copy from the Hub, downloaded if need be.

    Raises:
        ConfigError: if there is no such folder or model, or it cannot be downloaded.
    """
    path = Path(os.path.expanduser(init_from))
    if path.is_dir():
        return path
    is_name = init_from.count("/") == 1 and not init_from.startswith(("/", ".", "~"))
    if init_from not in GPT2_NAMES and not is_name:
        raise ConfigError(
            f"--init-from {init_from}: no such folder, and it is none of {', '.join(GPT2_NAMES)}"
        )
    return _download(f"openai-community/{init_from}" if init_from in GPT2_NAMES else init_from)


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
    except Exception as error:  # those of its HTTP library among them
        reason = first_line(error)
        raise ConfigError(
            f"{repository} cannot be downloaded ({type(error).__name__}: {reason[:200]}); check "
            "the name, or give a folder that has config.json and model.safetensors"
        ) from None
