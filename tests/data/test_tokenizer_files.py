import hashlib
import json
from pathlib import Path

import pytest

from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.tokenizer_files import find_tokenizer, recognize_tokenizer, write_tokenizer

TEXTS = [
    "Hello world, it's 2026!",
    "  two  spaces\n\nand lines\t",
    "naïve café — 日本語 😀",
    "x" * 50 + "'ll 1234567 ###",
]


def test_a_copy_of_an_earlier_commands_tokenizer_is_not_taken_for_tiktokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, load_tokenizer("byte"), 64)
    assert find_tokenizer("cl100k_base", [tmp_path]) is None
    assert find_tokenizer("/gone/tok", [tmp_path]) is not None


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_a_tokenizer_is_recognized_in_its_written_files(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, load_tokenizer(name), 64)
    assert recognize_tokenizer(tmp_path, 12345) == name
    (tmp_path / "vocab.json").unlink()  # tokenizer.json has it too
    assert recognize_tokenizer(tmp_path, 12345) == name


def test_gpt2s_files_are_openais(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, load_tokenizer("gpt2"), 64)
    # encoder.json's SHA-256 as tiktoken demands it of its download; ours ends with a newline.
    text = (tmp_path / "vocab.json").read_text().rstrip("\n")
    expected = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    assert hashlib.sha256(text.encode()).hexdigest() == expected
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    assert (len(merges), merges[1]) == (50_001, "Ġ t")


def test_without_files_the_number_of_ids_decides(tmp_path: Path) -> None:
    assert [recognize_tokenizer(tmp_path, n) for n in (50_257, 50_304, 257, 65)] == [
        *("gpt2", "gpt2", "byte", None)
    ]


def test_a_changed_vocabulary_is_not_recognized(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, load_tokenizer("byte"), 64)
    ids = json.loads((tmp_path / "vocab.json").read_text())
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    assert recognize_tokenizer(tmp_path, 257) is None


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": [["a", 0.5]]}}'),  # a Unigram
        ("tokenizer.json", '{"added_tokens"'),
        ("vocab.json", '["a"]'),
    ],
)
def test_the_number_of_ids_is_ignored_for_files_of_another_kind(
    tmp_path: Path, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    assert recognize_tokenizer(tmp_path, 50_257) is None


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_transformers_makes_the_same_tokens_of_the_files(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="it loads the files")
    tokenizer = load_tokenizer(name)
    write_tokenizer(tmp_path, tokenizer, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.n_vocab, tokenizer.eot)
    assert theirs.model_max_length == 64
