"""Documents out of files: parquet, JSON lines, plain text, and what save_to_disk wrote.

A reader never holds a file: it yields batches. A document that cannot be used is yielded as the
reason (`Skip`), so that it is counted and not lost without a word.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO, Literal, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.preparation.inputs import Input, Slice

ROWS = 256  # documents in a batch: enough to make its cost small, 1 MB of web text
CHUNK = 1 << 20  # bytes read at a time
WHOLE = 1 << 24  # bytes; a larger text is read as a stream, twice
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
        decoder = codecs.getincrementaldecoder("utf-8-sig")(self._options.decode_errors)
        with open(self._path, "rb") as file:
            for chunk in _chunks(file, self._path):
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


def read_slice(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    """The documents of a slice, in order; raises UserError for a file that cannot be read."""
    read = {
        "parquet": _read_parquet,
        "arrow": _read_saved_dataset,
        "jsonl": _read_jsonl,
        "text": _read_text,
    }[slice.input.kind]
    try:
        yield from read(slice, options)
    except OSError as error:
        raise UserError(
            f"{slice.path}: cannot be read ({error.strerror or error}); copy or download it again"
        ) from None


def _read_parquet(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(slice.path) as file:
            groups = file.metadata.num_row_groups
            first, last = (groups * (slice.part + i) // slice.parts for i in (0, 1))
            rows = sum(file.metadata.row_group(i).num_rows for i in range(first, last))
            names = file.schema_arrow.names
            check_column(slice.input, names, options.text_column)
            columns = [options.text_column, *({"token_count"} & set(names) - {options.text_column})]
            for batch in file.iter_batches(
                ROWS, row_groups=range(first, last), columns=columns, use_threads=False
            ):
                yield _batch(batch, slice, options, slice.size * len(batch) // max(rows, 1))
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{slice.path}: is no parquet file, or a damaged one ({_first_line(error)}); copy or "
            "download it again"
        ) from None


def _read_saved_dataset(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    from datasets import load_from_disk

    dataset = load_from_disk(slice.path)
    check_column(slice.input, dataset.column_names, options.text_column)
    columns = [
        *{options.text_column, *({"token_count"} & set(dataset.column_names))},
    ]
    dataset = dataset.select_columns(columns).with_format("arrow")
    first, last = (slice.input.rows * (slice.part + i) // slice.parts for i in (0, 1))
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        yield _batch(
            dataset[start:stop], slice, options, slice.size * (stop - start) // (last - first)
        )


def _batch(table: Any, slice: Slice, options: ReadOptions, size: int) -> Batch:
    """The documents of an arrow batch or table."""
    import pyarrow as pa

    column = table[options.text_column]
    if not _holds_text(column.type):
        raise UserError(
            f"{slice.path}: column {options.text_column!r} holds {column.type}, not text; name "
            f"another with --text-column ({', '.join(table.schema.names)})"
        )
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = column.cast(pa.large_binary()).to_pylist()
    documents = [_usable(text, options) for text in texts]
    counts = None
    if "token_count" in table.schema.names and options.text_column != "token_count":
        counts = _sum_of_used(documents, table["token_count"].to_pylist())
    return Batch(documents, size, counts)


def _sum_of_used(documents: list[Document], counts: list[Any]) -> int | None:
    """The tokens that the source says the documents have; None where it does not say it of each."""
    pairs = zip(documents, counts, strict=True)
    used = [count for document, count in pairs if not isinstance(document, Skip)]
    return sum(used) if all(isinstance(count, int) for count in used) else None


def _holds_text(type: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(type):
        type = type.value_type
    return any(
        is_kind(type)
        for is_kind in (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_null),
        )
    )


def check_column(input: Input, names: Iterable[str], text_column: str) -> None:
    """Raises UserError if the text's column is not among `names`."""
    if text_column not in names:
        raise UserError(
            f"{input.path}: has no column {text_column!r}; name the one with the text with "
            f"--text-column (there are {', '.join(names)})"
        )


def _usable(text: str | bytes | None, options: ReadOptions) -> Document:
    if isinstance(text, bytes):
        try:
            text = text.decode(errors=options.decode_errors)
        except UnicodeDecodeError:
            return Skip.NOT_UTF8
    if text is None:
        return Skip.NULL
    return text or Skip.EMPTY


def _read_jsonl(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open(slice.path, "rb") as file:
        if slice.input.is_compressed:
            lines = _lines(_chunks(file, slice.path))
        else:
            lines = _lines_between(
                file, *(slice.input.size * (slice.part + i) // slice.parts for i in (0, 1))
            )
        first, position = True, file.tell()
        for group in _groups(lines):
            documents, counts = [], []
            for line in group:
                record = _parse(line, options)
                if first:
                    _check_first(record, line, slice, options)
                    first = False
                documents.append(_text_of(record, options))
                counts.append(record.get("token_count") if isinstance(record, dict) else None)
            before, position = position, file.tell()
            yield Batch(documents, position - before, _sum_of_used(documents, counts))


def _check_first(record: Any, line: bytes, slice: Slice, options: ReadOptions) -> None:
    """Raises UserError where the first line shows that the whole file is meant otherwise."""
    if slice.part == 0 and line.lstrip().startswith(b"["):
        raise UserError(
            f"{slice.path}: is a JSON array, and is to hold one object a line; write it so, as jq "
            "-c '.[]' does"
        )
    if isinstance(record, dict):
        check_column(slice.input, list(record), options.text_column)


def _parse(line: bytes, options: ReadOptions) -> Any:
    try:
        return json.loads(line.decode(errors=options.decode_errors))
    except UnicodeDecodeError:
        return Skip.NOT_UTF8
    except ValueError:
        return Skip.MALFORMED


def _text_of(record: Any, options: ReadOptions) -> Document:
    if isinstance(record, Skip):
        return record
    text = record.get(options.text_column) if isinstance(record, dict) else Skip.MALFORMED
    return _usable(text, options) if isinstance(text, str | None) else Skip.MALFORMED


def _groups(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lines that are not blank, about a MB at a time."""
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


def _read_text(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open(slice.path, "rb") as file:
        if options.sample_by != "document":
            position = 0
            blocks = _blocks(_lines(_chunks(file, slice.path)), options.sample_by)
            for group in _groups(blocks):
                before, position = position, file.tell()
                yield Batch([_usable(b, options) for b in group], position - before, None)
            return
        text: Document
        if slice.input.text_bytes > WHOLE:
            long = LongText(slice.path, options)
            text = long.check() or long
        else:
            # The marker that Windows puts first is no text.
            text = _usable(
                b"".join(_chunks(file, slice.path)).removeprefix(codecs.BOM_UTF8), options
            )
    yield Batch([text], slice.size, None)


def _blocks(lines: Iterable[bytes], sample_by: SampleBy) -> Iterator[bytes]:
    """Lines, or the paragraphs that blank lines part."""
    if sample_by == "line":
        yield from lines
        return
    block: list[bytes] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield b"\n".join(block)
            block = []
    if block:
        yield b"\n".join(block)


def _lines_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in [start, stop) of a file."""
    position = start
    if start:
        file.seek(start - 1)
        position += len(file.readline()) - 1
    while position < stop and (line := file.readline()):
        position += len(line)
        yield line


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        if others:
            yield b"".join(pending)
            yield from others[:-1]
            pending = others[-1:]
    if any(pending):
        yield b"".join(pending)


def _chunks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """A file's bytes, decompressed; raises UserError where it is damaged or cut short."""
    try:
        if path.endswith(".zst"):
            yield from _decompress_zstd(file)
            return
        source = gzip.GzipFile(fileobj=file) if path.endswith(".gz") else file
        while chunk := source.read(CHUNK):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: is damaged or cut short ({_first_line(error)}); copy or download it again"
        ) from None


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Raises EOFError where the last frame is incomplete, which zstandard's reader passes over."""
    import zstandard

    # 2 GB, zstd's largest window: files made with --long, as many corpora are.
    make = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
    frame = make()
    fed = False
    try:
        while data := file.read(CHUNK):
            while data:
                if frame.eof:
                    frame, fed = make(), False
                yield frame.decompress(data)
                fed, data = True, frame.unused_data
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from None
    if fed and not frame.eof:
        raise EOFError("its end is missing")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
