"""Token files: reading, refusing with a message, writing."""

import os
import pickle
import re
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data import shards
from jaxgpt.data.shards import TokenStream, load_split
from jaxgpt.data.token_file import DataError, inspect_file, write_shard

N_VOCAB = 50_257


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n, dtype=np.uint16)


def header(*words: int) -> bytes:
    return np.array([*words, *[0] * (256 - len(words))], "<i4").tobytes()


# What is read


def test_write_shard_writes_the_header_of_llm_c(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([50256, 1, 258], np.uint16))
    written = (tmp_path / "a.bin").read_bytes()
    assert written[:16] == bytes.fromhex("88d83401 01000000 03000000 00000000")
    assert written[16:1024] == bytes(1008)
    assert written[1024:] == bytes.fromhex("50c4 0100 0201")


def test_shards_are_read_in_the_order_of_their_names_as_one_stream(tmp_path: Path) -> None:
    tokens = random_tokens(1000)
    for number, piece in ((3, tokens[600:]), (1, tokens[:100]), (2, tokens[100:600])):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", piece)
    stream = load_split(tmp_path, "train", N_VOCAB)
    assert len(stream) == 1000
    np.testing.assert_array_equal(stream.window(0, 1000), tokens)


def test_windows_cross_shard_borders(tmp_path: Path) -> None:
    tokens = random_tokens(40)
    for number, piece in enumerate(np.split(tokens, [1, 2, 9, 30])):
        write_shard(tmp_path / f"train_{number}.bin", piece)
    on_disk = load_split(tmp_path, "train", N_VOCAB)
    in_memory = TokenStream.from_arrays(np.split(tokens, [1, 2, 9, 9, 30]))
    starts = np.random.default_rng(1).permutation(40 - 7)
    expected = np.stack([tokens[start : start + 7] for start in starts])
    for stream in (on_disk, in_memory):
        windows = stream.windows(starts, 7)
        assert windows.dtype == np.uint16
        np.testing.assert_array_equal(windows, expected)
        np.testing.assert_array_equal(stream.window(0, 40), tokens)


@pytest.mark.parametrize(
    "name",
    [
        "fineweb_{}_000001.bin",
        "finewebedu_{}_000000.bin",
        "edu_fineweb_{}_000001.bin",
        "TinyStories_{}.bin",
        "{}_000_001.bin",
        "{}.bin",
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_published_names_are_found(tmp_path: Path, name: str, split: str) -> None:
    write_shard(tmp_path / name.format(split), random_tokens(10))
    write_shard(tmp_path / name.format("test"), random_tokens(11))
    write_shard(tmp_path / f"pre{split}ed.bin", random_tokens(12))
    (tmp_path / f"{name.format(split)}.tmp").write_bytes(b"unfinished")
    assert len(load_split(tmp_path, split, N_VOCAB)) == 10


def test_train_and_val_do_not_mix(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_val_000000.bin", random_tokens(10))
    write_shard(tmp_path / "train_train_000001.bin", random_tokens(20))
    assert len(load_split(tmp_path, "val", N_VOCAB)) == 10
    assert len(load_split(tmp_path, "train", N_VOCAB)) == 20


def test_headerless_files_of_nanogpt_are_read(tmp_path: Path) -> None:
    random_tokens(500).tofile(tmp_path / "train.bin")
    random_tokens(100, seed=1).tofile(tmp_path / "val.bin")
    for split, n, seed in (("train", 500, 0), ("val", 100, 1)):
        stream = load_split(tmp_path, split, N_VOCAB)
        np.testing.assert_array_equal(stream.window(0, len(stream)), random_tokens(n, seed))


class Bomb:
    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_the_pickle_of_nanogpt_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb()))
    random_tokens(500).tofile(tmp_path / "train.bin")
    assert len(load_split(tmp_path, "train", N_VOCAB)) == 500


def test_text_of_characters_is_not_mistaken_for_uint32(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(0, 2, 1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.zeros(1000, np.uint16).tofile(tmp_path / "val.bin")
    assert len(load_split(tmp_path, "train", 2)) == len(load_split(tmp_path, "val", 2)) == 1000


def test_a_few_headerless_tokens_are_no_evidence_of_uint32(tmp_path: Path) -> None:
    np.array([7, 0] * 10, np.uint16).tofile(tmp_path / "train.bin")
    assert len(load_split(tmp_path, "train", N_VOCAB)) == 20


def test_uint32_shards_as_llm_c_writes_them_for_llama_3_are_read_and_written(
    tmp_path: Path,
) -> None:
    ids = np.array([128_000, 7, 65_541, 128_255], np.uint32)
    expected = header(20240801, 7, 4) + ids.astype("<u4").tobytes()
    (tmp_path / "train.bin").write_bytes(expected)
    stream = load_split(tmp_path, "train", 128_256)
    windows = stream.checked_windows(np.array([0, 2]), 2, 128_256)
    assert windows.dtype == np.uint32
    np.testing.assert_array_equal(windows, ids.reshape(2, 2))
    write_shard(tmp_path / "x_val_000000.bin", ids)
    assert (tmp_path / "x_val_000000.bin").read_bytes() == expected
    with pytest.raises(DataError, match="token 0 is id 128000, outside the tokenizer's 50,257"):
        load_split(tmp_path, "train", 50_257)


def test_large_data_is_sampled_in_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SCANNED_TOKENS", 1000)
    monkeypatch.setattr(shards, "SAMPLES", 6)
    monkeypatch.setattr(shards, "SAMPLE_TOKENS", 10)
    for place in (0, 1999, 2000, 3999, 4000, 5999):  # first and last tokens of three files
        tokens = random_tokens(6000)
        tokens[place] = N_VOCAB
        for number, piece in enumerate(np.split(tokens, 3)):
            write_shard(tmp_path / f"train_{number}.bin", piece)
        named = f"train_{place // 2000}.bin: token {place % 2000:,} is id"
        with pytest.raises(DataError, match=re.escape(named)):
            load_split(tmp_path, "train", N_VOCAB)


def test_a_file_may_be_shorter_than_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SCANNED_TOKENS", 1000)
    for number, n in enumerate((5, 3000, 5)):
        write_shard(tmp_path / f"train_{number}.bin", random_tokens(n))
    assert len(load_split(tmp_path, "train", N_VOCAB)) == 3010


# What is not written


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.array([1, 2**32]), "token id 4294967296 is not one of 0 to 4,294,967,295"),
        (np.array([1, -1]), "token id -1 is not one of"),
        (np.array([1.0, 2.0]), "must be 1-D integers, not 1-D float64"),
        (np.array([[1, 2]]), "must be 1-D integers, not 2-D int64"),
    ],
)
def test_ids_are_refused_rather_than_wrapped(
    tmp_path: Path, tokens: np.ndarray, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        write_shard(tmp_path / "train_000.bin", tokens)
    assert str(tmp_path / "train_000.bin") in str(caught.value)
    with pytest.raises(DataError, match=reason):
        TokenStream.from_arrays([tokens])
    assert not any(tmp_path.iterdir())


def test_integers_that_fit_are_written_as_uint16(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.uint32, np.int64):
        write_shard(tmp_path / "train_000.bin", np.array([0, 65_535, 7], dtype)[::-1])
        stream = load_split(tmp_path, "train", 65_536)
        np.testing.assert_array_equal(stream.window(0, 3), [7, 65_535, 0])


def test_a_write_that_fails_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "train_000.bin", random_tokens(10))
    assert not (tmp_path / "train_000.bin").exists()


# What it costs


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_a_thousand_shards_of_100_million_tokens_open_with_little_memory(tmp_path: Path) -> None:
    for number in range(1000):  # sparse: 200 GB of zeros that take no room
        path = tmp_path / f"fineweb_train_{number:06d}.bin"
        path.write_bytes(header(20240520, 1, 100_000_000))
        os.truncate(path, 1024 + 2 * 100_000_000)
    tracemalloc.start()
    stream = load_split(tmp_path, "train", N_VOCAB)
    assert len(stream) == 100_000_000_000
    assert stream.window(99_999_999_990, 10).tolist() == [0] * 10
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()


def test_a_shard_cut_short_while_it_is_open_is_named(tmp_path: Path) -> None:
    """Reading the missing page of a memory map would end the process with SIGBUS."""
    path = tmp_path / "x_train_0.bin"
    write_shard(path, np.arange(400, dtype=np.uint16))
    (tmp_path / "._x_train_0.bin").write_bytes(b"what macOS leaves beside it on a foreign disk")
    tokens = load_split(tmp_path, "train", 400)
    os.truncate(path, 1024 + 2 * 300)
    assert tokens.window(290, 10)[-1] == 299
    with pytest.raises(DataError, match=f"^{path}: has become shorter"):
        tokens.window(290, 11)


@pytest.mark.usefixtures("few_descriptors")
def test_a_window_spans_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    for number in range(300):
        write_shard(tmp_path / f"x_train_{number:06d}.bin", np.full(10, number, np.uint16))
    stream = load_split(tmp_path, "train", N_VOCAB)
    assert stream.window(5, 2990).tolist() == np.repeat(np.arange(300), 10)[5:2995].tolist()


@pytest.mark.usefixtures("few_descriptors")
def test_too_many_open_files_are_named_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, random_tokens(10))
    with ExitStack() as held:
        with suppress(OSError):
            while True:
                held.enter_context(path.open())
        with pytest.raises(DataError, match=r"Too many open files\); allow more .*ulimit -n"):
            inspect_file(path)
