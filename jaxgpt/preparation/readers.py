"""Reading documents from parquet and save_to_disk folders, and by `line_readers.py` from the rest.

A reader yields batches and never has a complete file in memory.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from jaxgpt.data.tokenizer import EOT_TEXT
from jaxgpt.errors import UserError, first_few, first_line
from jaxgpt.preparation.archives import archive_of, open_input, size_of
from jaxgpt.preparation.documents import (
    CHUNK,
    Batch,
    Document,
    LongText,
    ReadOptions,
    Skip,
    read_chunks,
    to_document,
    to_ids,
)
from jaxgpt.preparation.inputs import Input, Slice
from jaxgpt.preparation.line_readers import (
    check_column,
    read_csv,
    read_jsonl,
    read_text,
    sum_of_used,
)

ROWS = 1024  # documents per batch, 4 MB of web text: overhead is small
ARROWS = ("parquet", "arrow")  # the kinds that pyarrow reads
BATCH_BYTES = 1 << 24  # fewer rows if they are long


def read_slice(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    """The documents of a slice, in order; raises UserError for a file that cannot be read."""
    read = {
        "parquet": _read_parquet,
        "arrow": _read_saved_dataset,
        "jsonl": read_jsonl,
        "csv": read_csv,
        "text": read_text,
    }[slice.input.kind]
    try:
        _check_size(slice)
        with _named_if_corrupt(slice) if slice.input.kind in ARROWS else nullcontext():
            yield from read(slice, options)
        _check_size(slice)  # most readers take a truncated file for a complete one
    except OSError as error:
        raise UserError(
            f"{slice.path}: cannot be read ({error.strerror or error}); copy or download it again"
        ) from None
    except MemoryError:
        raise UserError(
            f"{slice.path}: has a text that is too long for the memory; divide it, or leave the "
            "file out"
        ) from None


def has_documents(inputs: Iterable[Input], options: ReadOptions, least: int) -> bool:
    """Whether the inputs have at least `least` usable documents; reads no more than that takes.

    Raises UserError as `read_slice` does.
    """
    count = 0
    for item in inputs:
        if item.kind == "text" and options.sample_by == "document":
            count += item.size > 0
            continue
        for batch in read_slice(Slice(item, item.path, 0, 1), options):
            count += sum(not isinstance(document, Skip) for document in batch.documents)
            if count >= least:
                return True
    return count >= least


def characters_of(inputs: Iterable[Input], options: ReadOptions) -> set[str]:
    """Every character in the inputs; reads all of them."""
    found = set[str]()
    for item in inputs:
        for batch in read_slice(Slice(item, item.path, 0, 1), options):
            for document in batch.documents:
                if isinstance(document, LongText):
                    found.update(*document.chunks())
                elif not isinstance(document, Skip):
                    found.update(document)
    return found


def find_separators(inputs: Iterable[Input]) -> str | None:
    """The first text file, if <|endoftext|> occurs in its first megabyte more than once."""
    for item in inputs:
        if item.kind == "text":  # others are most likely alike
            with open_input(item.path) as file:
                head = next(read_chunks(file, item.path), b"")
            return item.path if head.count(EOT_TEXT.encode()) > 1 else None
    return None


def _check_size(slice: Slice) -> None:
    """Raises UserError if the input has another size than when it was found."""
    path, expected = Path(slice.path), slice.input.size
    files = path.glob("*.arrow") if slice.input.kind == "arrow" else [path]
    size = sum(size_of(str(file)) for file in files)
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
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise UserError(
            f"{slice.path}: is not {slice.input.kind} data, or is corrupt ({first_line(error)}); "
            "copy or download it again"
        ) from None


def _read_parquet(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    if archive_of(slice.path):  # going back in a compressed member means to start again
        with TemporaryFile() as file, open_input(slice.path) as member:
            shutil.copyfileobj(member, file)
            yield from _read_row_groups(file, slice, options)
    else:
        yield from _read_row_groups(slice.path, slice, options)


def _read_row_groups(source: Any, slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    # Without a buffer, a file of one row group would be read into memory completely.
    with pq.ParquetFile(source, buffer_size=CHUNK, pre_buffer=False) as file:
        groups = range(*slice.share_of(file.metadata.num_row_groups))
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        n_bytes = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        columns = _columns(slice, file.schema_arrow.names, options)
        for batch in file.iter_batches(
            _batch_rows(rows, n_bytes), row_groups=groups, columns=columns, use_threads=False
        ):
            yield _batch(batch, slice, options, slice.size * len(batch) // max(rows, 1))


def _columns(slice: Slice, names: Collection[str], options: ReadOptions) -> list[str]:
    """The columns to read: the text's, with all that it is nested in, and FineWeb's counts."""
    check_column(slice.input, names, options.text_column)
    text = options.text_column
    if text not in names:
        text = text.partition(".")[0]
    has_counts = [*names].count("token_count") == 1 and text != "token_count"
    return [text, "token_count"] if has_counts else [text]


@lru_cache(1)  # or each of a hundred slices would read the headers of all files in the folder
def _open_saved_dataset(path: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(path)


def _read_saved_dataset(slice: Slice, options: ReadOptions) -> Iterator[Batch]:
    if not slice.input.rows:
        return
    dataset = _open_saved_dataset(slice.path)
    columns = _columns(slice, dataset.column_names, options)
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

    column = _column(table, slice.input, options.text_column)
    documents: list[Document]
    if options.ids and pa.types.is_nested(column.type):
        documents = [to_ids(getattr(row, "values", None)) for row in column]
    elif options.ids:
        documents = [Skip.NO_TEXT] * len(column)
    elif not _is_text_type(column.type):
        raise UserError(
            f"{slice.path}: column {options.text_column!r} has type {column.type}, not text; "
            f"choose another with --text-column ({first_few(table.schema.names)})"
        )
    else:
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = column.cast(pa.large_binary()).to_pylist()
        documents = [to_document(text, options) for text in texts]
    counts = None
    if "token_count" in table.schema.names and options.text_column != "token_count":
        counts = sum_of_used(documents, table["token_count"].to_pylist())
    return Batch(documents, size, counts)


def _column(table: Any, input: Input, name: str) -> Any:
    """A column of an Arrow batch or table; `meta.text` is the field text of the column meta."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in table.schema.names:
        return table[name]
    top, *path = name.split(".")
    column = table[top]
    for key in path:
        fields = [field.name for field in column.type] if pa.types.is_struct(column.type) else []
        check_column(input, fields, key)
        column = pc.struct_field(column, key)
    return column


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
