"""Documents that are too long for memory or for one call of the tokenizer."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.preparing import read_documents

from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.preparation import documents, line_readers, readers
from jaxgpt.preparation.documents import LongText, ReadOptions, Skip, fraction_of, pieces
from jaxgpt.preparation.inputs import find_inputs, work_units
from jaxgpt.preparation.readers import read_slice

GPT2 = load_tokenizer("gpt2")


def cases() -> dict[str, str]:
    novel = "\n\n".join(load_embedded_documents()[:40])
    spaces = "word   \n\n\n  next\t\t x!! \u00a0?? \x1c'll  \r\n" * 4000
    return {"novel": novel, "spaces": spaces, "chinese": "字。 " * 60_000, "mixed": spaces + novel}


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
def test_a_document_in_pieces_has_the_same_tokens(
    case: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, chosen = cases()[case], load_tokenizer(tokenizer)
    encode = chosen.encode
    whole = encode(text)
    for size in (1000, 1009, 65_536):
        monkeypatch.setattr(documents, "PIECE", size)
        parts = list(pieces(text, chosen.cut))
        assert "".join(parts) == text
        assert max(map(len, parts)) <= size
        np.testing.assert_array_equal(np.concatenate([encode(part) for part in parts]), whole)


def test_a_text_without_spaces_is_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1000)
    parts = list(pieces("a" * 2500, GPT2.cut))
    assert [len(part) for part in parts] == [1000, 1000, 500]


def test_a_long_file_is_read_as_a_stream_with_the_same_pieces_and_the_same_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = cases()["mixed"] + "ü" * 1001
    (tmp_path / "a.txt").write_text(text, newline="")
    monkeypatch.setattr(documents, "PIECE", 5000)
    monkeypatch.setattr(documents, "CHUNK", 777)
    text = text.replace("\r\n", "\n")  # as files are read
    expected = list(pieces(text, GPT2.cut))
    monkeypatch.setattr(line_readers, "IN_MEMORY", 1000)
    (long,) = read_documents(tmp_path / "a.txt")
    assert isinstance(long, LongText)
    assert list(pieces(long, GPT2.cut)) == expected
    assert fraction_of(long) == fraction_of(text)
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xff")
    assert read_documents(tmp_path / "b.txt") == [Skip.NOT_UTF8]


def test_a_text_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for _ in range(100):
            file.write("Some words and more of them, line by line.\n" * 20_000)  # 86 MB
    tracemalloc.start()
    (long,) = read_documents(path)
    length = sum(len(piece) for piece in pieces(long, GPT2.cut))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == path.stat().st_size
    assert peak < 20e6


@pytest.mark.parametrize(
    ("name", "compress"), [("a.txt.gz", gzip.compress), ("a.txt.zst", zstandard.compress)]
)
def test_a_small_file_that_unpacks_to_a_long_text_takes_little_memory(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(compress(b"Some words and more of them. " * 2_000_000))  # 58 MB
    assert path.stat().st_size < 1e6
    tracemalloc.start()
    (long,) = read_documents(path)
    length = sum(len(piece) for piece in pieces(long, GPT2.cut))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 58_000_000
    assert peak < 25e6


def test_long_rows_come_in_small_batches(tmp_path: Path) -> None:
    import datasets

    texts = [f"{n} " * 300_000 for n in range(10, 90)]  # 72 MB
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        ((slice,),) = work_units(find_inputs([str(tmp_path / name)]), 10**9)
        batches = [batch.documents for batch in read_slice(slice, ReadOptions())]
        assert [text for batch in batches for text in batch] == texts
        assert max(sum(map(len, batch)) for batch in batches) <= readers.BATCH_BYTES


def test_the_fractions_of_documents_are_uniformly_distributed() -> None:
    values = np.array([fraction_of(f"document {n}") for n in range(5000)])
    counts, _ = np.histogram(values, 10, (0, 1))
    assert counts.sum() == 5000
    assert counts.min() > 400
    assert fraction_of("document 1") == values[1]
