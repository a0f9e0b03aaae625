"""Reading documents from JSON lines, CSV and plain text, compressed or not."""

import csv
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from jaxgpt.errors import UserError, first_few, first_line
from jaxgpt.preparation.archives import open_input
from jaxgpt.preparation.documents import (
    PARTS,
    Batch,
    Document,
    LongText,
    ReadOptions,
    Skip,
    in_groups,
    lines_between,
    paragraphs,
    read_chunks,
    split_at,
    to_document,
    to_ids,
)
from jaxgpt.preparation.inputs import Input, Slice

ANY_NUMBERS = json.JSONDecoder(parse_int=float)  # `int` refuses those of over 4,300 digits
CSV_ROWS = 64  # in a batch
MAX_TOKEN_COUNT = 1 << 53  # of one document
IN_MEMORY = 1 << 24  # bytes of text; a longer file is read as a stream, twice


def sum_of_used(documents: list[Document], counts: list[Any]) -> int | None:
    """The sum of the source's token counts of the documents; None if one of them has none."""
    pairs = zip(documents, counts, strict=True)
    used = [count for document, count in pairs if not isinstance(document, Skip)]
    # Other values mean that the column of this name is something else.
    is_count = all(type(count) is int and 0 <= count <= MAX_TOKEN_COUNT for count in used)
    return sum(used) if is_count else None


def check_column(
    input: Input, names: Collection[str], text_column: str, nested: bool = True
) -> None:
    """Raises UserError if `names` lacks the text column, or repeats it.

    With `nested`, the column that it is nested in will do: `meta` for `meta.text`.
    """
    name = text_column
    if nested and name not in names:
        name = name.partition(".")[0]
    if (found := [*names].count(name)) > 1:
        raise UserError(
            f"{input.path}: has {found} columns {name!r}; rename one, or name another with "
            "--text-column"
        )
    if not found:
        raise UserError(
            f"{input.path}: has no column {text_column!r}; name the text column with "
            f"--text-column (there are {first_few(names)})"
        )


def read_jsonl(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open_input(slice.path) as file:
        if slice.input.divisible:
            lines = lines_between(file, *slice.share_of(slice.input.size))
        else:
            lines = split_at(b"\n", read_chunks(file, slice.path))
        first = slice.part == 0
        position = slice.share_of(slice.input.size)[0]
        for group in in_groups(lines):
            records = [_parse_line(line, options) for line in group]
            if first:
                _check_first_lines(records, group[0], slice, options)
                first = False
            documents = [_text_of(record, options) for record in records]
            counts = [r.get("token_count") if isinstance(r, dict) else None for r in records]
            before, position = position, file.tell()
            yield Batch(documents, position - before, sum_of_used(documents, counts))


def _check_first_lines(records: list[Any], line: bytes, slice: Slice, options: ReadOptions) -> None:
    """Raises UserError if the file is a JSON array, or if its first lines lack the text column."""
    if line.lstrip().startswith(b"["):
        raise UserError(
            f"{slice.path}: is a JSON array, not one object per line; convert it with jq -c '.[]'"
        )
    # Some writers omit the key of an empty text, so one line without it is not an error.
    names = dict.fromkeys(name for r in records if isinstance(r, dict) for name in r)
    if names:
        check_column(slice.input, names, options.text_column)


def _parse_line(line: bytes, options: ReadOptions) -> Any:
    try:
        text = line.decode(errors=options.decode_errors)
    except UnicodeDecodeError:
        return Skip.NOT_UTF8
    for parse in (json.loads, ANY_NUMBERS.decode):
        with suppress(ValueError, RecursionError):  # RecursionError: deeply nested
            return parse(text)
    return Skip.MALFORMED


def _text_of(record: Any, options: ReadOptions) -> Document:
    if isinstance(record, Skip):
        return record
    names = [options.text_column]
    if isinstance(record, dict) and options.text_column not in record:
        names = options.text_column.split(".")
    text = record
    for name in names:
        if not isinstance(text, dict):
            return Skip.MALFORMED if text is record else Skip.NO_TEXT
        text = text.get(name)
    if options.ids:
        return to_ids(text)
    return to_document(text, options) if isinstance(text, str | None) else Skip.NO_TEXT


def read_csv(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    """The documents of a column; the first line has the names."""
    csv.field_size_limit(1 << 31)
    with open_input(slice.path) as file:
        lines = split_at(b"\n", read_chunks(file, slice.path))
        # What is not UTF-8 is found where it is: in a text, or in another column.
        rows = csv.reader(line.decode("utf-8", "surrogateescape") + "\n" for line in lines)
        try:
            names, position = next(rows, []), 0
            check_column(slice.input, names, options.text_column, nested=False)
            index = names.index(options.text_column)
            while some := list(islice(rows, CSV_ROWS)):
                texts = [row[index] if index < len(row) else None for row in some]
                before, position = position, file.tell()
                documents = [
                    to_document(text and text.encode("utf-8", "surrogateescape"), options)
                    for text in texts
                ]
                yield Batch(documents, position - before, None)
        except csv.Error as error:
            raise UserError(
                f"{slice.path}: is not CSV, or is corrupt ({first_line(error)}); copy it again"
            ) from None


def read_text(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    with open_input(slice.path) as file:
        chunks = read_chunks(file, slice.path)
        if options.sample_by == "document":
            yield Batch([_file_as_document(chunks, slice.path, options)], slice.size, None)
            return
        if options.sample_by in PARTS:
            lines = split_at(b"\n", chunks)
            lines = paragraphs(lines) if options.sample_by == "paragraph" else lines
        else:
            separator = options.sample_by.encode(errors="surrogateescape")
            lines = (text.strip(b"\r\n") for text in split_at(separator, chunks))
        position = 0
        for group in in_groups(lines):
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
