"""Reading documents from parquet, save_to_disk folders, JSON lines and plain text.

A reader yields batches and never has a complete file in memory.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, first_line
from jaxgpt.preparation.documents import (
    CHUNK,
    Batch,
    Document,
    LongText,
    ReadOptions,
    Skip,
    in_groups,
    lines_between,
    paragraphs,
    read_chunks,
    split_lines,
    to_document,
)
from jaxgpt.preparation.inputs import Input, Slice

ROWS = 1024  # documents per batch, 4 MB of web text: overhead is small
BATCH_BYTES = 1 << 24  # fewer rows if they are long
MAX_TOKEN_COUNT = 1 << 53  # of one document
IN_MEMORY = 1 << 24  # bytes of text; a longer file is read as a stream, twice


def read_slice(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    """The documents of a slice, in order; raises UserError for a file that cannot be read."""
    read = {
        "parquet": _read_parquet,
        "arrow": _read_saved_dataset,
        "jsonl": _read_jsonl,
        "text": _read_text,
    }[slice.input.kind]
    try:
        _check_size(slice)
        yield from read(slice, options)
        _check_size(slice)  # most readers take a cut for the end of the file
    except OSError as error:
        raise UserError(
            f"{slice.path}: cannot be read ({error.strerror or error}); copy or download it again"
        ) from None


def _check_size(slice: Slice) -> None:
    """Raises UserError if the input has another size than when it was found."""
    path, expected = Path(slice.path), slice.input.size
    files = path.glob("*.arrow") if slice.input.kind == "arrow" else [path]
    size = sum(file.stat().st_size for file in files)
    if size != expected:
        raise UserError(
            f"{path}: has {size:,} bytes, and had {expected:,} when it was found; restore it and "
            "run the same command again, or choose another folder with --out"
        )


@contextmanager
def _named_if_corrupt(slice: Slice) -> Iterator[None]:
    """Turn Arrow's errors into a UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise UserError(
            f"{slice.path}: is no {slice.input.kind} file, or is corrupt ({first_line(error)}); "
            "copy or download it again"
        ) from None


def _read_parquet(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    # Without a buffer, a file of one row group would be read into memory completely.
    with (
        _named_if_corrupt(slice),
        pq.ParquetFile(slice.path, buffer_size=CHUNK, pre_buffer=False) as file,
    ):
        groups = range(*slice.share_of(file.metadata.num_row_groups))
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        n_bytes = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        names = file.schema_arrow.names
        _check_column(slice.input, names, options.text_column)
        columns = [options.text_column, *_count_column(names, options)]
        for batch in file.iter_batches(
            _batch_rows(rows, n_bytes), row_groups=groups, columns=columns, use_threads=False
        ):
            yield _batch(batch, slice, options, slice.size * len(batch) // max(rows, 1))


@lru_cache(1)  # or each of a hundred slices would read the headers of all files in the folder
def _open_saved_dataset(path: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(path)


def _read_saved_dataset(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    if not slice.input.rows:
        return
    with _named_if_corrupt(slice):
        yield from _read_saved_rows(slice, options)


def _read_saved_rows(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    dataset = _open_saved_dataset(slice.path)
    _check_column(slice.input, dataset.column_names, options.text_column)
    columns = [options.text_column, *_count_column(dataset.column_names, options)]
    dataset = dataset.select_columns(columns).with_format("arrow")
    first, last = slice.share_of(slice.input.rows)
    step = _batch_rows(slice.input.rows, slice.input.size)
    for start in range(first, last, step):
        stop = min(start + step, last)
        yield _batch(
            dataset[start:stop], slice, options, slice.size * (stop - start) // (last - first)
        )


def _batch_rows(rows: int, n_bytes: int) -> int:
    return max(1, min(ROWS, BATCH_BYTES * rows // max(n_bytes, 1)))


def _batch(table: Any, slice: Slice, options: ReadOptions, size: int) -> Batch:
    """The documents of an Arrow batch or table."""
    import pyarrow as pa

    column = table[options.text_column]
    if not _is_text_type(column.type):
        raise UserError(
            f"{slice.path}: column {options.text_column!r} has type {column.type}, not text; "
            f"choose another with --text-column ({_first_few(table.schema.names)})"
        )
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = column.cast(pa.large_binary()).to_pylist()
    documents = [to_document(text, options) for text in texts]
    counts = None
    if "token_count" in table.schema.names and options.text_column != "token_count":
        counts = _sum_of_used(documents, table["token_count"].to_pylist())
    return Batch(documents, size, counts)


def _sum_of_used(documents: list[Document], counts: list[Any]) -> int | None:
    """The sum of the source's token counts of the documents; None if one of them has none."""
    pairs = zip(documents, counts, strict=True)
    used = [count for document, count in pairs if not isinstance(document, Skip)]
    # Other values mean that the column of this name is something else.
    is_count = all(type(count) is int and 0 <= count <= MAX_TOKEN_COUNT for count in used)
    return sum(used) if is_count else None


def _is_text_type(type: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(type):
        type = type.value_type
    return any(
        is_kind(type)
        for is_kind in (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null),
        )
    )


def _count_column(names: Collection[str], options: ReadOptions) -> list[str]:
    """The column of FineWeb's token counts, if there is one."""
    has_one = [*names].count("token_count") == 1 and options.text_column != "token_count"
    return ["token_count"] if has_one else []


def _check_column(input: Input, names: Collection[str], text_column: str) -> None:
    """Raises UserError if `names` has no text column, or several."""
    if (found := [*names].count(text_column)) > 1:
        raise UserError(
            f"{input.path}: has {found} columns {text_column!r}; rename one, or name another with "
            "--text-column"
        )
    if text_column not in names:
        raise UserError(
            f"{input.path}: has no column {text_column!r}; name the text column with "
            f"--text-column (there are {_first_few(names)})"
        )


def _first_few(names: Iterable[str]) -> str:
    """At most eight of the names, shortened, for a message."""
    found = [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    more = f" and {len(found) - 8:,} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more


def _read_jsonl(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open(slice.path, "rb") as file:
        if slice.input.is_compressed:
            lines = split_lines(read_chunks(file, slice.path))
        else:
            lines = lines_between(file, *slice.share_of(slice.input.size))
        first = slice.part == 0
        position = 0 if slice.input.is_compressed else slice.share_of(slice.input.size)[0]
        for group in in_groups(lines):
            records = [_parse_line(line, options) for line in group]
            if first:
                _check_first_lines(records, group[0], slice, options)
                first = False
            documents = [_text_of(record, options) for record in records]
            counts = [r.get("token_count") if isinstance(r, dict) else None for r in records]
            before, position = position, file.tell()
            yield Batch(documents, position - before, _sum_of_used(documents, counts))


def _check_first_lines(records: list[Any], line: bytes, slice: Slice, options: ReadOptions) -> None:
    """Raises UserError if the file is a JSON array, or if its first lines lack the text column."""
    if line.lstrip().startswith(b"["):
        raise UserError(
            f"{slice.path}: is a JSON array, not one object per line; convert it with jq -c '.[]'"
        )
    # Some writers omit the key of an empty text, so one line without it is not an error.
    names = dict.fromkeys(name for r in records if isinstance(r, dict) for name in r)
    if names:
        _check_column(slice.input, names, options.text_column)


def _parse_line(line: bytes, options: ReadOptions) -> Any:
    try:
        return json.loads(line.decode(errors=options.decode_errors))
    except UnicodeDecodeError:
        return Skip.NOT_UTF8
    except (ValueError, RecursionError):  # RecursionError: deeply nested
        return Skip.MALFORMED


def _text_of(record: Any, options: ReadOptions) -> Document:
    if not isinstance(record, dict):
        return record if isinstance(record, Skip) else Skip.MALFORMED
    text = record.get(options.text_column)
    return to_document(text, options) if isinstance(text, str | None) else Skip.NO_TEXT


def _read_text(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open(slice.path, "rb") as file:
        chunks = read_chunks(file, slice.path)
        if options.sample_by == "document":
            yield Batch([_file_as_document(chunks, slice.path, options)], slice.size, None)
            return
        lines, position = split_lines(chunks), 0
        for group in in_groups(lines if options.sample_by == "line" else paragraphs(lines)):
            before, position = position, file.tell()
            yield Batch([to_document(text, options) for text in group], position - before, None)


def _file_as_document(chunks: Iterable[bytes], path: str, options: ReadOptions) -> Document:
    text = _join_up_to(IN_MEMORY, chunks)
    if text is not None:
        return to_document(text, options)
    long = LongText(path, options)
    return long.skip_reason() or long


def _join_up_to(limit: int, chunks: Iterable[bytes]) -> bytes | None:
    """All chunks joined, None if they are longer than `limit` bytes."""
    pending: list[bytes] = []
    size = 0
    for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size > limit:
            return None
    return b"".join(pending)
