"""From bytes to documents: decompression, lines and paragraphs, and the texts in them.

A document is a string; or a `LongText`, read as a stream, if it is too long for memory; or the ids
(tokens,) int64 of a source that is already tokenized; or a `Skip` with the reason why it cannot be
used, so that it is counted.
"""

import bz2
import codecs
import gzip
import hashlib
import lzma
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from jaxgpt.errors import UserError, first_line
from jaxgpt.preparation.archives import open_input

if TYPE_CHECKING:  # `prepare --help` does without it
    import numpy as np

CHUNK = 1 << 20  # bytes read at a time
UTF32_BYTES = 4  # of one character; the longest byte order mark
ZSTD_CHUNK = 1 << 8  # of .zst; small, because 12 bytes can decompress to 128 KB
PIECE = 1 << 20  # characters encoded at a time

PARTS = ("document", "paragraph", "line")  # values of --sample-by; any other is a separator


class Skip(Enum):
    """Why a document is skipped."""

    NULL = "null"
    EMPTY = "empty"
    NOT_UTF8 = "not UTF-8"
    MALFORMED = "not a JSON object"
    NO_TEXT = "no text in the column"


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files become documents."""

    text_column: str = "text"
    ids: bool = False  # the column has token ids, not text
    sample_by: str = "document"  # one of PARTS, or the text between two documents
    encoding_errors: Literal["skip", "replace"] = "skip"

    @property
    def decode_errors(self) -> str:
        """The `errors` argument of `bytes.decode`."""
        return "strict" if self.encoding_errors == "skip" else "replace"


class LongText:
    """A text file that is one document, too long for memory; UserError if it is corrupt."""

    def __init__(self, path: str, options: ReadOptions):
        self._path, self._options = path, options

    def chunks(self) -> Iterator[str]:
        """Its text, 1 MB at a time; raises UnicodeDecodeError if it is not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(self._options.decode_errors)
        with open_input(self._path) as file:
            for chunk in read_chunks(file, self._path):
                yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)

    def skip_reason(self) -> Skip | None:
        """Read it to the end: None if all of it is UTF-8."""
        try:
            deque(self.chunks(), maxlen=0)
        except UnicodeDecodeError:
            return Skip.NOT_UTF8
        return None


Text: TypeAlias = "str | LongText | np.ndarray"
Document: TypeAlias = "Text | Skip"


class Batch(NamedTuple):
    """Some documents of a slice."""

    documents: list[Document]
    bytes: int  # that they take up in the file
    token_count: int | None  # the sum of FineWeb's column of this name, if there is one


def to_document(text: str | bytes | None, options: ReadOptions) -> Document:
    """A text decoded to a string, or the reason why it is skipped."""
    if isinstance(text, bytes):
        try:
            text = text.decode(errors=options.decode_errors)
        except UnicodeDecodeError:
            return Skip.NOT_UTF8
    if text is None:
        return Skip.NULL
    return text or Skip.EMPTY


def to_ids(ids: Any) -> Document:
    """Token ids as an array, or the reason why they are skipped."""
    if ids is None:
        return Skip.NULL
    import numpy as np

    try:
        array = np.asarray(ids)
    except ValueError:  # lists of several lengths
        return Skip.NO_TEXT
    if not array.size:
        return Skip.EMPTY
    is_list_of_ids = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
    return array.astype(np.int64) if is_list_of_ids else Skip.NO_TEXT


def pieces(document: str | LongText, cut: Callable[[str, int, int], int]) -> Iterator[str]:
    """Cut a document into pieces of at most a million characters, without changing its tokens.

    `cut` is the tokenizer's. A million characters without a place to cut are cut anywhere.
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
            stop = cut(pending, start, start + PIECE)
            yield pending[start:stop]
            start = stop
        pending = pending[start:]
    yield pending


def fraction_of(document: Text) -> float:
    """A number in [0, 1) from the hash of the document's text, uniformly distributed."""
    if not isinstance(document, str | LongText):
        digest = hashlib.sha256(document.tobytes())
    elif isinstance(document, str):
        digest = hashlib.sha256(document.encode(errors="surrogatepass"))
    else:
        digest = hashlib.sha256()
        for chunk in document.chunks():
            digest.update(chunk.encode())
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def read_chunks(file: IO[bytes], path: str) -> Iterator[bytes]:
    """A file's bytes, decompressed, about 1 MB at a time.

    Without a byte order mark, and with Windows' line ends as newlines. Raises UserError if the file
    is corrupt, or UTF-16 or UTF-32.
    """
    chunks = _decompress(file, path)
    head = b""
    while len(head) < UTF32_BYTES and (chunk := next(chunks, None)) is not None:
        head += chunk
    _refuse_wide(head, path)
    held = b""  # the first half of a line end, perhaps
    for chunk in chain([head.removeprefix(codecs.BOM_UTF8)], chunks):
        whole = held + chunk
        held = b"\r" if whole.endswith(b"\r") else b""
        yield whole.removesuffix(held).replace(b"\r\n", b"\n")
    yield held


def _refuse_wide(head: bytes, path: str) -> None:
    """Raises UserError for UTF-16 and UTF-32 with a byte order mark, or beginning with ASCII."""
    first = head[:UTF32_BYTES]
    zeros = len(first) == UTF32_BYTES and any(first) and b"\0\0" in (first[::2], first[1::2])
    if first in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) or (zeros and first.count(0) == 3):
        encoding = "UTF-32"
    elif zeros or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "UTF-16"
    else:
        return
    raise UserError(
        f"{path}: is {encoding}, as PowerShell's > may write it; convert it to UTF-8 "
        f"(iconv -f {encoding} -t UTF-8, or Set-Content -Encoding utf8)"
    )


def split_at(separator: bytes, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The texts between separators, such as newlines, in a file that is read in chunks."""
    pending: list[bytes] = []
    held = b""  # the beginning of a separator, perhaps
    for chunk in chunks:
        *texts, rest = (held + chunk).split(separator)
        if texts:
            yield b"".join([*pending, texts[0]])
            yield from texts[1:]
            pending = []
        end = max(0, len(rest) - len(separator) + 1)
        pending.append(rest[:end])
        held = rest[end:]
    if last := b"".join([*pending, held]):
        yield last


def lines_between(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in [start, stop) of an uncompressed file."""
    if start:
        file.seek(start - 1)
        file.readline()
    else:
        head = file.read(UTF32_BYTES)
        _refuse_wide(head, file.name)
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    position = file.tell()
    while position < stop and (line := file.readline()):
        position += len(line)
        yield line


def paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks of lines between blank lines."""
    block: list[bytes] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield b"\n".join(block)
            block = []
    if block:
        yield b"\n".join(block)


def in_groups(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lines that are not blank, in groups of about 1 MB."""
    group: list[bytes] = []
    size = 0
    for line in lines:
        if line.strip():
            group.append(line)
            size += len(line)
        if size > CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _decompress(file: IO[bytes], path: str) -> Iterator[bytes]:
    name = path.lower()
    try:
        if name.endswith(".zst"):
            yield from _decompress_zstd(file)
            return
        openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
        opener = openers.get(os.path.splitext(name)[1])
        source: Any = opener(file) if opener else file
        while chunk := source.read(CHUNK):
            yield chunk
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; the libraries' own have no number
        raise UserError(
            f"{path}: is corrupt or truncated ({first_line(error)}); copy or download it again"
        ) from None


def _decompress_zstd(file: IO[bytes]) -> Iterator[bytes]:
    """Raises EOFError if the last frame is incomplete, which zstandard's reader ignores."""
    import zstandard

    # 2 GB, zstd's largest window: many corpora are compressed with --long.
    make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    frame = make()
    fed = False
    try:
        while data := file.read(ZSTD_CHUNK):
            while data:
                if frame.eof:
                    frame, fed = make(), False
                yield frame.decompress(data)
                fed, data = True, frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if fed and not frame.eof:
        raise EOFError("the end is missing")
