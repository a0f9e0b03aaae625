"""Files as bytes, and bytes as lines, whatever their length and however they are compressed."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from jaxgpt.errors import UserError, first_line

CHUNK = 1 << 20  # bytes read at a time
ZSTD_CHUNK = 1 << 8  # of .zst: what comes of it has no bound, and 12 bytes can hold 128 KB


def read_chunks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """A file's bytes, decompressed, a MB or so at a time; UserError where it is damaged.

    The marker that Windows puts first is left out: it is no text.
    """
    chunks = _decompress(file, path)
    head = b""
    while len(head) < len(codecs.BOM_UTF8) and (chunk := next(chunks, None)) is not None:
        head += chunk
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from chunks


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in chunks."""
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


def lines_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """The lines that begin in [start, stop) of a file that is not compressed."""
    if start:
        file.seek(start - 1)
        file.readline()
    elif file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    position = file.tell()
    while position < stop and (line := file.readline()):
        position += len(line)
        yield line


def paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines joined to what blank lines part."""
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


def _decompress(file: BinaryIO, path: str) -> Iterator[bytes]:
    name = path.lower()
    try:
        if name.endswith(".zst"):
            yield from _decompress_zstd(file)
            return
        source = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else file
        while chunk := source.read(CHUNK):
            yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}: is damaged or cut short ({first_line(error)}); copy or download it again"
        ) from None


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Raises EOFError where the last frame is incomplete, which zstandard's reader passes over."""
    import zstandard

    # 2 GB, zstd's largest window: files made with --long, as many corpora are.
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
        raise EOFError("its end is missing")
