"""Finds a Hugging Face model, local or on the Hub, and reads its architecture and tokenizer.

Nothing here imports JAX, so that a wrong name or folder is reported at once.
"""

import dataclasses
from pathlib import Path

from jaxgpt.config.architecture import ModelConfig
from jaxgpt.config.checks import ConfigError
from jaxgpt.config.resolved import padded_vocab_size
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.data.tokenizer_files import open_tokenizer, recognize_tokenizer
from jaxgpt.data.tokenizer_json import FILES as TOKENIZER_FILES
from jaxgpt.errors import first_line
from jaxgpt.files import user_path
from jaxgpt.weights import huggingface

# Short names, from before the Hub's models had owners.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "vocab.json", *TOKENIZER_FILES]


def find_folder(init_from: str) -> Path:
    """The local folder of a model: `init_from` itself, or its copy from the Hub.

    Raises:
        ConfigError: if there is no such folder or model, or it cannot be downloaded.
    """
    path = user_path(init_from, "--init-from")
    if path.is_dir():
        return path
    is_name = init_from.count("/") == 1 and not init_from.startswith(("/", ".", "~"))
    if init_from not in GPT2_NAMES and not is_name:
        raise ConfigError(
            f"--init-from {init_from}: no such folder; a model on the Hub is one of "
            f"{', '.join(GPT2_NAMES)}, or owner/name"
        )
    return _download(f"openai-community/{init_from}" if init_from in GPT2_NAMES else init_from)


def read_folder(folder: Path) -> tuple[ModelConfig, Tokenizer]:
    """The architecture of a Hugging Face folder, with our padded vocabulary, and its tokenizer.

    Raises:
        UserError: if its model or its tokenizer is not supported.
    """
    cfg = huggingface.read_model_config(folder)
    rows = cfg.vocab_size or 0
    name = recognize_tokenizer(folder, rows)
    tokenizer = load_tokenizer(name) if name else open_tokenizer(folder)
    if rows < tokenizer.n_vocab:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.n_vocab:,} ids, but its vocab_size is only "
            f"{rows:,}; its files are from different models"
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
            f"{repository} is not in the local cache, and the Hub cannot be reached; connect to "
            "a network (HF_ENDPOINT sets a mirror), or give a folder: --init-from FOLDER"
        ) from None
    except Exception as error:  # its own and the HTTP library's
        raise ConfigError(
            f"{repository} cannot be downloaded ({type(error).__name__}: {first_line(error)}); "
            "check the name, or give a folder with config.json and model.safetensors"
        ) from None
