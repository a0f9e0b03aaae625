"""Text to token ids and back: GPT-2's BPE and plain bytes offline, others in `tokenizer_json.py`.

`encode` never produces the end-of-text token: a literal "<|endoftext|>" in a text is text. Code
that concatenates documents puts `eot` before each.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxgpt.data.embedded import load_embedded
from jaxgpt.data.token_file import token_dtype
from jaxgpt.errors import UserError

if TYPE_CHECKING:
    import requests
    import tiktoken

EOT_TEXT = "<|endoftext|>"

# GPT-2's pattern for splitting text before BPE, in the equivalent, faster form of tiktoken 0.14.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WITH_GPT2_PATTERN = ("gpt2", "r50k_base", "p50k_base", "p50k_edit")  # tiktoken's encodings

# The white space of this pattern; Python's \s has more characters. tiktoken's regex engine fails
# when `\s+(?!\S)` backtracks over a million, so longer texts are searched for runs of it.
WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
SPACE_PROBES = 500_000  # characters between two positions that are searched

# Cutting a long text: characters searched first, cuts tried, characters on each side of a cut.
SEARCHED, CUTS_TRIED, CUT_CONTEXT = 10_000, 100, 100
# The second for scripts without spaces, the third where newlines belong to the word before them.
WORD_ENDS = re.compile(r"(?<=\S)(?=\s)|(?<=\w)(?=\W)|(?<=\n)(?=[^\n])")

BYTE_VOCABULARY = [*(bytes([byte]) for byte in range(256)), EOT_TEXT.encode()]  # by id


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A vocabulary of `n_vocab` ids, the end-of-text id `eot` among them.

    Two tokenizers with the same `sha256` encode every text to the same ids.
    """

    name: str
    n_vocab: int
    eot: int
    sha256: str

    @property
    def dtype(self) -> np.dtype:
        """Of its ids, in memory and in token files."""
        return token_dtype(self.n_vocab)

    @property
    def decodes_bytes(self) -> bool:
        """Whether an id stands for the same bytes wherever it is."""
        return True

    def encode(self, text: str) -> np.ndarray:
        """(tokens,) of `dtype`. A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD."""
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """As `encode`; raises UnicodeEncodeError for a lone surrogate."""

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """(tokens,) of `dtype`: for each text the end-of-text token, then the text's tokens."""
        eot = np.array([self.eot], self.dtype)
        return np.concatenate([part for text in texts for part in (eot, self.encode(text))])

    def cut(self, text: str, start: int, limit: int) -> int:
        """The last end of a word in (start, limit] where a cut leaves the tokens as they are.

        Only the characters around it are encoded to find out. `limit` if there is no such place.
        """
        for near in dict.fromkeys((max(start, limit - SEARCHED), start)):
            ends = [match.end() for match in WORD_ENDS.finditer(text, near, limit)]
            for end in reversed(ends[-CUTS_TRIED:]):
                left, right = (
                    text[max(start, end - CUT_CONTEXT) : end],
                    text[end : end + CUT_CONTEXT],
                )
                apart = [*self.encode(left), *self.encode(right)]
                if end > start and apart == self.encode(left + right).tolist():
                    return end
            if len(ends) >= CUTS_TRIED:  # a search from `start` would try them again
                break
        return limit

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of (tokens,) ids; bytes that are not UTF-8 become U+FFFD.

        Raises UserError for an id that this tokenizer does not have.
        """
        return self.decode_bytes(self.checked(ids)).decode(errors="replace")

    def checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(tokens,) int64 of ids; raises UserError for one that this tokenizer does not have."""
        ids = np.asarray(ids, np.int64)
        foreign = ids[(ids < 0) | (ids >= self.n_vocab)]
        if foreign.size:
            raise UserError(
                f"id {foreign[0]} is not one of the {self.n_vocab:,} ids of tokenizer "
                f"{self.name!r}; use the tokenizer that made the ids"
            )
        return ids

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of valid ids; a token may end in the middle of a UTF-8 character."""

    def byte_lengths(self) -> np.ndarray:
        """(n_vocab,) int64: the number of bytes of text of each id, 0 for `eot`."""
        lengths = [len(self.decode_bytes([id])) for id in range(self.n_vocab)]
        lengths[self.eot] = 0
        return np.array(lengths)

    def save(self, folder: Path) -> None:
        """Write its files into a folder of data or of a run; none if it comes with a package."""
        return


class ByteTokenizer(Tokenizer):
    """UTF-8's bytes, and the end of text."""

    def _encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return b"".join(BYTE_VOCABULARY[id] for id in ids)


@dataclass(frozen=True)
class TiktokenTokenizer(Tokenizer):
    """GPT-2's BPE, and others of tiktoken's."""

    bpe: tiktoken.Encoding = field(repr=False, compare=False)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        # The texts are joined by "<|endoftext|>" and encoded in one call, which is 3 % faster than
        # one call each, unless a text contains that string itself.
        joined = EOT_TEXT + EOT_TEXT.join(texts)
        if joined.count(EOT_TEXT) == len(texts):
            with suppress(UnicodeEncodeError):
                return self.bpe.encode_to_numpy(
                    joined, allowed_special={EOT_TEXT}, disallowed_special=()
                ).astype(self.dtype)
        return super().encode_documents(texts)

    def _encode(self, text: str) -> np.ndarray:
        parts = [
            self.bpe.encode_to_numpy(part, disallowed_special=())
            for part in _cut_long_spaces(text, self.name in WITH_GPT2_PATTERN)
        ]
        return np.concatenate(parts).astype(self.dtype)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        return self.bpe.decode_bytes([int(id) for id in ids])


def load_tokenizer(name: str, *beside: Path) -> Tokenizer:
    """'gpt2' and 'byte' from the package, a folder or file, owner/name of the Hub, or tiktoken's.

    `beside`: folders of data or of a run, which have a copy of their tokenizer if it does not come
    with a package. Raises UserError for an unknown name, and for files that are missing, corrupt or
    cannot be downloaded.
    """
    if name == "byte":
        return ByteTokenizer(name, 257, 256, _hash_vocabulary(BYTE_VOCABULARY))
    if name == "gpt2":
        return _of_tiktoken(name, _build_gpt2())
    from jaxgpt.data.tokenizer_files import find_tokenizer  # imports this module

    if found := find_tokenizer(name, beside):
        return found
    return _of_tiktoken(name, _load_from_tiktoken(name))


def _of_tiktoken(name: str, bpe: tiktoken.Encoding) -> Tokenizer:
    vocabulary = []
    for id in range(bpe.n_vocab):
        try:
            vocabulary.append(bpe.decode_single_token_bytes(id))
        except KeyError:  # the larger vocabularies have gaps before their special tokens
            vocabulary.append(b"")
    return TiktokenTokenizer(name, bpe.n_vocab, bpe.eot_token, _hash_vocabulary(vocabulary), bpe)


def _cut_long_spaces(text: str, has_gpt2_pattern: bool) -> Iterator[str]:
    """A text cut inside long runs of white space, into parts that together have its tokens.

    tiktoken's patterns end a word before the last character of a run that is followed by another
    character, so the text is cut there. Only GPT-2's do so before a line break: in the others it
    belongs to what is before it. cl100k's splits white space at the end of a text otherwise, but
    has no token that joins a line break to what follows.
    """
    start = 0
    for probe in range(SPACE_PROBES, len(text), SPACE_PROBES):
        run = WHITE_SPACE.match(text, probe)
        if run and start < run.end() - 1 and run.end() < len(text):
            cut = run.end() - 1
            if has_gpt2_pattern or text[cut] not in "\r\n":
                yield text[start:cut]
                start = cut
    yield text[start:]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte, in order of rank.

    Printable bytes come first and stand for themselves, then the others, as characters from 256 on
    (`bytes_to_unicode` in OpenAI's gpt-2/src/encoder.py).
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def gpt2_merges() -> list[str]:
    """The merges in vocab.bpe, in order of rank: "Ġ t" merges " " and "t"."""
    return load_embedded("vocab.bpe.xz").decode().splitlines()[1:]


def _build_gpt2() -> tiktoken.Encoding:
    """`tiktoken.get_encoding("gpt2")`, without its cache, environment variables and network.

    The 256 bytes come first in rank, then the merges.
    """
    import tiktoken

    byte_of = {character: byte for byte, character in byte_characters().items()}
    pieces = [bytes([byte]) for byte in byte_of.values()]
    pieces += [bytes(byte_of[char] for char in merge.replace(" ", "")) for merge in gpt2_merges()]
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)},
        special_tokens={EOT_TEXT: len(pieces)},
        explicit_n_vocab=50_257,
    )


def _load_from_tiktoken(name: str) -> tiktoken.Encoding:
    import requests
    import tiktoken

    known = {"byte", "char", *tiktoken.list_encoding_names()}
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known))
        hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
        raise UserError(f"unknown tokenizer {name!r}; {hint}")
    try:
        return tiktoken.get_encoding(name)
    except requests.RequestException as error:
        raise UserError(
            f"tokenizer {name!r} could not be downloaded ({type(error).__name__}); connect to the "
            f"network once, or set TIKTOKEN_CACHE_DIR to a folder with {_cached_name(error)}; "
            "'gpt2' and 'byte' come with jaxgpt"
        ) from None
    except OSError as error:
        raise UserError(
            f"tokenizer {name!r} could not be loaded ({error}); check TIKTOKEN_CACHE_DIR"
        ) from None


def _cached_name(error: requests.RequestException) -> str:
    """tiktoken's name for the file in its cache: the SHA-1 of its URL."""
    if error.request is None:
        return "its files"
    return f"the file {hashlib.sha1(str(error.request.url).encode()).hexdigest()}"


def _hash_vocabulary(vocabulary: list[bytes]) -> str:
    """SHA-256 of the bytes of all ids in order, one base64 line each."""
    return hashlib.sha256(b"\n".join(map(base64.b64encode, vocabulary))).hexdigest()
