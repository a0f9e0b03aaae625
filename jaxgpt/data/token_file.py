"""One token file: recognizing its format, checking it, and writing it.

llm.c's and modded-nanogpt's shards begin with a magic number, which also tells whether a token is a
uint16 or, for a vocabulary above 65,536 as Llama 3's, a uint32. nanoGPT's `train.bin` and `val.bin`
have no header; only files with exactly those two names may have none.
"""

import errno
import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.errors import UserError, first_line
from jaxgpt.files import atomic_write, open_file


class Format(NamedTuple):
    """A format of llm.c's shards: 256 int32 [magic, version, tokens, 0, ...], then the tokens.

    From llm.c's dev/data/data_common.py.
    """

    magic: int
    version: int
    dtype: np.dtype


UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
FORMATS = (Format(20240520, 1, UINT16), Format(20240801, 7, UINT32))  # of GPT-2, of Llama 3
HEADER_BYTES = 256 * 4
FOREIGN_MAGICS = {20240522: "llm.c's HellaSwag questions"}
HEADERLESS_NAMES = ("train.bin", "val.bin")
PREPARE = "python -m jaxgpt.prepare"  # the command that makes such files


class DataError(UserError):
    """An error in the user's token files; the message names the file, reason and remedy."""


def refuse(errors: Sequence[str]) -> None:
    """Raise DataError with the first five of `errors`, if there are any."""
    more = [f"and {len(errors) - 5} more"] if len(errors) > 5 else []
    if errors:
        raise DataError("\n".join([*errors[:5], *more]))


def token_dtype(n_vocab: int) -> np.dtype:
    """The dtype of the tokens of a vocabulary: uint16 up to 65,536 ids, else uint32."""
    return UINT16 if n_vocab <= 1 << 16 else UINT32


class TokenFile(NamedTuple):
    """A file, and where its tokens are."""

    path: Path
    offset: int  # bytes before the first token
    length: int  # tokens
    dtype: np.dtype = UINT16

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.offset + self.length * self.dtype.itemsize


def inspect_file(path: Path) -> TokenFile:
    """Detect the format of one file and check its header and size; raises DataError."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if hasattr(os, "posix_fadvise"):  # or the kernel reads ahead, 8 MB per file
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from None
    if size == 0:
        raise DataError(f"{path}: is empty; copy it again, or make it with {PREPARE}")
    magic, version, length = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        return _inspect_npy(path, size)
    for format in FORMATS:
        if magic == format.magic:
            return _inspect_shard(path, size, version, length, format)
    if magic not in FOREIGN_MAGICS and path.name in HEADERLESS_NAMES:
        return _inspect_headerless(path, size)
    found = FOREIGN_MAGICS.get(magic, "not a token shard")
    raise DataError(
        f"{path}: starts with {magic}, which is {found}; expected {FORMATS[0].magic}, a shard of "
        f"uint16 tokens, or {FORMATS[1].magic}, of uint32; make such shards with {PREPARE} (files "
        "without a header must be named train.bin or val.bin)"
    )


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write 1-D integer tokens as an llm.c shard; DataError for one that fits into no format."""
    tokens = np.ascontiguousarray(as_tokens(tokens, str(path)))
    write_pieces(path, length=len(tokens), pieces=[tokens], dtype=tokens.dtype)


def write_pieces(path: Path, length: int, pieces: Iterable[np.ndarray], dtype: np.dtype) -> str:
    """Write a shard of `length` tokens from arrays of `dtype`; returns the file's SHA-256."""
    format = next(format for format in FORMATS if format.dtype == dtype)
    assert 0 < length <= np.iinfo(np.int32).max, "the length in the header is an int32"
    header = np.zeros(256, "<i4")
    header[:3] = format.magic, format.version, length
    digest, written = hashlib.sha256(), 0
    with atomic_write(path) as file:
        for piece in chain([header], pieces):
            assert piece is header or piece.dtype == dtype
            file.write(piece.data)
            digest.update(piece.data)
            written += piece.nbytes
        assert written == HEADER_BYTES + dtype.itemsize * length, (path, written, length)
    return digest.hexdigest()


def as_tokens(tokens: np.ndarray, name: str) -> np.ndarray:
    """(n,) integers as uint16, or as uint32 where one needs it; DataError if it fits into neither.

    `astype` alone would wrap 65,541 to 5.
    """
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(f"{name}: tokens must be 1-D integers, not {tokens.ndim}-D {tokens.dtype}")
    largest = int(np.iinfo(UINT32).max)
    outside = tokens[(tokens < 0) | (tokens > largest)]
    if outside.size:
        raise DataError(f"{name}: token id {outside[0]} is not one of 0 to {largest:,}")
    return tokens.astype(token_dtype(int(tokens.max(initial=0)) + 1), copy=False)


class Reader:
    """A memory-mapped token file; its methods may be called from several threads."""

    def __init__(self, file: TokenFile):
        """Raises DataError if the file cannot be mapped."""
        self._file = file
        try:
            with open_file(file.path) as opened:
                self._memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._tokens = np.frombuffer(self._memory, file.dtype, file.length, file.offset)
        except OSError as error:
            raise DataError(_unreadable(file.path, error)) from None
        except ValueError:  # nothing to map, or less than file.length
            raise self._cut_short() from None

    def read(self, first: int, end: int) -> np.ndarray:
        """Tokens [first, end), a read-only view of the file; DataError if they are missing.

        Its present size is checked, because reading a page beyond the end raises SIGBUS.
        """
        if self._memory.size() < self._position(end):
            raise self._cut_short()
        return self._tokens[first:end]

    def read_ahead(self, first: int, end: int) -> None:
        """Ask the kernel to read tokens [first, end) ahead of their use."""
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self._position(first) // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_WILLNEED, begin, self._position(end) - begin)

    def _position(self, token: int) -> int:
        return self._file.offset + self._file.dtype.itemsize * token

    def _cut_short(self) -> DataError:
        return DataError(
            f"{self._file.path}: has become shorter since it was opened; copy or download it "
            "again, and run the same command again"
        )


def _unreadable(path: Path, error: OSError) -> str:
    remedy = "make it readable, or copy it again"
    if error.errno == errno.EMFILE:
        remedy = "allow more open files (ulimit -n 1024)"
    return f"{path}: cannot be read ({error.strerror}); {remedy}"


def _inspect_shard(path: Path, size: int, version: int, length: int, format: Format) -> TokenFile:
    if version != format.version:
        raise DataError(
            f"{path}: is a shard of version {version}, expected {format.version}; "
            f"make it again with {PREPARE}"
        )
    file = TokenFile(path, HEADER_BYTES, length, format.dtype)
    expected = file.size
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path}: is {state}: its header says {length:,} tokens, which is {expected:,} "
            f"bytes, but the file has {size:,}; copy or download it again"
        )
    if length == 0:
        raise DataError(f"{path}: has a header but no tokens; delete it or make it again")
    return file


def _inspect_npy(path: Path, size: int) -> TokenFile:
    """build-nanogpt's shards: what np.save writes of a 1-D array."""
    try:
        with open_file(path) as file:
            is_first = np.lib.format.read_magic(file) == (1, 0)
            first, second = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
            shape, _, dtype = (first if is_first else second)(file)
            offset = file.tell()
    except ValueError as error:
        raise DataError(
            f"{path}: is not a .npy file ({first_line(error)}); copy it again"
        ) from None
    if dtype not in (UINT16, UINT32) or len(shape) != 1 or not shape[0]:
        raise DataError(
            f"{path}: is an array of {dtype} and shape {shape}; expected 1-D uint16 or uint32 "
            f"tokens; make such shards with {PREPARE}"
        )
    tokens = TokenFile(path, offset, shape[0], dtype)
    if size != tokens.size:
        raise DataError(f"{path}: has {size:,} bytes, expected {tokens.size:,}; copy it again")
    return tokens


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
            f"{path}: {2 * zeros_odd / len(tokens):.0%} of its odd-numbered values are zero, as "
            "in uint32 or int64 tokens read as uint16; write it again with .astype(np.uint16), or "
            f"with {PREPARE}"
        )
    return TokenFile(path, 0, size // 2)
