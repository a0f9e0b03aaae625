"""The shuffle of the windows: each once, every order equally often, the same for ever."""

import itertools
from collections import Counter

import numpy as np
import pytest

from jaxgpt.data import loader as loader_module
from jaxgpt.data.loader import WindowLoader, shuffled_index
from jaxgpt.data.shards import TokenStream

# The shuffle


def test_the_shuffle_is_a_bijection() -> None:
    sizes = (*range(1, 70), 255, 256, 257, 1000, 4096, 10_007, 99_999)
    for n, seed in itertools.product(sizes, (0, 1, 2, -1, 2**63, 2**64 - 1)):
        shuffled = shuffled_index(np.arange(n), n, seed)
        assert shuffled.dtype == np.uint64
        np.testing.assert_array_equal(np.sort(shuffled), np.arange(n), err_msg=f"{n=} {seed=}")


@pytest.mark.parametrize("n", [2**32 + 1, 10**12, 2**62 + 3])
def test_the_shuffle_of_a_huge_range_stays_inside_and_collides_nowhere(n: int) -> None:
    i = np.linspace(0, n - 1, 200_000).astype(np.uint64)
    assert len(np.unique(i)) == len(np.unique(shuffled_index(i, n, 3))) == 200_000
    assert shuffled_index(i, n, 3).max() < n


def test_the_shuffle_gives_the_same_numbers_for_ever() -> None:
    """A changed order is a changed data position: every run in flight would see other data."""
    assert shuffled_index(np.arange(10), 10, 1337).tolist() == [0, 9, 5, 7, 8, 6, 3, 2, 4, 1]
    huge = [275012276992, 346376705006, 198229731876]
    assert shuffled_index(np.arange(3), 10**12, 1337).tolist() == huge
    loader = WindowLoader(TokenStream.from_arrays([np.arange(10_000)]), 16, 50_257, 1337)
    assert loader.starts(np.arange(622, 626)).tolist() == [3877, 7477, 8504, 1352]


def test_a_sum_that_would_wrap_at_64_bits_keeps_the_bijection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader_module, "_mix", lambda x: np.full_like(x, 2**64 - 1))
    np.testing.assert_array_equal(np.sort(shuffled_index(np.arange(11), 11, 1)), np.arange(11))


def test_a_common_seed_and_a_seed_per_index_agree() -> None:
    i, seeds = np.arange(50), np.repeat(np.arange(5, dtype=np.uint64), 10)
    alone = [shuffled_index(i[10 * s : 10 * s + 10], 50, s) for s in range(5)]
    np.testing.assert_array_equal(shuffled_index(i, 50, seeds), np.concatenate(alone))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_windows_come_equally_often(n: int) -> None:
    seeds = 10_000
    i, seed_of_i = np.tile(np.arange(n), seeds), np.repeat(np.arange(seeds, dtype=np.uint64), n)
    orders = Counter(map(tuple, shuffled_index(i, n, seed_of_i).reshape(seeds, n).tolist()))
    every = list(itertools.permutations(range(n)))
    expected = seeds / len(every)
    chi_squared = sum((orders[order] - expected) ** 2 / expected for order in every)
    freedom = len(every) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5


def test_the_shuffle_of_many_windows_leaves_no_trace_of_the_order() -> None:
    n = 100_000
    shuffled = shuffled_index(np.arange(n), n, 7).astype(float)
    for lag in (1, 2, 316, 317, 318):  # 317 is the side of the grid inside
        assert abs(np.corrcoef(shuffled[lag:], shuffled[:-lag])[0, 1]) < 0.015
    assert abs(np.corrcoef(shuffled, np.arange(n))[0, 1]) < 0.015
