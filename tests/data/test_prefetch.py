"""Batches made ahead on another thread."""

import itertools
import threading
import time

import pytest

from jaxgpt.data.loader import prefetch
from jaxgpt.data.token_file import DataError

# Prefetching


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 2, 100])
def test_batches_come_in_order_and_the_thread_ends(depth: int) -> None:
    with prefetch(lambda step: step * step, 3, 50, depth) as batches:
        assert list(batches) == [step * step for step in range(3, 50)]
    assert not alive()


def test_nothing_to_do_is_an_empty_iterator() -> None:
    with prefetch(lambda step: step, 5, 5) as batches:
        assert list(batches) == []


def test_batches_are_made_ahead_on_another_thread_but_not_without_bound() -> None:
    made: list[tuple[int, str]] = []
    waiting = threading.Semaphore(0)

    def make_batch(step: int) -> int:
        made.append((step, threading.current_thread().name))
        waiting.release()
        return step

    with prefetch(make_batch, 0, 100, depth=2) as batches:
        for _ in range(3):  # two that wait in the queue, and one in hand
            assert waiting.acquire(timeout=5)
        assert not waiting.acquire(timeout=0.1)
        assert made == [(0, "prefetch"), (1, "prefetch"), (2, "prefetch")]
        assert next(batches) == 0
        assert waiting.acquire(timeout=5)


def test_an_error_is_raised_at_its_step_and_is_the_last() -> None:
    tried = []

    def make_batch(step: int) -> int:
        tried.append(step)
        if step == 3:
            raise DataError("shard 3 is bad")
        return step

    with prefetch(make_batch, 0, 9) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(DataError, match="shard 3 is bad"):
            next(batches)
        assert next(batches, "ended") == "ended"
    assert not alive()
    assert tried == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("depth", "taken", "pause"),
    [
        (1, 0, 0),  # the thread waits for room in the queue
        (1, 1, 0.01),  # the thread is making a batch
        (2, 4, 0.001),
        (5, 0, 0.01),  # nothing is ready yet
        (5, 4, 0),
    ],
)
def test_leaving_early_ends_the_thread_and_does_not_hang(
    depth: int, taken: int, pause: float
) -> None:
    began = time.perf_counter()
    with prefetch(lambda _: time.sleep(pause), 0, 10**9, depth) as batches:
        for _ in itertools.islice(batches, taken):
            pass
    assert time.perf_counter() - began < 2
    assert not alive()
    assert next(batches, "ended") == "ended"


def test_an_interrupt_of_the_consumer_ends_the_thread_and_passes() -> None:
    def consume() -> None:
        with prefetch(lambda step: step, 0, 10**9) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not alive()
