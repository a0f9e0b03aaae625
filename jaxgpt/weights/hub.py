"""Models that others publish, local or on the Hugging Face Hub, and the upload of one's own.

Nothing here imports JAX, so that a wrong name or folder is reported at once.
"""

import dataclasses
import shlex
from pathlib import Path

from jaxgpt.config.architecture import ModelConfig, padded_vocab_size
from jaxgpt.config.checks import ConfigError
from jaxgpt.data.hub import download_repository, is_repository
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
        UserError: if there is no such folder or model, or it cannot be downloaded.
    """
    path = user_path(init_from, "--init-from")
    if path.is_dir():
        return path
    if init_from not in GPT2_NAMES and not is_repository(init_from):
        raise ConfigError(
            f"--init-from {init_from}: no such folder; a model on the Hub is one of "
            f"{', '.join(GPT2_NAMES)}, or owner/name"
        )
    repository = f"openai-community/{init_from}" if init_from in GPT2_NAMES else init_from
    instead = "give a folder with config.json and model.safetensors: --init-from FOLDER"
    return download_repository(repository, FILES, instead)


def read_folder(folder: Path, name: str) -> tuple[ModelConfig, Tokenizer]:
    """The architecture of a Hugging Face folder, with our padded vocabulary, and its tokenizer.

    `name`: the folder or repository; a tokenizer that is not recognized is named after it.

    Raises:
        UserError: if its model or its tokenizer is not supported.
    """
    cfg = huggingface.read_model_config(folder)
    rows = cfg.vocab_size or 0
    known = recognize_tokenizer(folder, rows)
    tokenizer = load_tokenizer(known) if known else open_tokenizer(folder, name)
    if rows < tokenizer.n_vocab:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.n_vocab:,} ids, but its vocab_size is only "
            f"{rows:,}; its files are from different models"
        )
    vocab_size = padded_vocab_size(rows)
    return dataclasses.replace(cfg, vocab_size=vocab_size, n_vocab=tokenizer.n_vocab), tokenizer


def check_login(repository: str) -> None:
    """Raises ConfigError if `repository` is not owner/name, or nobody is logged in."""
    import huggingface_hub

    if not is_repository(repository):
        raise ConfigError(f"--push {repository} must be owner/name on the Hugging Face Hub")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"--push {repository}: you are not logged in to the Hub; run hf auth login, or set "
            "HF_TOKEN"
        )


def push(repository: str, target: Path, files: list[Path], card: str) -> str:
    """Upload `files` of the export `target` and the model card in one commit; returns its URL.

    The repository is created, public, if it does not exist.

    Raises:
        ConfigError: if the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    add = huggingface_hub.CommitOperationAdd
    operations = [add(path.name, path) for path in files if path.name != "README.md"]
    operations.append(add("README.md", card.encode(errors="replace")))
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        info = api.create_commit(repository, operations, commit_message="Upload from jaxgpt")
    except Exception as error:  # its own and the HTTP library's
        paths = [target] if target.is_dir() else files
        commands = " && ".join(f"hf upload {repository} {shlex.quote(str(p))}" for p in paths)
        raise ConfigError(
            f"--push {repository}: {target} is complete, but uploading it failed "
            f"({type(error).__name__}: {first_line(error)}); upload it with {commands}"
        ) from None
    return info.commit_url
