"""Token files that are refused, and how the message helps."""

import re
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import PREPARE, DataError, write_shard

N_VOCAB = 50_257
REMEDIES = (PREPARE, "--data-dir", "--dataset embedded")


def random_tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n, dtype=np.uint16)


def header(*words: int) -> bytes:
    return np.array([*words, *[0] * (256 - len(words))], "<i4").tobytes()


def refusal(folder: Path, split: str = "train", n_vocab: int = N_VOCAB) -> str:
    with pytest.raises(DataError) as caught:
        load_split(folder, split, n_vocab)
    return str(caught.value)


# What is refused, and how the message helps


def test_a_missing_folder_is_named_with_its_neighbors_and_remedies(tmp_path: Path) -> None:
    (tmp_path / "fineweb10B").mkdir()
    message = refusal(tmp_path / "fineweb")
    for part in (str(tmp_path / "fineweb"), "no such folder", "fineweb10B/", *REMEDIES):
        assert part in message
    assert "does not exist either" in refusal(tmp_path / "no" / "where")


def test_a_folder_without_the_split_is_refused_with_its_contents(
    tmp_path: Path,
) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", random_tokens(10))
    message = refusal(tmp_path, "val")
    for part in (str(tmp_path), "*_val_*.bin", "fineweb_train_000001.bin", *REMEDIES):
        assert part in message


def test_a_long_listing_is_cut_and_an_empty_folder_is_called_empty(tmp_path: Path) -> None:
    assert "is empty" in refusal(tmp_path)
    for number in range(20):
        (tmp_path / f"{number:02d}.npy").touch()
    assert "06.npy, 07.npy and 12 more;" in refusal(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    random_tokens(10).tofile(tmp_path / "train.bin")
    message = refusal(tmp_path / "train.bin")
    assert "is a file, not a folder" in message
    assert "--data-dir" in message


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "fineweb_train_000001.bin").symlink_to(tmp_path / "gone")
    (tmp_path / "fineweb_train_000002.bin").mkdir()
    message = refusal(tmp_path)
    assert re.search(r"000001.bin: cannot be read \(No such file", message)
    assert re.search(r"000002.bin: cannot be read \(Is a directory", message)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((55432, 1, 4), "starts with 55432, which is not a token shard; expected 20240520"),
        ((20240801, 1, 4), "version 1, expected 7"),
        ((20240522, 1, 4), "HellaSwag"),
        ((20240520, 7, 4), "version 7, expected 1"),
    ],
)
def test_a_wrong_magic_or_version_is_refused(
    tmp_path: Path, words: tuple[int, ...], reason: str
) -> None:
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(header(*words) + bytes(8))
    message = refusal(tmp_path)
    for part in (f"{path}: ", reason, PREPARE):
        assert part in message


def test_headerless_tokens_are_refused_under_any_other_name(tmp_path: Path) -> None:
    random_tokens(1000).tofile(tmp_path / "fineweb_train_000001.bin")
    message = refusal(tmp_path)
    assert "expected 20240520" in message
    assert "files without a header must be named train.bin or val.bin" in message


@pytest.mark.parametrize(
    ("size", "state"), [(16, "truncated"), (3022, "truncated"), (3025, "too long")]
)
@pytest.mark.parametrize("name", ["fineweb_train_000003.bin", "train.bin"])
def test_a_size_that_does_not_match_the_header_is_refused(
    tmp_path: Path, size: int, state: str, name: str
) -> None:
    for number in (1, 2):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", random_tokens(10))
    path = tmp_path / name
    path.write_bytes((header(20240520, 1, 1000) + bytes(4000))[:size])
    message = refusal(tmp_path)
    for part in (
        f"{path}: is {state}",
        "1,000 tokens",
        "3,024 bytes",
        f"{size:,};",
        "download it again",
    ):
        assert part in message


def test_a_header_without_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fineweb_val_000000.bin").write_bytes(header(20240520, 1, 0))
    message = refusal(tmp_path, "val")
    assert "fineweb_val_000000.bin: has a header but no tokens; delete it" in message


def test_the_first_few_of_many_errors_are_reported_at_once(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"fineweb_train_{number:06d}.bin").touch()
    message = refusal(tmp_path)
    assert message.count("is empty") == 5
    assert message.endswith("and 4 more")


@pytest.mark.parametrize("name", ["val.bin", "fineweb_val_000000.bin"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    message = refusal(tmp_path, "val")
    assert f"{tmp_path / name}: is empty; copy it again" in message


def test_an_odd_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(range(201)))
    message = refusal(tmp_path)
    assert f"{tmp_path / 'train.bin'}: has 201 bytes, an odd number" in message
    assert "copy it again" in message


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
@pytest.mark.parametrize("largest", [N_VOCAB, 128_256])
def test_wider_integers_are_recognized(tmp_path: Path, dtype: type, largest: int) -> None:
    tokens = np.random.default_rng(0).integers(0, largest, 1000)
    tokens.astype(dtype).tofile(tmp_path / "train.bin")
    message = refusal(tmp_path, n_vocab=2**16)
    for part in (
        f"{tmp_path / 'train.bin'}: ",
        "of its odd-numbered values are zero",
        ".astype(np.uint16)",
    ):
        assert part in message


@pytest.mark.parametrize("bad", [0, 77, 499])
def test_an_id_outside_the_vocabulary_is_named_with_its_file_and_place(
    tmp_path: Path, bad: int
) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", random_tokens(300))
    tokens = random_tokens(500)
    tokens[bad] = N_VOCAB  # would pass for a padded vocabulary of 50,304
    path = tmp_path / "fineweb_train_000002.bin"
    write_shard(path, tokens)
    message = refusal(tmp_path)
    assert f"{path}: token {bad} is id 50257, outside the tokenizer's 50,257" in message
    assert PREPARE in message
