"""Mixtures: the shares hold, and each source is read as if it were trained on alone."""

from fractions import Fraction

import numpy as np
import pytest

from jaxgpt.config.mixture import End, parse_shares
from jaxgpt.data.loader import WindowLoader
from jaxgpt.data.mixture import Cycle, MixtureLoader
from jaxgpt.data.shards import TokenStream

LENGTHS = {"fineweb": 9_000, "mine": 400, "code": 3_000}
FIRST = {name: 10_000 * place for place, name in enumerate(LENGTHS)}  # the first token of each
STREAMS = {
    name: TokenStream.from_arrays([np.arange(FIRST[name], FIRST[name] + length)])
    for name, length in LENGTHS.items()
}
STAGES = [
    (0, parse_shares("fineweb:0.7,mine:0.2,code:0.1")),
    (1_000, parse_shares("fineweb:1,code:2")),
    (150_777, parse_shares("mine:1,fineweb:2")),
]


def make_loader(stages=STAGES, seed: int = 1) -> MixtureLoader:
    return MixtureLoader(STREAMS, stages, 16, 50_257, seed)


@pytest.mark.parametrize("text", ["a:0.7,b:0.2,c:0.1", "a:1,b:1,c:1", "a:0.98765,b:0.01,c:0.002"])
def test_shares_hold_over_100k_windows_and_in_every_batch(text: str) -> None:
    shares = parse_shares(text)
    cycle = Cycle.of(shares, list(shares))
    expected = np.array([float(share) for share in shares.values()])
    assert np.abs(cycle.among(100_000) / 100_000 - expected).max() <= 1e-5
    sources = np.concatenate([cycle.source_C, cycle.source_C])
    sofar = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    for batch in (8, 512):
        counts = sofar[batch:] - sofar[:-batch]
        assert np.abs(counts - batch * expected).max() <= 4  # sources + 1


def test_each_source_is_read_in_its_own_order_across_stages_and_cycles() -> None:
    loader = make_loader()
    source_W, index_W = loader.locate(np.arange(260_000))
    for source, count in enumerate(loader.count(260_000).tolist()):
        np.testing.assert_array_equal(index_W[source_W == source], np.arange(count))
    late = np.arange(150_700, 150_900)
    np.testing.assert_array_equal(loader.locate(late)[1], index_W[late])
    windows = loader.read(np.arange(150_700, 150_900))
    owner = np.searchsorted(list(FIRST.values()), windows[:, 0], side="right") - 1
    np.testing.assert_array_equal(owner, source_W[late])
    alone = [each.read(index_W[late][source_W[late] == s]) for s, each in enumerate(loader.loaders)]
    for s, expected in enumerate(alone):
        np.testing.assert_array_equal(windows[owner == s], expected)


def test_a_batch_depends_on_neither_accumulation_nor_processes_nor_earlier_steps() -> None:
    whole = make_loader().batch(41, 1, 24)[0]  # its windows are on both sides of a stage's border
    assert len({*make_loader().locate(np.arange(41 * 24, 42 * 24))[0].tolist()}) == 3
    used = make_loader()
    for accumulation, batch_size in ((2, 12), (24, 1)):
        parts = used.batch(41, accumulation, batch_size)
        np.testing.assert_array_equal(parts.reshape(24, 17), whole)
    for processes in (2, 4):
        places = np.arange(12).reshape(processes, -1)
        rows = [slice(place[0], place[-1] + 1) for place in places]
        shares = [make_loader().batch(41, 2, 12, of_one) for of_one in rows]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1).reshape(24, 17), whole)


def test_a_single_source_is_read_as_before_mixtures_and_others_may_join_later() -> None:
    alone = WindowLoader(STREAMS["fineweb"], 16, 50_257, 7)
    one = {"fineweb": Fraction(1)}
    loader = make_loader([(0, one)], seed=7)
    np.testing.assert_array_equal(loader.batch(300_000, 4, 8), alone.batch(300_000, 4, 8))
    staged = make_loader([(0, one), (9_600, STAGES[0][1])], seed=7)
    np.testing.assert_array_equal(staged.batch(299, 4, 8), alone.batch(299, 4, 8))


def test_sources_of_the_same_length_have_orders_of_their_own() -> None:
    tokens = STREAMS["fineweb"]
    loader = MixtureLoader(
        {"a": tokens, "b": tokens}, [(0, parse_shares("a:1,b:1"))], 16, 50_257, 1
    )
    windows = loader.batch(0, 1, 64)[0]
    assert {*windows[::2, 0].tolist()} != {*windows[1::2, 0].tolist()}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_run_ends_at_the_last_step_that_repeats_no_window_of_any_source(name: str) -> None:
    others = "".join(f",{other}:0.01" for other in LENGTHS if other != name)
    stages = [(0, parse_shares(f"{name}:0.2{others}")), (300, parse_shares(f"{name}:1{others}"))]
    loader = make_loader(stages)
    end = loader.end(batch=8, max_iters=2000)
    assert end is not None
    assert end.source == name
    source_W, index_W = loader.locate(np.arange(8 * (end.step + 1)))
    limits = np.array([each.windows_per_epoch for each in loader.loaders])
    repeated = index_W >= limits[source_W]
    assert not repeated[:-8].any()
    assert repeated[-8:].any()
    assert loader.end(batch=8, max_iters=end.step) is None


def test_the_last_step_may_take_the_last_window() -> None:
    alone = MixtureLoader({"mine": STREAMS["mine"]}, [(0, {"mine": Fraction(1)})], 16, 50_257, 1)
    assert alone.loaders[0].windows_per_epoch == 24
    assert alone.end(batch=8, max_iters=9) == End(3, "mine")


def test_the_epochs_count_how_often_each_source_is_seen() -> None:
    epochs = make_loader().epochs(1_000)
    windows = {name: (length - 16) // 16 for name, length in LENGTHS.items()}
    expected = {"fineweb": 700, "mine": 200, "code": 100}
    assert epochs == {name: expected[name] / windows[name] for name in LENGTHS}
