"""Input files that are corrupt, cut, of another encoding or of no use: each is named."""

import gzip
import io
import json
import os
import resource
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from helpers.preparing import read_documents

from jaxgpt.errors import UserError
from jaxgpt.preparation.documents import ReadOptions, Skip
from jaxgpt.preparation.inputs import find_inputs, work_units
from jaxgpt.preparation.readers import read_slice

TEXTS = ["one", "two\nlines", "ünï ☃", "four " * 50]


def as_lines(texts: list[str], column: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, column: text}) for text in texts).encode()


# Corrupt files


def test_a_parquet_file_with_a_corrupt_column_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS, "zzzz": TEXTS}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", b"zz\xccz"))
    with pytest.raises(UserError, match="is not parquet data, or is corrupt"):
        read_documents(path)


def test_a_corrupt_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    data = as_lines([str(n) * 50 for n in range(2000)])
    whole = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), whole)
    files = {
        "a.parquet": b"not parquet at all",
        "b.parquet": whole.getvalue()[:-9],
        "a.jsonl.gz": gzip.compress(data)[:-20],
        "b.jsonl.gz": b"not gzip",
        "a.jsonl.zst": zstandard.compress(data)[:-5],
        "b.jsonl.zst": b"not zstd at all",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="copy or download it again") as caught:
            read_documents(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_column_that_is_not_text_is_refused_with_the_other_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(as_lines(TEXTS, "body"))
    with pytest.raises(UserError, match=r"column 'text' has type int64, not text.*text"):
        read_documents(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no column 'text'.*\(there are id, body\)"):
        read_documents(tmp_path / "a.jsonl")


def test_only_the_first_few_of_many_names_are_listed(tmp_path: Path) -> None:
    many = {f"key {number}": 1 for number in range(100_000)}
    (tmp_path / "a.jsonl").write_text(json.dumps({"k" * 10**6: 1, **many}))
    with pytest.raises(UserError, match=r"k\.\.\., key 0, .*, key 6 and 99,993 more\)$") as caught:
        read_documents(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    pq.write_table(pa.table({name: [1] for name in list(many)[:500]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"key 0, .*, key 7 and 492 more\)$"):
        read_documents(tmp_path / "a.parquet")


def test_a_first_line_without_text_is_only_skipped(tmp_path: Path) -> None:
    lines = [b'{"id": 1}', b'{"id": 2, "text": "two"}', b'{"id": 3}', b'{"text": "four"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for unit_bytes in (10**9, 20):
        found = read_documents(tmp_path / "a.jsonl", unit_bytes)
        assert found == [Skip.NULL, "two", Skip.NULL, "four"]


def test_a_json_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in TEXTS], indent=1))
    with pytest.raises(UserError, match="one object per line"):
        read_documents(tmp_path / "a.json")


@pytest.mark.parametrize("sample_by", ["document", "paragraph", "line"])
def test_windows_line_ends_make_the_same_documents(tmp_path: Path, sample_by: str) -> None:
    text = "one\ntwo\n\nthree\n" * 100_000 + "\r"  # longer than a chunk, and cut in line ends
    for name, content in (("lf.txt", text), ("crlf.txt", text.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(content.encode())
    documents = [
        read_documents(tmp_path / name, sample_by=sample_by) for name in ("lf.txt", "crlf.txt")
    ]
    assert documents[0] == documents[1]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_utf_16_and_utf_32_are_refused(tmp_path: Path, name: str, encoding: str, mark: str) -> None:
    content = (mark + '{"text": "one"}\n').encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=rf"{name}: is {encoding[:6].upper()}, .* to UTF-8"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_input_cut_after_it_was_found_is_no_complete_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "one"}\n' * 100_000)
    ((slice,),) = work_units(find_inputs([str(path)]), 10**9)
    batches = read_slice(slice, ReadOptions(sample_by="line"))
    next(batches)
    os.truncate(path, 1_200_000)
    with pytest.raises(UserError, match=f"^{path}: has 1,200,000 bytes, and had 1,600,000"):
        list(batches)


def test_a_text_too_long_for_the_memory_is_named(tmp_path: Path) -> None:
    """20 KB of .zst that are one line of 600 MB."""
    path = tmp_path / "a.jsonl.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        for _ in range(600):
            writer.write(bytes(10**6))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=f"^{path}: has a text that is too long for the memory"):
            read_documents(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_parquet_file_that_memory_does_not_hold_is_not_called_corrupt(tmp_path, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 90304 failed")

    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fails)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    with pytest.raises(UserError, match=r"a\.parquet: has a text that is too long for the memory"):
        read_documents(tmp_path / "a.parquet")


def test_two_columns_of_one_name_are_refused_and_two_counts_ignored(tmp_path: Path) -> None:
    path, column = tmp_path / "a.parquet", pa.array(["x"])
    pq.write_table(pa.table([column, column], names=["text", "text"]), path)
    with pytest.raises(UserError, match="has 2 columns 'text'"):
        read_documents(path)
    count = pa.array([1])
    pq.write_table(
        pa.table([column, count, count], names=["text", "token_count", "token_count"]), path
    )
    assert read_documents(path) == ["x"]


def test_files_without_rows_have_no_documents(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "a.parquet")
    datasets.Dataset(empty).save_to_disk(tmp_path / "saved")
    assert read_documents(tmp_path / "a.parquet") == []
    assert read_documents(tmp_path / "saved") == []


def test_a_corrupt_saved_dataset_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x" * 999] * 99}).save_to_disk(tmp_path / "saved")
    ((slice,),) = work_units(find_inputs([str(tmp_path / "saved")]), 10**9)
    (path,) = (tmp_path / "saved").glob("*.arrow")
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=rf"^{tmp_path}/saved: (cannot be read|is not arrow data)"):
        list(read_slice(slice, ReadOptions()))
