"""The order of the data: each window once, a function of (seed, step), prefetched."""

import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data.loader import WindowLoader, evaluation_windows, prefetch
from jaxgpt.data.shards import TokenStream, load_split
from jaxgpt.data.token_file import DataError, write_shard

N_VOCAB = 50_257


def counting_stream(n: int, parts: int = 3) -> TokenStream:
    """Token i is i, so that a window shows where it was read."""
    return TokenStream.from_arrays(np.array_split(np.arange(n), parts))


def make_loader(n: int = 10_000, block_size: int = 16, seed: int = 1) -> WindowLoader:
    return WindowLoader(counting_stream(n), block_size, N_VOCAB, seed)


def windows_of(loader: WindowLoader, first: int, count: int) -> np.ndarray:
    return loader.read(np.arange(first, first + count))


# The order of a run


@pytest.mark.parametrize(("n", "block_size"), [(1000, 16), (48, 16), (49, 16), (10_007, 64)])
def test_an_epoch_visits_every_window_of_a_grid_once(n: int, block_size: int) -> None:
    loader = make_loader(n, block_size)
    per_epoch = (n - block_size) // block_size
    assert loader.windows_per_epoch == per_epoch
    for epoch in range(5):
        windows = windows_of(loader, epoch * per_epoch, per_epoch)
        first = windows.min()
        grid = first + block_size * np.arange(per_epoch)
        assert 0 <= first < 2 * block_size
        np.testing.assert_array_equal(np.sort(windows[:, 0]), grid)
        np.testing.assert_array_equal(
            windows - windows[:, :1], np.tile(np.arange(block_size + 1), (per_epoch, 1))
        )


def test_windows_have_other_borders_and_another_order_in_every_epoch() -> None:
    loader = make_loader(n=10_000)  # 624 windows of 16, and room for 16 offsets
    starts = loader.starts(np.arange(624 * 200)).reshape(200, 624)
    assert set(starts.min(axis=1).tolist()) == set(range(16))
    assert len({tuple(order) for order in np.argsort(starts).tolist()}) == 200


def test_every_token_is_reached() -> None:
    for n in (100, 111, 112):
        assert set(windows_of(make_loader(n), 0, 1000).ravel().tolist()) == set(range(n))


def test_windows_of_several_epochs_can_be_read_at_once() -> None:
    loader = make_loader(n=100)
    together = windows_of(loader, 3, 23)
    alone = np.concatenate([windows_of(loader, k, 1) for k in range(3, 26)])
    np.testing.assert_array_equal(together, alone)


def test_the_batch_has_its_shape_and_its_order_does_not_depend_on_accumulation() -> None:
    loader = make_loader()
    batch = loader.batch(7, 4, 6)
    assert batch.shape == (4, 6, 17)
    assert batch.dtype == np.uint16
    for accumulation in (1, 2, 24):
        other = loader.batch(7, accumulation, 24 // accumulation)
        np.testing.assert_array_equal(other.reshape(4, 6, 17), batch)
    np.testing.assert_array_equal(windows_of(loader, 7 * 24, 24).reshape(4, 6, 17), batch)


def test_a_new_loader_gives_the_same_batch_at_any_step() -> None:
    used = make_loader()
    for step in range(20):
        used.batch(step, 2, 8)
    for step in (20, 3, 10**6):
        np.testing.assert_array_equal(used.batch(step, 2, 8), make_loader().batch(step, 2, 8))


def test_another_seed_gives_another_order() -> None:
    batches = {make_loader(seed=seed).batch(0, 1, 8).tobytes() for seed in (0, 1, 2, 1337, -1)}
    assert len(batches) == 5


def test_where_the_shards_are_cut_does_not_matter(tmp_path: Path) -> None:
    for number, piece in enumerate(np.array_split(np.arange(10_000), 7)):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", piece)
    from_disk = WindowLoader(load_split(tmp_path, "train", N_VOCAB), 16, N_VOCAB, 1)
    np.testing.assert_array_equal(from_disk.batch(0, 32, 32), make_loader().batch(0, 32, 32))


class EndlessStream(TokenStream):
    """Stands for 100B tokens in 1,030 files, none of which is there."""

    def __init__(self) -> None:
        super().__init__([np.zeros(1, np.uint16)], name="endless")

    def __len__(self) -> int:
        return 100_000_000_000

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return ((starts[:, None] + np.arange(length)) % N_VOCAB).astype(np.uint16)


def test_100_billion_tokens_start_at_once_and_jump_at_once_in_little_memory() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    loader = WindowLoader(EndlessStream(), 1024, N_VOCAB, 1)
    for step in (0, 10**6):
        assert loader.batch(step, 1, 64).shape == (1, 64, 1025)
    assert time.perf_counter() - began < 1.0
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


# Too little, and bad, data


@pytest.mark.parametrize("n", [0, 16])
def test_less_than_one_window_is_refused_with_the_numbers(n: int) -> None:
    stream = TokenStream.from_arrays([np.zeros(n, int)], name="data/tiny (val)")
    for refused in (
        lambda: WindowLoader(stream, 16, N_VOCAB, 1),
        lambda: evaluation_windows(stream, 16, 10, N_VOCAB),
    ):
        with pytest.raises(DataError) as caught:
            refused()
        for part in ("data/tiny (val)", f"has {n} tokens", "needs 17", "lower --block-size"):
            assert part in str(caught.value)


def test_barely_one_window_is_one_window_that_moves_where_it_can() -> None:
    for n in (17, 20, 31, 32):
        loader = make_loader(n, block_size=16)
        assert loader.windows_per_epoch == 1
        assert set(windows_of(loader, 0, 500)[:, 0].tolist()) == set(range(n - 16))


def test_a_text_smaller_than_one_step_is_repeated_evenly() -> None:
    loader = make_loader(n=17 * 16)
    count = Counter((loader.starts(np.arange(16 * 10)) // 16).tolist())
    assert loader.batch(0, 16, 10).shape == (16, 10, 17)
    assert set(count.values()) == {10}


def test_a_bad_id_that_the_start_did_not_see_stops_the_batch_that_draws_it() -> None:
    tokens = np.zeros(1000, np.uint16)
    tokens[:] = N_VOCAB - 1
    tokens[600] = N_VOCAB
    stream = TokenStream.from_arrays([tokens[:500], tokens[500:]], name="data/odd (train)")
    loader = WindowLoader(stream, 16, N_VOCAB, 1)
    with pytest.raises(DataError, match=r"data/odd \(train\): token 100 is id 50257, outside"):
        windows_of(loader, 0, loader.windows_per_epoch)
    with pytest.raises(DataError, match="token 100 is id 50257"):
        evaluation_windows(stream, 16, 1000, N_VOCAB)


# Evaluation


def test_evaluation_windows_are_spread_distinct_and_always_the_same() -> None:
    windows = evaluation_windows(counting_stream(10_000), 16, 10, N_VOCAB)
    assert windows.shape == (10, 17)
    assert windows.dtype == np.uint16
    np.testing.assert_array_equal(windows[:, 0], np.arange(10) * 624 // 10 * 16)
    np.testing.assert_array_equal(
        windows, evaluation_windows(counting_stream(10_000, parts=9), 16, 10, N_VOCAB)
    )


def test_evaluation_takes_all_windows_when_there_are_fewer() -> None:
    for n, available in ((17, 1), (32, 1), (33, 2), (1000, 62)):
        windows = evaluation_windows(counting_stream(n), 16, 10_000, N_VOCAB)
        predicted = windows[:, 1:].ravel()
        np.testing.assert_array_equal(predicted, np.arange(1, 16 * available + 1))


def test_no_evaluation_is_no_windows() -> None:
    assert evaluation_windows(counting_stream(100), 16, 0, N_VOCAB).shape == (0, 17)


def test_a_real_loader_keeps_its_order_under_prefetching() -> None:
    loader = make_loader()
    with prefetch(lambda step: loader.batch(step, 2, 8), 10, 30) as batches:
        for step, batch in enumerate(batches, start=10):
            np.testing.assert_array_equal(batch, loader.batch(step, 2, 8))
