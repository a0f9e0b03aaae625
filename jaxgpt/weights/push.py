"""Uploads an exported model to the Hugging Face Hub."""

from pathlib import Path

from jaxgpt.config.checks import ConfigError
from jaxgpt.errors import first_line


def check_login(repository: str) -> None:
    """Raises ConfigError if `repository` is not owner/name, or nobody is logged in."""
    import huggingface_hub

    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise ConfigError(f"--push {repository} must be owner/name on the Hugging Face Hub")
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"--push {repository}: you are not logged in to the Hub; run hf auth login, or set "
            "HF_TOKEN"
        )


def push(repository: str, files: list[Path], card: str) -> str:
    """Upload files, or all files of a folder, and the model card in one commit; returns its URL.

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
        raise ConfigError(
            f"--push {repository}: the model is complete in {files[0].parent}, but uploading it "
            f"failed ({type(error).__name__}: {first_line(error)}); upload it with hf upload "
            f"{repository} {files[0].parent}"
        ) from None
    return info.commit_url
