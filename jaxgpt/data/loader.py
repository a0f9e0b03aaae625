"""Batches of token windows: which windows a training step reads.

There is no iterator state to save. Window k of a run is a pure function of (seed, k), so a resumed
run gets the same batch for its next step as an uninterrupted one.
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import isqrt
from typing import TypeVar

import numpy as np

from jaxgpt.data.shards import TokenStream
from jaxgpt.data.token_file import PREPARE, DataError

Batch = TypeVar("Batch")

MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's increment
JOIN_SECONDS = 10  # a read that hangs on a lost disk must not stop a run from ending
ROUNDS = 12  # over 20,000 seeds all orders of six windows are equally frequent; with 8 they are not


def shuffled_index(i: np.ndarray, n: int, seed: int | np.ndarray) -> np.ndarray:
    """Element `i` of a shuffled range(n), for each `i`: uint64 (W,) -> (W,), a bijection of [0, n).

    Needs no table, so n may be 10**12. `seed` is a scalar, or an array (W,) with one for each `i`.
    A Feistel network over a grid of rows x columns >= n; results outside [0, n) are permuted again
    until they are inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    rows = isqrt(n - 1) + 1
    columns = -(-n // rows)
    seeds = np.atleast_1d(np.asarray(seed & MASK_64, np.uint64))
    index = _permute(np.asarray(i, np.uint64), rows, columns, seeds)
    while (outside := index >= n).any():
        index = np.where(outside, _permute(index, rows, columns, seeds), index)
    return index


def _permute(index: np.ndarray, rows: int, columns: int, seeds: np.ndarray) -> np.ndarray:
    row, column = np.divmod(index, np.uint64(columns))
    for turn in range(ROUNDS):
        key = _mix(seeds + (turn * GOLDEN & MASK_64))
        # The remainder is taken before adding: a sum that wraps at 2**64 would break the bijection.
        if turn % 2:
            column = (column + _mix(row ^ key) % columns) % columns
        else:
            row = (row + _mix(column ^ key) % rows) % rows
    return row * columns + column


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): each bit affects all output bits."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


class Loader(ABC):
    """The windows of a run, each a function of its number."""

    block_size: int

    @abstractmethod
    def read(self, k: np.ndarray) -> np.ndarray:
        """(W, T+1): windows `k` (W,) of the run; DataError for an id outside the vocabulary."""

    def batch(
        self, step: int, accumulation: int, batch_size: int, rows: slice = slice(None)
    ) -> np.ndarray:
        """(A, B, T+1): the windows of one optimizer step; their order depends on A*B only.

        Only `rows` of each of the A micro-batches are read.
        """
        numbers = window_numbers(step, accumulation, batch_size, rows)
        return self.read(numbers.reshape(-1)).reshape(*numbers.shape, self.block_size + 1)


class WindowLoader(Loader):
    """The windows of a run; window k depends only on (seed, k).

    An epoch cuts the stream into a grid of windows and visits each once. A window has T+1 tokens,
    for inputs and targets, and shares its last token with the next one, so an epoch predicts no
    token twice. Every epoch shifts the grid, so that documents are cut in other places.
    """

    def __init__(self, tokens: TokenStream, block_size: int, n_vocab: int, seed: int):
        """Raises DataError if the stream is shorter than one window."""
        _check_length(tokens, block_size)
        self.tokens, self.block_size, self.n_vocab, self.seed = tokens, block_size, n_vocab, seed
        # One block less than would fit, so that the grid can be shifted.
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)

    def read(self, k: np.ndarray) -> np.ndarray:
        return self.tokens.checked_windows(self.starts(k), self.block_size + 1, self.n_vocab)

    def starts(self, k: np.ndarray) -> np.ndarray:
        """(W,) int64: the positions of windows `k` (W,) in the stream."""
        epoch, place = np.divmod(k.astype(np.uint64), np.uint64(self.windows_per_epoch))
        epoch_seed = _mix(_mix(np.array([self.seed & MASK_64], np.uint64)) + epoch)
        n_offsets = len(self.tokens) - self.block_size * self.windows_per_epoch
        offset = _mix(epoch_seed) % n_offsets
        index = shuffled_index(place, self.windows_per_epoch, epoch_seed)
        return (offset + index * self.block_size).astype(np.int64)


def window_numbers(
    step: int, accumulation: int, batch_size: int, rows: slice = slice(None)
) -> np.ndarray:
    """(A, rows) uint64: the windows of one optimizer step, of `rows` of each micro-batch."""
    count = accumulation * batch_size
    numbers = np.arange(step * count, (step + 1) * count, dtype=np.uint64)
    return numbers.reshape(accumulation, batch_size)[:, rows]


def evaluation_windows(
    tokens: TokenStream, block_size: int, count: int, n_vocab: int
) -> np.ndarray:
    """(W, T+1), W = min(count, available): evenly spaced, the same in every run.

    No token is predicted twice. Raises DataError if the stream is shorter than one window or an id
    is outside the vocabulary.
    """
    _check_length(tokens, block_size)
    available = (len(tokens) - 1) // block_size
    count = min(count, available)
    starts = np.arange(count) * available // count * block_size
    return tokens.checked_windows(starts, block_size + 1, n_vocab)


def first_windows(
    tokens: TokenStream, block_size: int, count: int, n_vocab: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Batches (batch_size or less, T+1) of the first `count` consecutive windows.

    Every token but the first is predicted once. Raises DataError if the stream is shorter than one
    window or an id is outside the vocabulary.
    """
    _check_length(tokens, block_size)
    count = min(count, (len(tokens) - 1) // block_size)
    for first in range(0, count, batch_size):
        starts = np.arange(first, min(first + batch_size, count)) * block_size
        yield tokens.checked_windows(starts, block_size + 1, n_vocab)


def _check_length(tokens: TokenStream, block_size: int) -> None:
    if len(tokens) < block_size + 1:
        raise DataError(
            f"{tokens.name}: has {len(tokens):,} tokens, but one window of --block-size "
            f"{block_size} needs {block_size + 1:,}; lower --block-size, or prepare more text "
            f"with {PREPARE}"
        )


@contextmanager
def prefetch(
    make_batch: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Iterator[Iterator[Batch]]:
    """An iterator over make_batch(start), ..., make_batch(stop - 1), prefetched on a thread.

    Use it as `with prefetch(make_batch, start, stop) as batches:`. At most `depth` batches are
    queued. An exception of make_batch is raised here, at its step; leaving the block ends
    the thread.
    """
    assert depth >= 1, "a queue of size 0 is unbounded"
    ready: queue.Queue[Future[Batch]] = queue.Queue(depth)
    closed = threading.Event()

    def work() -> None:
        for step in range(start, stop):
            future: Future[Batch] = Future()
            try:
                future.set_result(make_batch(step))
            except BaseException as error:
                future.set_exception(error)
            ready.put(future)
            if closed.is_set() or future.exception():
                return

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    batches = (ready.get().result() for _ in range(start, stop))
    try:
        yield batches
    finally:
        closed.set()
        batches.close()
        with suppress(queue.Empty):
            while True:  # the thread may be waiting to put a batch
                ready.get_nowait()
        thread.join(JOIN_SECONDS)
