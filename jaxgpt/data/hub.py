"""Models and tokenizers on the Hugging Face Hub: their names, and their files."""

from collections.abc import Sequence
from pathlib import Path

from jaxgpt.errors import UserError, first_line


def is_repository(name: str) -> bool:
    """Whether `name` has the form owner/name, and not that of a path: /, ./ or ~/ at its start."""
    return name.strip("/") == name and name.count("/") == 1 and not name.startswith((".", "~"))


def download_repository(repository: str, patterns: Sequence[str], instead: str) -> Path:
    """The local copy of those files of a repository that match `patterns`.

    Raises UserError, which names what to do `instead`.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[*patterns]))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{repository} is not in the local cache, and the Hub cannot be reached; connect to "
            f"a network (HF_ENDPOINT sets a mirror), or {instead}"
        ) from None
    except Exception as error:  # its own and the HTTP library's
        raise UserError(
            f"{repository} cannot be downloaded ({type(error).__name__}: {first_line(error)}); "
            f"check the name, or {instead}"
        ) from None
