"""What a document is: a text, or where that is too long to hold, a stream of it; or why it is none.

A document that cannot be used is the reason (`Skip`), so that it is counted and not lost without a
word.
"""

import codecs
import hashlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from jaxgpt.preparation.lines import read_chunks

PIECE = 1 << 20  # characters encoded at a time

SampleBy = Literal["document", "paragraph", "line"]


class Skip(Enum):
    """Why a document is left out."""

    NULL = "null"
    EMPTY = "empty"
    NOT_UTF8 = "not UTF-8"
    MALFORMED = "not JSON"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files become documents."""

    text_column: str = "text"
    sample_by: SampleBy = "document"
    encoding_errors: Literal["skip", "replace"] = "skip"

    @property
    def decode_errors(self) -> str:
        """What `bytes.decode` calls it."""
        return "strict" if self.encoding_errors == "skip" else "replace"


class LongText:
    """A text file that is one document and too long to hold; raises UserError when damaged."""

    def __init__(self, path: str, options: ReadOptions):
        self._path, self._options = path, options

    def chunks(self) -> Iterator[str]:
        """Its text, a MB at a time; UnicodeDecodeError where it is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(self._options.decode_errors)
        with open(self._path, "rb") as file:
            for chunk in read_chunks(file, self._path):
                yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)

    def check(self) -> Skip | None:
        """Reads it to the end: None if it can be used."""
        try:
            deque(self.chunks(), maxlen=0)
        except UnicodeDecodeError:
            return Skip.NOT_UTF8
        return None


Document = str | LongText | Skip


class Batch(NamedTuple):
    """Some documents of a slice, and how many bytes of its file they took."""

    documents: list[Document]
    bytes: int
    token_count: int | None  # the sum of FineWeb's column of this name, where there is one


def usable(text: str | bytes | None, options: ReadOptions) -> Document:
    """A text as it was read, or the reason why it is left out."""
    if isinstance(text, bytes):
        try:
            text = text.decode(errors=options.decode_errors)
        except UnicodeDecodeError:
            return Skip.NOT_UTF8
    if text is None:
        return Skip.NULL
    return text or Skip.EMPTY


def pieces(document: str | LongText) -> Iterator[str]:
    """A document in pieces of at most a million characters whose encodings joined are its own.

    GPT-2's pattern ends a word before every space or newline that follows something else, so that
    is where a piece ends. Only a million characters without one are cut anywhere.
    """
    if isinstance(document, str) and len(document) <= PIECE:
        yield document
        return
    chunks = [document] if isinstance(document, str) else document.chunks()
    pending = ""
    for chunk in chunks:
        pending += chunk
        start = 0
        while len(pending) - start > PIECE:
            word_end = WORD_END.match(pending, start, start + PIECE)
            stop = word_end.end() if word_end else start + PIECE
            yield pending[start:stop]
            start = stop
        pending = pending[start:]
    yield pending


WORD_END = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def fraction_of(document: str | LongText) -> float:
    """A number in [0, 1) that depends on the document's text alone, evenly spread."""
    if isinstance(document, str):
        digest = hashlib.sha256(document.encode(errors="surrogatepass"))
    else:
        digest = hashlib.sha256()
        for chunk in document.chunks():
            digest.update(chunk.encode())
    return int.from_bytes(digest.digest()[:8], "big") / 2**64
