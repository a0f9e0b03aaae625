"""Any tokenizer in Hugging Face's format, tokenizer.json, through the `tokenizers` library.

The end-of-text token is the tokenizer's eos token, which its other files name. No other special
token is ever produced: `<|im_start|>` in a text is text, and nothing is put around a text.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.tokenizer import EOT_TEXT, Tokenizer, byte_characters
from jaxgpt.errors import UserError, first_line
from jaxgpt.files import FormatError, atomic_write, decode_json, read_file

MAIN_FILE = "tokenizer.json"
# What is copied with it. The first ones that name the eos token decide.
OTHER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
FILES = (MAIN_FILE, *OTHER_FILES, "chat_template.jinja")

# The eos tokens of widespread tokenizers, for a tokenizer.json without other files.
KNOWN_EOS = (EOT_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")

MOST_IDS = 1 << 24  # the largest known vocabularies have a million
UNKNOWN = "\ufffd"  # what a character becomes that a character tokenizer does not have
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's, for bytes without another token


@dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A tokenizer.json; `sha256` covers what decides the ids of a text."""

    files: Mapping[str, bytes] = field(repr=False, compare=False)  # by name, as they were read

    @cached_property
    def library(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return _build(self.files[MAIN_FILE])

    def __getstate__(self) -> dict[str, Any]:
        # Special tokens would become special again in the copy of the library's object.
        return {name: value for name, value in vars(self).items() if name in FIELDS}

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        if self._id_of_character is not None:
            return super().encode_documents(texts)
        try:
            encoded = self._encode_batch(list(texts))
        except UnicodeEncodeError:
            return super().encode_documents(texts)
        ids: list[int] = []
        for one in encoded:
            ids.append(self.eot)
            ids += one.ids
        return np.array(ids, self.dtype)

    def _encode(self, text: str) -> np.ndarray:
        if self._id_of_character is not None:
            points = np.frombuffer(text.encode("utf-32-le"), "<u4")
            return self._id_of_character[points].astype(self.dtype)
        (one,) = self._encode_batch([text])
        return np.array(one.ids, self.dtype)

    def _encode_batch(self, texts: list[str]) -> Any:
        try:
            return self.library.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what the library raises for a lone surrogate
            "".join(texts).encode()
            raise
        except Exception as error:
            if type(error) is not Exception:  # the library's own are bare
                raise
            raise UserError(
                f"tokenizer {self.name!r}: {first_line(error)}; correct its {MAIN_FILE}"
            ) from None

    @cached_property
    def pieces(self) -> list[bytes] | None:
        """The bytes of each id; None for a tokenizer whose ids have bytes only in context."""
        values = self._values
        decoder = values.get("decoder") or {"type": "Fuse"}
        if decoder["type"] not in ("ByteLevel", "Fuse"):
            return None
        added = {token["id"] for token in values.get("added_tokens", [])}
        byte_of = {character: byte for byte, character in byte_characters().items()}
        pieces = [b""] * self.n_vocab
        for token, id in self.library.get_vocab(with_added_tokens=True).items():
            is_bytes = decoder["type"] == "ByteLevel" and id not in added
            if is_bytes and all(character in byte_of for character in token):
                pieces[id] = bytes(byte_of[character] for character in token)
            else:
                pieces[id] = token.encode()
        return pieces

    @property
    def decodes_bytes(self) -> bool:
        return self.pieces is not None

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        if self.pieces is None:
            return str(self.library.decode(list(map(int, ids)), skip_special_tokens=False)).encode()
        return b"".join(self.pieces[int(id)] for id in ids)

    def byte_lengths(self) -> np.ndarray:
        if self.pieces is not None:
            return super().byte_lengths()
        # After another token, because the first one of a text may lose its space.
        known = self.library.get_vocab(with_added_tokens=True)
        before = int(self.encode("a")[-1])
        alone = len(self.decode_bytes([before]))
        lengths = np.zeros(self.n_vocab, np.int64)
        for token, id in known.items():
            is_byte = BYTE_TOKEN.fullmatch(token)
            lengths[id] = 1 if is_byte else len(self.decode_bytes([before, id])) - alone
        lengths[self.eot] = 0
        return lengths

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            path = folder / name
            if not path.exists() or read_file(path) != content:
                with atomic_write(path) as file:
                    file.write(content)

    @cached_property
    def _values(self) -> dict[str, Any]:
        return dict(json.loads(self.files[MAIN_FILE]))

    @cached_property
    def _id_of_character(self) -> np.ndarray | None:
        """The id of each code point, if every token is a character: (1,114,112,) int64.

        NumPy then encodes a hundred times faster than the library, which searches for merges.
        """
        values, model = self._values, self._values["model"]
        is_plain = not any(values.get(name) for name in ("normalizer", "pre_tokenizer"))
        ordinary = [t for t in values.get("added_tokens", []) if not t["special"]]
        characters = model["vocab"] if model.get("type") == "BPE" else {}
        unknown = characters.get(model.get("unk_token"))
        is_plain = is_plain and not ordinary and not model.get("merges") and unknown is not None
        if not is_plain or any(len(token) != 1 for token in characters):
            return None
        table = np.full(0x110000, unknown)
        table[list(map(ord, characters))] = list(characters.values())
        return table


FIELDS = tuple(JsonTokenizer.__dataclass_fields__)


def open_json_tokenizer(path: Path, name: str) -> JsonTokenizer:
    """The tokenizer in a folder, or in a tokenizer.json with the files beside it.

    Raises UserError if there is none, or if it has no end-of-text token.
    """
    main = path / MAIN_FILE if path.is_dir() else path
    try:
        files = {MAIN_FILE: read_file(main)}
        for other in FILES[1:]:
            if (main.parent / other).is_file():
                files[other] = read_file(main.parent / other)
    except FileNotFoundError:
        raise UserError(
            f"tokenizer {name!r}: {path} has no {MAIN_FILE}; make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    except OSError as error:
        raise UserError(
            f"tokenizer {name!r}: {main} cannot be read ({error.strerror}); copy it again"
        ) from None
    return tokenizer_from_files(files, name)


def tokenizer_from_files(files: Mapping[str, bytes], name: str) -> JsonTokenizer:
    """The tokenizer of these files, by name. Raises UserError as `open_json_tokenizer` does."""
    try:
        values = json.loads(files[MAIN_FILE])
        library = _build(files[MAIN_FILE])
        sha256 = _hash(values)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(
            f"tokenizer {name!r}: its {MAIN_FILE} cannot be read ({first_line(error)}); copy it "
            "again"
        ) from None
    ids = library.get_vocab(with_added_tokens=True)
    eot = _find_eos(files, ids, name)
    if eot is None:
        raise UserError(
            f"tokenizer {name!r}: no file names its end-of-text token; write it into "
            'tokenizer_config.json beside it: {"eos_token": "..."}'
        )
    if (last := max(ids.values())) >= MOST_IDS:
        raise UserError(
            f"tokenizer {name!r}: a token has id {last:,}, and at most {MOST_IDS:,} ids are "
            "supported; choose another tokenizer"
        )
    return JsonTokenizer(name, last + 1, eot, sha256, files)


def _build(content: bytes) -> Any:
    # Workers are processes, one per core; the library's own threads would only get in their way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    library = tokenizers.Tokenizer.from_str(content.decode())
    library.encode_special_tokens = True  # as text
    library.no_truncation()
    library.no_padding()
    return library


def _find_eos(files: Mapping[str, bytes], ids: Mapping[str, int], name: str) -> int | None:
    known = set(ids.values())
    for file in OTHER_FILES:
        try:
            values = decode_json(files.get(file, b"{}"), dict[str, Any])
        except FormatError as error:
            raise UserError(
                f"tokenizer {name!r}: its {file} cannot be read ({error}); copy it again"
            ) from None
        token = values.get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            return ids[text]
        number = values.get("eos_token_id")
        first = number[0] if isinstance(number, list) and number else number
        if type(first) is int and first in known:
            return first
    return next((ids[text] for text in KNOWN_EOS if text in ids), None)


def _hash(values: dict[str, Any]) -> str:
    """SHA-256 of what decides the ids of a text, however the file is laid out."""
    model = dict(values["model"])
    # Older versions of the library write a merge as one string.
    model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    added = [[t["id"], t["content"], t["special"]] for t in values.get("added_tokens", [])]
    decisive = [values.get("normalizer"), values.get("pre_tokenizer"), model, sorted(added)]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def bpe_json(
    vocab: Mapping[str, int],
    eot: int,
    merges: Sequence[str] = (),
    unk_token: str | None = None,
    **parts: Any,
) -> bytes:
    """A tokenizer.json of a BPE and the end of text; `parts`: its decoder, pre_tokenizer, ..."""
    added = {"id": eot, "content": EOT_TEXT, "special": True, "normalized": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": vocab,
        "merges": merges,
    }
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**added, "single_word": False, "lstrip": False, "rstrip": False}],
        **dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor")),
        **parts,
        "model": model,
    }
    return json.dumps(values, indent=1).encode()


def with_config(main: bytes, **config: object) -> dict[str, bytes]:
    """The files of a tokenizer.json that has EOT_TEXT, for `tokenizer_from_files`."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOT_TEXT,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    return {MAIN_FILE: main, "tokenizer_config.json": json.dumps(config, indent=1).encode()}


def character_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """Ids for the characters in code point order, one for all others, one for the end of text."""
    known = {c for c in characters if not "\ud800" <= c <= "\udfff"} - {UNKNOWN}
    vocabulary = [*sorted(known), UNKNOWN]
    ids = {character: id for id, character in enumerate(vocabulary)}
    main = bpe_json(ids, len(ids), unk_token=UNKNOWN, decoder={"type": "Fuse"})
    return tokenizer_from_files(with_config(main, unk_token=UNKNOWN), "char")
