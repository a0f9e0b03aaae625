"""A tokenizer's files in Hugging Face's format: finding, opening and writing them.

GPT-2's and the bytes of `byte` are written as byte-level BPE, the latter without merges, and are
recognized in any folder; other tokenizers keep the files that they were read from.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxgpt.data.hub import download_repository, is_repository
from jaxgpt.data.tokenizer import (
    EOT_TEXT,
    ByteTokenizer,
    Tokenizer,
    byte_characters,
    gpt2_merges,
    load_tokenizer,
)
from jaxgpt.data.tokenizer_json import (
    FILES,
    MAIN_FILE,
    JsonTokenizer,
    bpe_json,
    open_json_tokenizer,
)
from jaxgpt.errors import UserError
from jaxgpt.files import read_file

RECOGNIZED = {"gpt2": (50_257, 50_304), "byte": (257,)}  # their ids, and rows when padded
SAME_AS_GPT2 = ("gpt2", "r50k_base")  # two names for the same vocabulary


def find_tokenizer(name: str, beside: Iterable[Path]) -> Tokenizer | None:
    """The tokenizer of a folder, a file or the Hub; None if `name` can only be tiktoken's.

    As `load_tokenizer`. Raises UserError.
    """
    import tiktoken

    for folder in beside:
        # tiktoken's are not copied: a copy beside them is of an earlier command's tokenizer.
        if (folder / MAIN_FILE).is_file() and name not in tiktoken.list_encoding_names():
            return open_json_tokenizer(folder, name)
    path = Path(os.path.expanduser(name))
    if path.exists():
        return open_tokenizer(path, name)
    if name == "char":
        raise UserError(
            "tokenizer 'char' is made of a text: python -m jaxgpt.prepare TEXT --tokenizer char; "
            "train on its folder without --tokenizer"
        )
    if is_repository(name):
        instead = f"name a folder with its {MAIN_FILE}"
        return open_tokenizer(download_repository(name, (*FILES, "vocab.json"), instead), name)
    if "/" in name or name.endswith(".json"):
        raise UserError(
            f"tokenizer {name!r}: no such folder or file; name a folder with {MAIN_FILE}, "
            "owner/name on the Hugging Face Hub, gpt2, byte or char"
        )
    return None


def open_tokenizer(path: Path, name: str | None = None) -> Tokenizer:
    """The tokenizer in a Hugging Face folder, or of a tokenizer.json and the files beside it.

    'gpt2' or 'byte' if it is one of these; `name`, for messages and records, is by default the
    path. Raises UserError if there is none, or if it has no end-of-text token.
    """
    folder = path.parent if path.name == MAIN_FILE else path
    if folder.is_dir() and (known := recognize_tokenizer(folder, 0)):
        return load_tokenizer(known)
    return open_json_tokenizer(path, name or str(path))


def has_files(tokenizer: Tokenizer) -> bool:
    """Whether `write_tokenizer` supports this tokenizer: all but tiktoken's newer ones."""
    return isinstance(tokenizer, JsonTokenizer) or is_byte_level(tokenizer)


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether it is GPT-2's or the bytes, whose files are made here."""
    return isinstance(tokenizer, ByteTokenizer) or tokenizer.name in SAME_AS_GPT2


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json into `folder`.

    Of a tokenizer that is not ours, the files that it was read from.
    """
    assert has_files(tokenizer), tokenizer.name
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer.save(folder)
        return
    ids = vocabulary(tokenizer)
    is_gpt2 = tokenizer.name in SAME_AS_GPT2
    merges = gpt2_merges() if is_gpt2 else []
    _write(folder / "vocab.json", json.dumps(ids))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    main = bpe_json(
        ids,
        tokenizer.eot,
        merges,
        pre_tokenizer={**byte_level, "trim_offsets": True},
        post_processor={**byte_level, "trim_offsets": False},
        decoder={**byte_level, "trim_offsets": True},
    )
    _write(folder / MAIN_FILE, main.decode())
    config = {
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOT_TEXT),
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Every token as written in GPT-2's files, with its id."""
    characters = byte_characters()
    ids = {}
    for id in range(tokenizer.n_vocab):
        piece = tokenizer.decode_bytes([id])
        text = EOT_TEXT if id == tokenizer.eot else "".join(characters[byte] for byte in piece)
        ids[text] = id
    return ids


def recognize_tokenizer(folder: Path, n_vocab: int) -> str | None:
    """Our name for the tokenizer in a Hugging Face folder, None if it encodes some text otherwise.

    Without tokenizer files `n_vocab`, the rows of the embedding, decides: GPT-2's 50,257, possibly
    padded to 50,304, or the 257 of bytes.
    """
    found = _vocabularies_in(folder)
    if not found:
        return next((name for name, sizes in RECOGNIZED.items() if n_vocab in sizes), None)
    for name, (size, *_) in RECOGNIZED.items():
        if {len(ids) for ids in found} == {size}:
            known = vocabulary(load_tokenizer(name))
            return name if all(ids == known for ids in found) else None
    return None


def _vocabularies_in(folder: Path) -> list[dict[str, int]]:
    """The vocabulary in each of the folder's files, {} for a file that has none."""
    found = []
    for name in ("vocab.json", "tokenizer.json"):
        try:
            values = json.loads(read_file(folder / name))
            found.append(dict(values) if name == "vocab.json" else _vocabulary_of(values))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.append({})  # another format, or corrupt: n_vocab must not decide
    return found


def _vocabulary_of(tokenizer_json: dict[str, Any]) -> dict[str, int]:
    """All tokens except special ones, which no text encodes to, but with the end of text."""
    added = tokenizer_json["added_tokens"]
    special = {token["content"] for token in added if token["special"]} - {EOT_TEXT}
    ids = {**tokenizer_json["model"]["vocab"], **{t["content"]: t["id"] for t in added}}
    return {text: id for text, id in ids.items() if text not in special}


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")
