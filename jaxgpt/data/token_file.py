"""One token file: recognizing its format, checking it, and writing it.

Two formats are read: llm.c's and modded-nanogpt's shards begin with a magic number, nanoGPT's
`train.bin` and `val.bin` have no header. Only files with exactly those two names may have none.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.files import atomic_write

# llm.c dev/data/data_common.py: 256 int32 [magic, version, tokens, 0, ...], then uint16 tokens.
MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
FOREIGN_MAGICS = {
    20240801: "a llama-3 shard (uint32 tokens)",
    20240522: "llm.c's HellaSwag questions",
}
HEADERLESS_NAMES = ("train.bin", "val.bin")
LARGEST_ID = np.iinfo(np.uint16).max  # in a token file

PREPARE = "python -m jaxgpt.prepare"  # the command that makes such files


class DataError(UserError):
    """An error in the user's token files; the message names the file, reason and remedy."""


def refuse(errors: Sequence[str]) -> None:
    """Raise DataError with the first five of `errors`, if there are any."""
    more = [f"and {len(errors) - 5} more"] if len(errors) > 5 else []
    if errors:
        raise DataError("\n".join([*errors[:5], *more]))


class TokenFile(NamedTuple):
    """A file, and where its tokens are."""

    path: Path
    offset: int  # bytes before the first token
    length: int  # tokens


def inspect_file(path: Path) -> TokenFile:
    """Detect the format of one file and check its header and size; raises DataError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # or the kernel reads ahead, 8 MB per file
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    if size == 0:
        raise DataError(f"{path}: is empty; copy it again, or make it with {PREPARE}")
    magic, version, length = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic == MAGIC:
        return _inspect_shard(path, size, version, length)
    if magic not in FOREIGN_MAGICS and path.name in HEADERLESS_NAMES:
        return _inspect_headerless(path, size)
    found = FOREIGN_MAGICS.get(magic, "not a token shard")
    raise DataError(
        f"{path}: starts with {magic}, which is {found}; expected {MAGIC}, a shard of uint16 "
        f"tokens; make such shards with {PREPARE} (files without a header must be named train.bin "
        "or val.bin)"
    )


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write 1-D integer tokens as an llm.c shard; DataError if one does not fit into uint16."""
    tokens = np.ascontiguousarray(as_uint16(tokens, str(path)))
    write_pieces(path, len(tokens), [tokens])


def write_pieces(path: Path, length: int, pieces: Iterable[np.ndarray]) -> str:
    """Write a shard of `length` tokens from uint16 arrays; returns the file's SHA-256."""
    assert 0 < length <= np.iinfo(np.int32).max, "the length in the header is an int32"
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, length
    digest, written = hashlib.sha256(), 0
    with atomic_write(path) as file:
        for piece in chain([header], pieces):
            file.write(piece.data)
            digest.update(piece.data)
            written += piece.nbytes
        assert written == HEADER_BYTES + 2 * length, (path, written, length)
    return digest.hexdigest()


def as_uint16(tokens: np.ndarray, name: str) -> np.ndarray:
    """(n,) integers as little-endian uint16; DataError if `astype` would wrap 65,541 to 5."""
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(f"{name}: tokens must be 1-D integers, not {tokens.ndim}-D {tokens.dtype}")
    outside = tokens[(tokens < 0) | (tokens > LARGEST_ID)]
    if outside.size:
        raise DataError(
            f"{name}: token id {outside[0]} does not fit into uint16 (0 to {LARGEST_ID:,}); "
            "use a tokenizer with at most 65,536 ids, such as gpt2"
        )
    return tokens.astype("<u2", copy=False)


class Reader:
    """Reads a token file at any position; a method may be called from several threads.

    Not a memory map: where a file was cut short, or its disk fails, that ends the process (SIGBUS).
    """

    def __init__(self, file: TokenFile):
        """Raises DataError if the file cannot be opened."""
        self._file, self._lock = file, threading.Lock()
        with self._explained():
            self._opened = file.path.open("rb", buffering=0)
            self._advise("POSIX_FADV_RANDOM", 0, 0)  # or each window reads 64 pages

    def read(self, first: int, end: int) -> np.ndarray:
        """Tokens [first, end): (end - first,) uint16, read-only; DataError if they are missing."""
        with self._explained(), self._lock:
            self._opened.seek(self._file.offset + 2 * first)
            data = self._opened.read(2 * (end - first))
        if len(data) < 2 * (end - first):
            raise DataError(
                f"{self._file.path}: has become shorter since it was opened; copy or download it "
                "again, and run the same command again"
            )
        return np.frombuffer(data, "<u2")

    def read_ahead(self, first: int, end: int) -> None:
        """Ask the kernel to read tokens [first, end) ahead of their use."""
        self._advise("POSIX_FADV_WILLNEED", self._file.offset + 2 * first, 2 * (end - first))

    def _advise(self, advice: str, offset: int, length: int) -> None:
        if hasattr(os, advice):
            with suppress(OSError):
                os.posix_fadvise(self._opened.fileno(), offset, length, getattr(os, advice))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(_unreadable(self._file.path, error)) from None


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror}); copy it again"


def _inspect_shard(path: Path, size: int, version: int, length: int) -> TokenFile:
    if version != VERSION:
        raise DataError(
            f"{path}: is a shard of version {version}, expected {VERSION}; "
            f"make it again with {PREPARE}"
        )
    expected = HEADER_BYTES + 2 * length
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: is {state}: its header says {length:,} tokens, which is {expected:,} "
            f"bytes, but the file has {size:,}; copy or download it again"
        )
    if length == 0:
        raise DataError(f"{path}: has a header but no tokens; delete it or make it again")
    return TokenFile(path, HEADER_BYTES, length)


def _inspect_headerless(path: Path, size: int) -> TokenFile:
    if size % 2:
        raise DataError(
            f"{path}: has {size:,} bytes, an odd number, so it is truncated or not uint16 "
            f"tokens; copy it again, or make it with {PREPARE}"
        )
    tokens = Reader(TokenFile(path, 0, size // 2)).read(0, min(size // 2, 1 << 16))
    zeros_even, zeros_odd = (np.count_nonzero(tokens[i::2] == 0) for i in (0, 1))
    # The high half of a uint32 is zero for every id below 65,536, and for half of llama-3's.
    if len(tokens) >= 1000 and zeros_odd > zeros_even + 0.1 * len(tokens):
        raise DataError(
            f"{path}: {2 * zeros_odd / len(tokens):.0%} of every second value is zero, as in "
            "uint32 or int64 tokens read as uint16; write it again with .astype(np.uint16), or "
            f"with {PREPARE}"
        )
    return TokenFile(path, 0, size // 2)
