"""The token files of one split in a folder, read as one stream of uint16 or uint32."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np

from jaxgpt.data.token_file import (
    PREPARE,
    UINT16,
    DataError,
    Reader,
    TokenFile,
    as_tokens,
    inspect_file,
    refuse,
    token_dtype,
)
from jaxgpt.errors import first_few

# Shards of one split. FineWeb 100B has 1,030, and macOS allows 256 open files, for all sources of a
# mixture; opening one again takes 20 us.
OPEN_AT_ONCE = 40

# Below this size (0.4 GB) every id is checked at the start; above it, a sample of every file.
SCANNED_TOKENS = 200_000_000
SAMPLES, SAMPLE_TOKENS = 4096, 2048

SAMPLE_10BT = 10_000_000_000  # training tokens in FineWeb's smallest sample (exactly: 10.27B)


class TokenStream:
    """Token files or arrays as one sequence; opening it reads nothing."""

    def __init__(self, parts: Sequence[TokenFile | np.ndarray], name: str):
        self.name = name  # for messages
        self._parts = list(parts)
        self.dtype = max((part.dtype for part in parts), default=UINT16)
        lengths = [part.length if isinstance(part, TokenFile) else len(part) for part in parts]
        self._borders = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
        self._reader = lru_cache(OPEN_AT_ONCE)(Reader)

    @classmethod
    def from_arrays(cls, arrays: Sequence[np.ndarray], name: str = "tokens in memory") -> Self:
        """A stream of 1-D integer arrays; raises DataError for an id below 0 or above uint32's."""
        return cls([as_tokens(array, name) for array in arrays], name)

    def __len__(self) -> int:
        return self._borders[-1]

    def window(self, start: int, length: int) -> np.ndarray:
        """(length,) tokens from position `start`; read-only, possibly a view of the mapped file."""
        assert 0 <= start <= len(self) - length, (start, length, len(self))
        spans = list(self._spans(start, length))
        if len(spans) == 1:
            return self._tokens(*spans[0])
        window, filled = np.empty(length, self.dtype), 0
        for index, first, end in spans:  # one at a time, because a view keeps its file open
            window[filled : filled + end - first] = self._tokens(index, first, end)
            filled += end - first
        return window

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(W, length) of `dtype`: copies of the windows that begin at `starts` (W,)."""
        windows = np.empty((len(starts), length), self.dtype)
        order = np.argsort(starts)
        for row in order:
            self._read_ahead(int(starts[row]), length)
        for row in order:
            windows[row] = self.window(int(starts[row]), length)
        return windows

    def chunks(self, length: int = 1 << 22) -> Iterator[tuple[int, np.ndarray]]:
        """(position, tokens) of consecutive chunks of the stream."""
        for start in range(0, len(self), length):
            yield start, self.window(start, min(length, len(self) - start))

    def check_ids(self, windows: np.ndarray, starts: np.ndarray, n_vocab: int) -> None:
        """DataError if a token of `windows` (W, length), read at `starts` (W,), is >= n_vocab.

        n_vocab is the tokenizer's (50,257), not the model's padded 50,304: ids between the two
        would train without an error, larger ones turn the loss into NaN.
        """
        if windows.max(initial=0) < n_vocab:
            return
        row, column = np.argwhere(windows >= n_vocab)[0]
        index, place, _ = next(self._spans(int(starts[row] + column), 1))
        part = self._parts[index]
        raise DataError(
            f"{part.path if isinstance(part, TokenFile) else self.name}: token {place:,} is id "
            f"{windows[row, column]}, outside the tokenizer's {n_vocab:,}; the file is corrupt or "
            "was made with another tokenizer: name that with --tokenizer, or prepare the text "
            f"again with {PREPARE}"
        )

    def checked_windows(self, starts: np.ndarray, length: int, n_vocab: int) -> np.ndarray:
        """`windows`, with `check_ids`, of the vocabulary's dtype."""
        windows = self.windows(starts, length)
        self.check_ids(windows, starts, n_vocab)
        return windows.astype(token_dtype(n_vocab), copy=False)

    def check_all_ids(self, n_vocab: int) -> None:
        """`check_ids` of every token; reads everything."""
        for start, chunk in self.chunks():
            self.check_ids(chunk[None], np.array([start]), n_vocab)

    def fingerprint(self) -> str:
        """A hash of the length and of a sample of the tokens, to recognize the data."""
        length = min(64, len(self))
        starts = np.linspace(0, len(self) - length, 1024).astype(np.int64)
        sampled = self.windows(np.unique(starts), length)
        return hashlib.sha256(str(len(self)).encode() + sampled.tobytes()).hexdigest()[:16]

    def _spans(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(part, first, end) of every piece of a window."""
        index, stop = bisect_right(self._borders, start) - 1, start + length
        while start < stop:
            left, right = self._borders[index : index + 2]
            yield index, start - left, min(stop, right) - left
            index, start = index + 1, right

    def _tokens(self, index: int, first: int, end: int) -> np.ndarray:
        part = self._parts[index]
        if isinstance(part, np.ndarray):
            return part[first:end]
        return self._reader(part).read(first, end)

    def _read_ahead(self, start: int, length: int) -> None:
        """Ask the kernel to read a window ahead of its use.

        Otherwise 512 windows of 1,025 tokens are read one after another: 145 ms on a cold cloud
        disk instead of 9.
        """
        for index, first, end in self._spans(start, length):
            part = self._parts[index]
            if isinstance(part, TokenFile):
                self._reader(part).read_ahead(first, end)


class Wanted(NamedTuple):
    """What the error for missing tokens recommends."""

    tokens: int = SAMPLE_10BT  # of the training split
    in_mixture: bool = False


SAMPLE = Wanted()


def load_split(
    data_dir: Path, split: Literal["train", "val"], n_vocab: int, wanted: Wanted = SAMPLE
) -> TokenStream:
    """All files of a split in the order of their names, checked, as one stream.

    Headers and sizes of all files are checked. Ids are all checked in small data and sampled in
    large data, where reading 200 GB would take too long: check every batch too
    (`TokenStream.check_ids`). Raises DataError; if there are no files, its message has the command
    that makes what is `wanted`.
    """
    files, errors = inspect_split(data_dir, split, wanted)
    refuse(errors)
    tokens = TokenStream(files, name=f"{data_dir} ({split})")
    _check_or_sample_ids(tokens, files, n_vocab)
    return tokens


def inspect_split(
    data_dir: Path, split: str, wanted: Wanted = SAMPLE
) -> tuple[list[TokenFile], list[str]]:
    """The files of a split, and a sentence for each that is faulty; raises DataError for none."""
    files, errors = [], []
    for path in find_files(data_dir, split, wanted):
        try:
            files.append(inspect_file(path))
        except DataError as error:
            errors.append(str(error))
    return files, errors


def find_files(data_dir: Path, split: str, wanted: Wanted = SAMPLE) -> list[Path]:
    """The .bin or .npy files with the word `split` in their name, as edu_fineweb_val_000000.bin.

    Raises DataError if there are none.
    """
    remedy = f"make them with {prepare_command(data_dir, wanted.tokens)}, "
    if wanted.in_mixture:
        remedy += "or take this source out of the mixture (--dataset, --mixture-at)"
    else:
        remedy += (
            "choose another folder with --data-dir, or train on the text that comes with jaxgpt: "
            "--dataset embedded"
        )
    expected = f"expected {split} tokens ({split}.bin or *_{split}_*.bin)"
    try:
        is_dir = data_dir.is_dir()
        names = sorted(data_dir.iterdir()) if is_dir else []
    except OSError as error:
        raise DataError(f"{data_dir}: cannot be read ({error.strerror}); {remedy}") from None
    if not is_dir:
        what = "is a file, not a folder" if data_dir.exists() else "no such folder"
        parent = data_dir.resolve().parent
        raise DataError(
            f"{data_dir}: {what}; {expected}; {parent} {_folder_contents(parent)}; {remedy}"
        )
    paths = [path for path in token_files(names) if split_of(path) == split]
    if not paths:
        raise DataError(
            f"{data_dir}: {expected}; the folder {_folder_contents(data_dir)}; {remedy}"
        )
    return paths


def token_files(paths: Iterable[Path]) -> list[Path]:
    """Those of `paths` that contain tokens: .bin files, and .npy files named after a split.

    Hidden files, such as the ._x that macOS adds to a copy, are left out.
    """
    shown = [path for path in paths if not path.name.startswith(".")]
    return [p for p in shown if p.suffix == ".bin" or (p.suffix == ".npy" and split_of(p))]


def prepare_command(data_dir: Path, tokens: int) -> str:
    """The command that makes `tokens` training tokens in `data_dir`, FineWeb if named so."""
    out = "" if data_dir == Path("data/fineweb") else f" --out {data_dir}"
    if "fineweb" not in data_dir.name.lower():
        return f"{PREPARE} YOUR_TEXT{out}"
    billions = -(-tokens // 10**9)
    if billions * 10**9 > SAMPLE_10BT:
        return f"{PREPARE} fineweb --name sample-100BT --limit-tokens {billions}B{out}"
    return f"{PREPARE} fineweb --name sample-10BT{out}"


def _check_or_sample_ids(tokens: TokenStream, files: list[TokenFile], n_vocab: int) -> None:
    if len(tokens) <= SCANNED_TOKENS:
        tokens.check_all_ids(n_vocab)
        return
    fractions = np.linspace(0, 1, max(1, SAMPLES // len(files)))
    lengths = np.array([file.length for file in files])
    firsts = np.cumsum(lengths) - lengths
    starts = firsts[:, None] + fractions * np.maximum(lengths - SAMPLE_TOKENS, 0)[:, None]
    starts = np.minimum(starts.ravel().astype(np.int64), len(tokens) - SAMPLE_TOKENS)
    tokens.checked_windows(starts, SAMPLE_TOKENS, n_vocab)


def split_of(path: Path) -> str | None:
    """The split in a file's name, the last one if it has both: fineweb_val_000000.bin is 'val'."""
    words = re.split("[^a-z]+", path.name)
    return next((word for word in reversed(words) if word in ("train", "val")), None)


def _folder_contents(folder: Path) -> str:
    """The names in a folder, as part of a sentence."""
    try:
        names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    except FileNotFoundError:
        return "does not exist either"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"contains {first_few(names)}" if names else "is empty"
