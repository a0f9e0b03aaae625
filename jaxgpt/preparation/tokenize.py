"""Encodes one unit of work: its documents become tokens in files of their own, the parts.

Parts contain bare tokens, with the end-of-text token before each document. Concatenated over all
units they are a stream: one for each split if documents are assigned to splits, else 'all'. The
parent process cuts the shards from the streams (`assemble.py`), so they do not depend on how the
work was divided.
"""

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import atomic_write, open_file
from jaxgpt.preparation.documents import Skip, Text, fraction_of, pieces
from jaxgpt.preparation.inputs import Slice, Unit
from jaxgpt.preparation.readers import read_slice
from jaxgpt.preparation.work_files import Record, Settings

BUFFERED = 1 << 20  # tokens collected before they are written
GROUPED = 1 << 16  # characters of short documents encoded in one call


class Job(NamedTuple):
    """A unit of work, as a worker gets it."""

    number: int
    unit: Unit
    settings: Settings
    folder: Path  # of the parts
    plan_sha256: str  # of plan.json, by which a worker knows that it sees the same folder


class Part:
    """The file with one unit's tokens of one stream."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._texts: list[str] = []  # to encode in one call
        self._characters = 0
        self._encoded: list[np.ndarray] = []  # to write
        self._n_encoded = 0
        self.tokens = 0

    def add(self, document: Text) -> None:
        """Add one document of any length."""
        if isinstance(document, str) and len(document) <= GROUPED:
            self._texts.append(document)
            self._characters += len(document)
            if self._characters > GROUPED:
                self.encode()
            return
        self.encode()
        self._append(np.array([self._tokenizer.eot], self._tokenizer.dtype))
        if isinstance(document, np.ndarray):
            self._append(document.astype(self._tokenizer.dtype))
            return
        for piece in pieces(document, self._tokenizer.cut):
            self._append(self._tokenizer.encode(piece))

    def encode(self) -> None:
        """Encode the documents added so far."""
        if self._texts:
            self._append(self._tokenizer.encode_documents(self._texts))
        self._texts, self._characters = [], 0

    def write(self) -> None:
        """Write the tokens encoded so far."""
        if self._encoded:
            self._file.write(np.concatenate(self._encoded).data)
        self._encoded, self._n_encoded = [], 0

    def move_end(self, fraction: float, other: "Part") -> None:
        """Move this fraction of the tokens, at least two, to an empty part; none if under four."""
        self.write()
        # The smallest window is two tokens, an input and its target.
        count = max(round(self.tokens * fraction), 2) if self.tokens >= 4 else 0
        self._file.flush()
        kept, dtype = self.tokens - count, self._tokenizer.dtype
        for tokens in iterate_tokens(Path(self._file.name), kept, self.tokens, dtype):
            other._append(tokens)
        self._file.truncate(dtype.itemsize * kept)
        self.tokens = kept

    def _append(self, tokens: np.ndarray) -> None:
        self._encoded.append(tokens)
        self._n_encoded += len(tokens)
        self.tokens += len(tokens)
        if self._n_encoded >= BUFFERED:
            self.write()


def part_path(folder: Path, number: int, stream: str) -> Path:
    """The part of unit `number`."""
    return folder / f"{number:06d}.{stream}"


def tokens_being_written(folder: Path, dtype: np.dtype) -> int:
    """The tokens of `dtype` in the parts that are not complete."""
    total = 0
    for path in folder.glob("*.tmp"):
        with suppress(FileNotFoundError):  # it is complete
            total += path.stat().st_size // dtype.itemsize
    return total


def tokenize_unit(job: Job, tokenizer: Tokenizer) -> Record:
    """Read, encode and write one unit; its parts appear complete or not at all.

    Raises UserError for an input that cannot be read.
    """
    s, counts = job.settings, Counter[str]()
    examples: dict[str, str] = {}
    token_counts: list[int | None] = []
    with ExitStack() as stack:
        parts = {
            stream: Part(stack.enter_context(_part_file(job, stream)), tokenizer)
            for stream in s.streams
        }
        for slice in job.unit:
            for documents, _, token_count in read_slice(slice, s.options):
                for document in documents:
                    if isinstance(document, Skip):
                        counts[document.value] += 1
                        examples.setdefault(document.value, slice.input.path)
                        continue
                    if isinstance(document, np.ndarray):
                        document = _content(document, slice, tokenizer)
                    counts["documents"] += 1
                    parts[_stream_of(document, slice, s)].add(document)
                for part in parts.values():
                    part.encode()
                token_counts.append(token_count)
        if s.val_fraction is not None and s.val_at_end:
            parts["train"].move_end(s.val_fraction, parts["val"])
        for part in parts.values():
            part.write()
    known = [count for count in token_counts if count is not None]
    return Record(
        number=job.number,
        tokens={stream: part.tokens for stream, part in parts.items()},
        documents=counts.pop("documents", 0),
        skipped=dict(sorted(counts.items())),
        examples=examples,
        token_count=sum(known) if known and len(known) == len(token_counts) else None,
        bytes=sum(slice.size for slice in job.unit),
    )


def _part_file(job: Job, stream: str) -> AbstractContextManager[BinaryIO]:
    path = part_path(job.folder, job.number, stream)
    # A name of its own: a worker that outlives a killed parent may still write the same part.
    writer = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    return atomic_write(path, path.with_name(f"{path.name}.{writer}.tmp"))


def _content(ids: np.ndarray, slice: Slice, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a document without the end of text before or after them.

    Raises UserError for an id that the tokenizer does not have.
    """
    try:
        ids = tokenizer.checked(ids)
    except UserError as error:
        raise UserError(f"{slice.path}: {error}") from None
    start, is_ended = int(ids[0] == tokenizer.eot), int(ids[-1] == tokenizer.eot)
    return ids[start : len(ids) - is_ended]


def _stream_of(document: Text, slice: Slice, s: Settings) -> str:
    if s.val is not None:
        return slice.input.split
    if s.val_fraction is None:
        return "all"
    if s.val_at_end:
        return "train"  # until the unit is complete
    return "val" if fraction_of(document) < s.val_fraction else "train"


def iterate_tokens(
    path: Path, start: int, stop: int, dtype: np.dtype, step: int = 1 << 22
) -> Iterator[np.ndarray]:
    """Tokens [start, stop) of a part, 4M at a time; raises UserError if it is truncated."""
    with open_file(path) as file:
        file.seek(dtype.itemsize * start)
        for position in range(start, stop, step):
            wanted = min(step, stop - position)
            tokens = np.frombuffer(file.read(dtype.itemsize * wanted), dtype)
            if len(tokens) != wanted:
                raise UserError(f"{path}: is truncated; delete it and run the same command again")
            yield tokens
