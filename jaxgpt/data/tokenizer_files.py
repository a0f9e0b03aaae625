"""A tokenizer's files in Hugging Face's format: writing them, and recognizing our tokenizers.

All are byte-level BPE: GPT-2's with its merges, bytes without merges.
"""

import json
from pathlib import Path
from typing import Any

from jaxgpt.data.tokenizer import (
    BYTE_VOCABULARY,
    EOT_TEXT,
    Tokenizer,
    byte_characters,
    gpt2_merges,
    load_tokenizer,
)

RECOGNIZED = ("gpt2", "byte")
SAME_AS_GPT2 = ("gpt2", "r50k_base")  # two names for the same vocabulary


def has_files(tokenizer: Tokenizer) -> bool:
    """Whether `write_tokenizer` supports this tokenizer."""
    return tokenizer.bpe is None or tokenizer.name in SAME_AS_GPT2


def write_tokenizer(folder: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json into `folder`."""
    assert has_files(tokenizer), tokenizer.name
    ids = vocabulary(tokenizer)
    merges = [] if tokenizer.bpe is None else gpt2_merges()
    _write(folder / "vocab.json", json.dumps(ids))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    _write(folder / "tokenizer.json", json.dumps(_tokenizer_json(ids, merges)))
    config = {
        "tokenizer_class": "GPT2Tokenizer"
        if tokenizer.bpe is not None
        else "PreTrainedTokenizerFast",
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
        piece = BYTE_VOCABULARY[id] if tokenizer.bpe is None else tokenizer.decode_bytes([id])
        text = EOT_TEXT if id == tokenizer.eot else "".join(characters[byte] for byte in piece)
        ids[text] = id
    return ids


def recognize_tokenizer(folder: Path, n_vocab: int) -> str | None:
    """Our name for the tokenizer in a Hugging Face folder, None if it is not one of ours.

    Without tokenizer files `n_vocab`, the rows of the embedding, decides: GPT-2's 50,257, possibly
    padded to 50,304, or the 257 of bytes.
    """
    found = _vocabulary_in(folder)
    if found is None:
        return {50_257: "gpt2", 50_304: "gpt2", 257: "byte"}.get(n_vocab)
    for name in RECOGNIZED:
        ids = vocabulary(load_tokenizer(name))
        if all(found.get(text) == id for text, id in ids.items()):
            return name
    return None


def _vocabulary_in(folder: Path) -> dict[str, int] | None:
    """The vocabulary in the folder's files: {} if they have none, None if there are no files."""
    found: dict[str, int] | None = None
    for name in ("vocab.json", "tokenizer.json"):
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
            return dict(values) if name == "vocab.json" else _vocabulary_of(values)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            found = {}  # another format, or corrupt: n_vocab must not decide
    return found


def _vocabulary_of(tokenizer_json: dict[str, Any]) -> dict[str, int]:
    added = {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    return {**tokenizer_json["model"]["vocab"], **added}


def _tokenizer_json(ids: dict[str, int], merges: list[str]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    eot = {"id": ids[EOT_TEXT], "content": EOT_TEXT, "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**eot, "single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": {**byte_level, "trim_offsets": False, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")
