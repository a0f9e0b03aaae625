import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data import embedded
from jaxgpt.data.sources import (
    embedded_tokens,
    load_embedded_documents,
    split_documents,
)
from jaxgpt.data.tokenizer import Tokenizer, load_tokenizer
from jaxgpt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# Title and number of chapters, in the order of the file.
NOVELS = {
    "Pride and Prejudice": 61,
    "Sense and Sensibility": 50,
    "Persuasion": 24,
    "Northanger Abbey": 31,
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return load_embedded_documents()


@pytest.fixture(scope="module", params=["gpt2", "byte"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.param)


def check_data_files(root: Path) -> subprocess.CompletedProcess[str]:
    """The output of `build_embedded_data.py --check` for the package in `root`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/build_embedded_data.py"), "--check"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )


def test_the_data_files_have_the_hashes_of_the_build_script() -> None:
    done = check_data_files(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("have the expected SHA-256") == 2


def test_the_build_script_finds_a_corrupt_data_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jaxgpt", tmp_path / "jaxgpt")
    text = tmp_path / "jaxgpt/data/embedded/austen.txt.xz"
    text.write_bytes(lzma.compress(b"It was a dark and stormy night"))
    done = check_data_files(tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"build_embedded_data\.py: .*austen\.txt\.xz is corrupt.*\n", done.stderr)


def test_the_embedded_data_stays_below_one_megabyte() -> None:
    folder = ROOT / "jaxgpt/data/embedded"
    assert sum(path.stat().st_size for path in folder.glob("*.xz")) < 1_000_000


def test_corrupt_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "austen.txt.xz").write_bytes(lzma.compress(b"It was a dark and stormy night"))
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"austen\.txt\.xz is corrupt .*reinstall jaxgpt"):
        load_embedded_documents()


def test_every_chapter_of_every_novel_is_one_document(documents: list[str]) -> None:
    headings = [heading for text in documents for heading in re.findall(r"(?m)^Chapter .*", text)]
    assert headings == [f"Chapter {n + 1}" for count in NOVELS.values() for n in range(count)]
    first = [text.partition("\n")[0] for text in documents if "by Jane Austen" in text]
    assert first == list(NOVELS)
    assert documents[0].startswith(
        "Pride and Prejudice\n\nby Jane Austen\n\nChapter 1\n\n"
        "It is a truth universally acknowledged, that a single man in possession of a good fortune,"
        " must be in want of a wife.\n\nHowever little known"
    )


def test_the_text_is_clean_prose(documents: list[str]) -> None:
    text = "\n\n".join(documents)
    assert text.isascii()
    assert not re.search(r"[_\f\t\r\[\]{}<>|~#@=+^`\\]|  | \n|\n\n\n", text)
    assert not re.search(r"(?i)gutenberg|\be-?text\b|copyright|signet|https?:", text)


def test_no_chapter_is_in_both_splits(documents: list[str]) -> None:
    splits = split_documents(documents)
    assert not set(splits["train"]) & set(splits["val"])
    assert sorted(splits["train"] + splits["val"]) == sorted(documents)
    assert len(set(documents)) == len(documents) == 166


def test_a_tenth_of_every_novel_is_for_validation(documents: list[str]) -> None:
    val = set(split_documents(documents)["val"])
    start = 0
    for count in NOVELS.values():
        novel = documents[start : start + count]
        held_out = sum(len(text) for text in novel if text in val)
        assert 0.05 < held_out / sum(map(len, novel)) < 0.15
        start += count


def test_end_of_text_is_before_each_document(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode_documents(["one", "two two"])
    assert tokens.dtype == np.uint16
    assert tokens[0] == tokenizer.eot
    assert tokenizer.decode(tokens) == "<|endoftext|>one<|endoftext|>two two"


def test_the_embedded_tokens_are_as_many_as_documented(tokenizer: Tokenizer) -> None:
    splits = embedded_tokens(tokenizer)
    counts = {"gpt2": (461_390, 48_199), "byte": (2_036_526, 212_867)}[tokenizer.name]
    assert (splits["train"].shape, splits["val"].shape) == ((counts[0],), (counts[1],))
    for count in (f"{count:,}" for count in counts):
        assert count in (embedded_tokens.__doc__ or "")


def test_the_embedded_tokens_are_the_chapters_and_nothing_else(
    tokenizer: Tokenizer, documents: list[str]
) -> None:
    tokens = embedded_tokens(tokenizer)
    for split, texts in split_documents(documents).items():
        assert tokens[split].dtype == np.uint16
        assert tokens[split].max() < tokenizer.n_vocab
        assert np.count_nonzero(tokens[split] == tokenizer.eot) == len(texts)
        assert tokenizer.decode(tokens[split]).split("<|endoftext|>") == ["", *texts]
