"""CSV, Markdown, xz and bz2, texts with a separator, nested fields, and build-nanogpt's shards."""

import bz2
import csv
import json
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.preparing import prepare, read_documents, refusal

from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import DataError
from jaxgpt.errors import UserError
from jaxgpt.preparation import documents
from jaxgpt.preparation.documents import Skip
from jaxgpt.preparation.inputs import find_inputs

EOT = "<|endoftext|>"


def test_documents_parted_by_a_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["one\n\ntwo", "three < <|end", "naïve"]
    path = tmp_path / "a.txt"
    path.write_text(f"\n{EOT}\n".join(["", *texts, ""]))
    for chunk in (1, 2, 7, 1000):
        monkeypatch.setattr(documents, "CHUNK", chunk)
        assert read_documents(path, sample_by=EOT) == texts
    assert prepare(path, "--workers", "1", "--out", tmp_path / "out") == 0
    assert f"give --sample-by '{EOT}'" in capsys.readouterr().out
    assert "--sample-by lines must be" in refusal(capsys, path, "--sample-by", "lines")


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_compressed_text(tmp_path: Path, compress, capsys: pytest.CaptureFixture[str]) -> None:
    suffix = {bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    path = tmp_path / f"a.md.{suffix}"
    path.write_bytes(compress("# Über".encode()))
    assert read_documents(path) == ["# Über"]
    path.write_bytes(path.read_bytes()[:-8])
    message = refusal(capsys, path, "--workers", "1", "--out", tmp_path / "out")
    assert f"{path}: is corrupt or truncated" in message


def test_a_column_of_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], [1, 'a "b", c\nd'], [2, ""], [3]])
    path.write_bytes(path.read_bytes() + b'4,"caf\xe9"\n')
    assert read_documents(path) == ['a "b", c\nd', Skip.EMPTY, Skip.NULL, Skip.NOT_UTF8]
    message = refusal(capsys, path, "--text-column", "body", "--out", tmp_path / "out")
    assert "has no column 'body'" in message
    message = refusal(capsys, path, "--text-column", "text.x", "--out", tmp_path / "out")
    assert "has no column 'text.x'" in message


def test_a_nested_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"meta": {"text": "one", "n": 1}}, {"meta": {"text": "two", "n": 2}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"meta": "x"}])))
    found = read_documents(tmp_path / "a.jsonl", text_column="meta.text")
    assert found == ["one", "two", Skip.NO_TEXT]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet", text_column="meta.text") == ["one", "two"]
    flags = ("--text-column", "meta.body", "--out", tmp_path / "out")
    assert "has no column 'body'" in refusal(capsys, tmp_path / "a.parquet", *flags)
    column = pa.array([row["meta"] for row in rows])
    pq.write_table(pa.Table.from_arrays([column] * 2, ["meta"] * 2), tmp_path / "a.parquet")
    assert "has 2 columns 'meta'" in refusal(capsys, tmp_path / "a.parquet", *flags)
    pq.write_table(pa.table({"meta": [["one"]]}), tmp_path / "a.parquet")
    assert "has no column 'body'; name the text column with --text-column (there are none)" in (
        refusal(capsys, tmp_path / "a.parquet", *flags)
    )


def test_shards_of_build_nanogpt(tmp_path: Path) -> None:
    ids = np.arange(500, dtype=np.uint16)
    np.save(tmp_path / "edufineweb_train_000001.npy", ids)
    stream = load_split(tmp_path, "train", 50_257)
    np.testing.assert_array_equal(stream.window(0, 500), ids)
    with pytest.raises(UserError, match="already contains tokens; train on them"):
        find_inputs([str(tmp_path)])
    np.save(tmp_path / "edufineweb_train_000001.npy", ids.astype(np.float32))
    with pytest.raises(DataError, match="is an array of float32"):
        load_split(tmp_path, "train", 50_257)
