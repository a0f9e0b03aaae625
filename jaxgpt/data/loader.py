"""Where a run is in its data: step in, batch of token windows out.

There is no iterator state to save. Window k of a run is a pure function of (seed, k), so a
restart asks for the next step and gets the batch that an uninterrupted run would have had.
"""

import queue
import threading
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
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: splitmix64's step from one key to the next
JOIN_SECONDS = 10  # a read that hangs on a lost disk must not keep a run from ending
ROUNDS = 12  # over 20,000 seeds all orders of six windows come equally often; with 8, not yet


def shuffled_index(i: np.ndarray, n: int, seed: int | np.ndarray) -> np.ndarray:
    """Where a shuffle of range(n) puts each `i`: uint64 (W,) -> (W,), a bijection of [0, n).

    Needs no table, so n may be 10**12. `seed` is one for all, or one for each `i` (W,).
    A Feistel network over a grid of rows x columns >= n; what lands outside [0, n) is permuted
    again until it is inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
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
    """splitmix64's finalizer (Steele, Lea and Flood 2014): any bit in flips every bit out."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


class WindowLoader:
    """The windows of a run, in an order that depends on (seed, k) and on nothing else.

    An epoch cuts the stream into a grid of windows and visits each once. A window holds T+1
    tokens, inputs and targets, and its last token is the next one's first, so that an epoch
    predicts no token twice. Every epoch moves the grid, so that documents are cut elsewhere.
    """

    def __init__(self, tokens: TokenStream, block_size: int, n_vocab: int, seed: int):
        """Raises DataError if the stream has no whole window."""
        _check_length(tokens, block_size)
        self.tokens, self.block_size, self.n_vocab, self.seed = tokens, block_size, n_vocab, seed
        # A block less than there is, so that the grid has room to move.
        self.windows_per_epoch = max(1, (len(tokens) - block_size) // block_size)

    def batch(
        self, step: int, accumulation: int, batch_size: int, rows: slice = slice(None)
    ) -> np.ndarray:
        """(A, B, T+1) uint16: the windows of one optimizer step; their order knows only A*B.

        Of each of the A micro-batches only `rows` are read.
        """
        count = accumulation * batch_size
        numbers = np.arange(step * count, (step + 1) * count, dtype=np.uint64)
        chosen = numbers.reshape(accumulation, batch_size)[:, rows]
        return self._read(chosen.reshape(-1)).reshape(*chosen.shape, self.block_size + 1)

    def windows(self, first: int, count: int) -> np.ndarray:
        """(count, T+1) uint16: windows first to first+count-1 of the run; DataError on a bad id."""
        return self._read(np.arange(first, first + count, dtype=np.uint64))

    def starts(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: where these windows begin in the stream."""
        return self._starts(np.arange(first, first + count, dtype=np.uint64))

    def _read(self, k: np.ndarray) -> np.ndarray:
        starts = self._starts(k)
        windows = self.tokens.windows(starts, self.block_size + 1)
        self.tokens.check_ids(windows, starts, self.n_vocab)
        return windows

    def _starts(self, k: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(k, np.uint64(self.windows_per_epoch))
        epoch_seed = _mix(_mix(np.array([self.seed & MASK_64], np.uint64)) + epoch)
        room = len(self.tokens) - self.block_size * self.windows_per_epoch
        offset = _mix(epoch_seed) % room
        index = shuffled_index(place, self.windows_per_epoch, epoch_seed)
        return (offset + index * self.block_size).astype(np.int64)

    def epoch(self, step: int, sequences_per_step: int) -> float:
        """How many times the data has been seen when `step` begins."""
        return step * sequences_per_step / self.windows_per_epoch


def evaluation_windows(
    tokens: TokenStream, block_size: int, count: int, n_vocab: int
) -> np.ndarray:
    """(W, T+1) uint16, W = min(count, all there are): spread evenly, the same in every run.

    No token is predicted twice. Raises DataError if there is no whole window or an id is bad.
    """
    _check_length(tokens, block_size)
    available = (len(tokens) - 1) // block_size
    count = min(count, available)
    starts = np.arange(count) * available // count * block_size
    windows = tokens.windows(starts, block_size + 1)
    tokens.check_ids(windows, starts, n_vocab)
    return windows


def first_windows(
    tokens: TokenStream, block_size: int, count: int, n_vocab: int, batch_size: int
) -> Iterator[np.ndarray]:
    """Batches (batch_size or less, T+1) uint16 of the first `count` windows, end to end.

    No token is predicted twice, and none but the first is passed over. Raises DataError if there
    is no whole window or an id is bad.
    """
    _check_length(tokens, block_size)
    count = min(count, (len(tokens) - 1) // block_size)
    for first in range(0, count, batch_size):
        starts = np.arange(first, min(first + batch_size, count)) * block_size
        windows = tokens.windows(starts, block_size + 1)
        tokens.check_ids(windows, starts, n_vocab)
        yield windows


def _check_length(tokens: TokenStream, block_size: int) -> None:
    if len(tokens) < block_size + 1:
        raise DataError(
            f"{tokens.name}: has {len(tokens):,} tokens, and one window of --block-size "
            f"{block_size} needs {block_size + 1:,}; lower --block-size, or prepare more text "
            f"with {PREPARE}"
        )


@contextmanager
def prefetch(
    make_batch: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Iterator[Iterator[Batch]]:
    """An iterator over make_batch(start), ..., make_batch(stop - 1), made ahead on a thread.

    Use it as `with prefetch(make_batch, start, stop) as batches:`. At most `depth` batches wait.
    What make_batch raises is raised again here, at its step; leaving the block ends the thread.
    """
    assert depth >= 1, "a queue of size 0 has no bound"
    ready: queue.Queue[Future[Batch]] = queue.Queue(depth)
    closed = threading.Event()

    def work() -> None:
        for step in range(start, stop):
            made = _attempt(make_batch, step)
            ready.put(made)
            if closed.is_set() or made.exception():
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
            while True:  # makes room for a thread that waits to put its batch
                ready.get_nowait()
        thread.join(JOIN_SECONDS)


def _attempt(make_batch: Callable[[int], Batch], step: int) -> Future[Batch]:
    made: Future[Batch] = Future()
    try:
        made.set_result(make_batch(step))
    except BaseException as error:
        made.set_exception(error)
    return made
