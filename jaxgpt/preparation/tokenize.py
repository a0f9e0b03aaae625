"""What a worker does: one work unit's documents become tokens in files of their own.

The files ("parts") hold bare uint16 tokens, the end-of-text token before each document. Shards are
cut from them in order by the parent (`assemble.py`), so that no shard knows how the work was
divided.
"""

import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.files import atomic_write
from jaxgpt.preparation.documents import (
    LongText,
    ReadOptions,
    Skip,
    fraction_of,
    pieces,
)
from jaxgpt.preparation.inputs import Unit
from jaxgpt.preparation.journal import Record
from jaxgpt.preparation.readers import read_slice

BUFFERED = 1 << 20  # tokens gathered before they are written
GROUPED = 1 << 16  # characters of short documents encoded in one call


class Job(NamedTuple):
    """A work unit, and how it is to be read and written."""

    number: int
    unit: Unit
    options: ReadOptions
    val_fraction: float | None  # None: all tokens go into one part, and the parent splits them
    folder: Path


@dataclass
class Progress:
    """Totals that workers add to and the parent reads."""

    documents: Any  # multiprocessing values
    tokens: Any
    bytes: Any

    @classmethod
    def make(cls, context: Any) -> "Progress":
        """Totals at zero."""
        return cls(*(context.Value("q", 0) for _ in range(3)))

    def add(self, documents: int, tokens: int, size: int) -> None:
        """Count a batch."""
        for total, more in ((self.documents, documents), (self.tokens, tokens), (self.bytes, size)):
            with total.get_lock():
                total.value += more


class Part:
    """The tokens of one unit that belong to one split, written as they come."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer):
        self._file, self._tokenizer = file, tokenizer
        self._texts: list[str] = []  # to be encoded in one call
        self._pending: list[np.ndarray] = []
        self._characters = self._waiting = self.tokens = 0

    def add(self, document: str | LongText) -> None:
        """One document, whatever its length."""
        if isinstance(document, str) and len(document) <= GROUPED:
            self._texts.append(document)
            self._characters += len(document)
            if self._characters > GROUPED:
                self.encode()
            return
        self.encode()
        self._append(np.array([self._tokenizer.eot], np.uint16))
        for piece in pieces(document):
            self._append(self._tokenizer.encode(piece))

    def encode(self) -> None:
        """Encode what has been added."""
        if self._texts:
            self._append(self._tokenizer.encode_documents(self._texts))
        self._texts, self._characters = [], 0

    def write(self) -> None:
        """Write what has been encoded."""
        if self._pending:
            self._file.write(np.concatenate(self._pending).astype("<u2", copy=False).data)
        self._pending, self._waiting = [], 0

    def _append(self, tokens: np.ndarray) -> None:
        self._pending.append(tokens)
        self._waiting += len(tokens)
        self.tokens += len(tokens)
        if self._waiting >= BUFFERED:
            self.write()


def part_path(folder: Path, number: int, part: str) -> Path:
    """Where the tokens of unit `number` wait until they are in shards."""
    return folder / f"{number:06d}.{part}"


def tokenize_unit(job: Job, tokenizer: Tokenizer, progress: Progress) -> Record:
    """Read, encode and write one unit; its parts appear complete or not at all.

    Raises UserError for an input that cannot be read.
    """
    names = ("all",) if job.val_fraction is None else ("train", "val")
    counts = Counter[str]()
    examples: dict[str, str] = {}
    token_counts: list[int | None] = []
    with ExitStack() as stack:
        parts = {
            name: Part(stack.enter_context(_part_file(job, name)), tokenizer) for name in names
        }
        for slice in job.unit:
            for documents, size, token_count in read_slice(slice, job.options):
                before = sum(part.tokens for part in parts.values())
                for document in documents:
                    if isinstance(document, Skip):
                        counts[document.value] += 1
                        examples.setdefault(document.value, slice.input.path)
                        continue
                    counts["documents"] += 1
                    parts[_part_of(document, job.val_fraction)].add(document)
                for part in parts.values():
                    part.encode()
                token_counts.append(token_count)
                tokens = sum(part.tokens for part in parts.values()) - before
                progress.add(len(documents), tokens, size)
        for part in parts.values():
            part.write()
    return Record(
        number=job.number,
        tokens={name: part.tokens for name, part in parts.items()},
        documents=counts.pop("documents", 0),
        skipped=dict(sorted(counts.items())),
        examples=examples,
        token_count=_total(token_counts),
        bytes=sum(slice.size for slice in job.unit),
    )


def _part_file(job: Job, name: str) -> AbstractContextManager[BinaryIO]:
    path = part_path(job.folder, job.number, name)
    # Its own name: a worker that outlives a killed parent may still be writing the same part.
    return atomic_write(path, path.with_name(f"{path.name}.{os.getpid()}.tmp"))


def _part_of(document: str | LongText, val_fraction: float | None) -> str:
    if val_fraction is None:
        return "all"
    return "val" if fraction_of(document) < val_fraction else "train"


def _total(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


_worker: list[Any] = []  # a worker's tokenizer and progress, set once


def start_worker(tokenizer_name: str, progress: Progress) -> None:
    """Get a new process ready for `run_job`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker[:] = [load_tokenizer(tokenizer_name), progress]


def run_job(job: Job) -> Record:
    """`tokenize_unit` in a worker; an OSError becomes a UserError that names what happened."""
    tokenizer, progress = _worker
    try:
        return tokenize_unit(job, tokenizer, progress)
    except OSError as error:
        raise UserError(
            f"{error.filename or job.folder}: {error.strerror or error}; the same command goes on "
            "once that is mended"
        ) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def iterate_tokens(path: Path, start: int, stop: int, step: int = 1 << 22) -> Iterator[np.ndarray]:
    """Tokens [start, stop) of a part, 8 MB at a time; raises UserError if they are not there."""
    with path.open("rb") as file:
        file.seek(2 * start)
        for position in range(start, stop, step):
            wanted = min(step, stop - position)
            tokens = np.frombuffer(file.read(2 * wanted), "<u2")
            if len(tokens) != wanted:
                raise UserError(f"{path}: was cut short; delete it, and the same command goes on")
            yield tokens
