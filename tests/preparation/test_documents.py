"""Documents from files: every format, skipped documents, corrupt files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.preparing import read_documents

from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation import line_readers
from jaxgpt.preparation.documents import ReadOptions, Skip, pieces
from jaxgpt.preparation.inputs import find_inputs, work_units
from jaxgpt.preparation.readers import read_slice

TEXTS = ["one", "two\nlines", "ünï ☃", "four " * 50]


def as_lines(texts: list[str], column: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, column: text}) for text in texts).encode()


def zstd(data: bytes) -> bytes:
    half = len(data) // 2  # two frames, as a file that was appended to has
    return b"".join(zstandard.compress(part) for part in (data[:half], data[half:]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.parquet": lambda path: pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=1),
    "a.jsonl": lambda path: path.write_bytes(as_lines(TEXTS)),
    "b.jsonl": lambda path: path.write_bytes(as_lines(TEXTS) + b"\n\n"),
    "c.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + as_lines(TEXTS)),
    "C.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(as_lines(TEXTS))),
    "a.ndjson": lambda path: path.write_bytes(as_lines(TEXTS).replace(b"\n", b"\r\n")),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(as_lines(TEXTS))),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(as_lines(TEXTS))),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [10**9, 40, 7])
def test_every_format_gives_the_documents_in_order_however_it_is_divided(
    tmp_path: Path, name: str, unit_bytes: int
) -> None:
    WRITERS[name](tmp_path / name)
    assert read_documents(tmp_path / name, unit_bytes) == TEXTS


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.binary()])
def test_every_type_of_text_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"body": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=True)
    assert read_documents(tmp_path / "a.parquet", text_column="body") == TEXTS


def test_a_folder_of_save_to_disk_is_read_as_its_rows(tmp_path: Path) -> None:

    dataset = datasets.Dataset.from_dict({"text": TEXTS * 3, "n": list(range(12))})
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    for folder in ("saved", "both", "both/test"):
        for unit_bytes in (10**9, 500):
            assert read_documents(tmp_path / folder, unit_bytes) == TEXTS * 3
    with pytest.raises(UserError, match="has no column 'body'"):
        read_documents(tmp_path / "saved", text_column="body")


def test_a_text_file_is_a_document_or_its_paragraphs_or_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\ntwo\n\n \nthree\n\nfour")
    assert read_documents(path) == [path.read_text()]
    assert read_documents(path, sample_by="paragraph") == ["one\ntwo", "three", "four"]
    assert read_documents(path, sample_by="line") == ["one", "two", "three", "four"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_documents(tmp_path / "b.txt.gz", sample_by="paragraph") == [
        "one\ntwo",
        "three",
        "four",
    ]


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert read_documents(tmp_path / "a.txt") == ["word"]
    monkeypatch.setattr(line_readers, "IN_MEMORY", 1)
    (long,) = read_documents(tmp_path / "a.txt")
    assert "".join(pieces(long, load_tokenizer("gpt2").cut)) == "word"


# What is skipped


def test_documents_that_cannot_be_used_are_skipped_with_a_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "caf\xe9"}',
        b'{"text": "cut',
        b'{"text": 5}',
        b'["text"]',
        b'{"other": "x"}',
        b'{"text": " "}',
        b'{"text": "long", "number": ' + b"1" * 5000 + b"}",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    bad = [Skip.NULL, Skip.EMPTY, Skip.NOT_UTF8, Skip.MALFORMED, Skip.NO_TEXT, Skip.MALFORMED]
    assert read_documents(tmp_path / "a.jsonl") == ["good", *bad, Skip.NULL, " ", "long"]
    replaced = read_documents(tmp_path / "a.jsonl", encoding_errors="replace")
    assert replaced[3] == "caf\N{REPLACEMENT CHARACTER}"

    column = pa.array([b"good", None, b"", b"caf\xe9"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 4, column.buffers())
    for number, array in enumerate((column, strings)):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": array}), path)
        assert read_documents(path) == ["good", *bad[:3]]

    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "none.txt").touch()
    assert read_documents(tmp_path / "latin.txt") == [Skip.NOT_UTF8]
    assert read_documents(tmp_path / "none.txt") == [Skip.EMPTY]


def test_the_source_s_count_excludes_skipped_documents(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "b"], "token_count": [1, 100, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    ((slice,),) = work_units(find_inputs([str(tmp_path / "a.parquet")]), 10**9)
    (batch,) = read_slice(slice, ReadOptions())
    assert batch.token_count == 3


def test_an_empty_file_beside_others_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_bytes(as_lines(TEXTS))
    assert read_documents(tmp_path) == TEXTS
    assert read_documents(tmp_path / "a.jsonl") == []


def test_a_hub_cache_s_links_are_read_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, content in (("a.jsonl", as_lines(TEXTS)), ("b.jsonl.gz", None)):
        blob = tmp_path / "blobs" / f"{name[0]}5d3"
        blob.write_bytes(content or gzip.compress(as_lines(TEXTS)))
        (tmp_path / "snapshot" / name).symlink_to(blob)
    assert read_documents(tmp_path / "snapshot") == [*TEXTS, *TEXTS]
    assert read_documents(tmp_path / "snapshot" / "a.jsonl") == TEXTS
    assert read_documents(Path(f"{tmp_path}/snapshot/*.gz")) == TEXTS


def test_a_link_to_a_file_with_a_suffix_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    assert [item.name for item in find_inputs([str(tmp_path)])] == ["a.txt"]


@pytest.mark.parametrize(
    "count", [pytest.param(10**4299, id="4300 digits"), 2**63, -1, True, 1.5, "9", None]
)
def test_a_token_count_that_is_not_a_plausible_integer_is_ignored(
    tmp_path: Path, count: object
) -> None:
    lines = [json.dumps({"text": "one", "token_count": count})] * 20
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ((slice,),) = work_units(find_inputs([str(tmp_path)]), 10**9)
    (batch,) = read_slice(slice, ReadOptions())
    assert len(batch.documents) == 20
    assert batch.token_count is None
