import gzip
import io
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.preparing import prepare, read_documents, refusal

from jaxgpt.preparation import archives, line_readers
from jaxgpt.preparation.documents import LongText
from jaxgpt.preparation.inputs import find_inputs


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), file, row_group_size=2)
    return file.getvalue()


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


MEMBERS = {
    "a.txt": "naïve\r\nline".encode(),
    "b/c.csv": b"id,text\n1,of csv\n",
    "b/d.jsonl.gz": gzip.compress(lines(["of gzip"])),
    "b//e.parquet": parquet(["of", "parquet", "in", "groups"]),
    "f.JSONL": lines([f"line {i}" for i in range(50)]),
    "b/picture.png": b"\0",
    "b/.hidden/x.txt": b"hidden",
    "__MACOSX/._a.txt": b"resource fork",
}
DOCUMENTS = [
    *("naïve\nline", "of csv", "of gzip", "of", "parquet", "in", "groups"),
    *(f"line {i}" for i in range(50)),
]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "books.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("folder.txt")
        for name, data in MEMBERS.items():
            file.writestr(name, data)
    return path


def test_members_of_an_archive_are_read_as_files_of_a_folder(archive, monkeypatch):
    assert read_documents(archive, unit_bytes=100) == DOCUMENTS
    # A seek in a compressed member reads it from its start.
    assert not any(item.divisible for item in find_inputs([str(archive)]))
    (archive.parent / "z.txt").write_text("a file")
    assert read_documents(archive.parent) == [*DOCUMENTS, "a file"]
    monkeypatch.setattr(line_readers, "IN_MEMORY", 4)
    long = read_documents(archive)[0]
    assert isinstance(long, LongText)
    assert "".join(long.chunks()) == "naïve\nline"


def test_an_archive_is_prepared_as_the_files_in_it(archive, tmp_path):
    for path, data in MEMBERS.items():
        unpacked = tmp_path / "unpacked" / path
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        unpacked.write_bytes(data)
    for source in (archive, tmp_path / "unpacked"):
        out = tmp_path / f"{source.stem}-out"
        assert prepare(source, "--tokenizer", "byte", "--workers", "2", "--out", out) == 0
    ours, theirs = (
        [path.read_bytes() for path in sorted((tmp_path / f"{name}-out").glob("*.bin"))]
        for name in ("books", "unpacked")
    )
    assert ours == theirs


def test_the_names_in_an_archive_are_read_once(archive, monkeypatch):
    opened = []
    monkeypatch.setattr(
        archives, "ZipFile", lambda path: opened.append(path) or zipfile.ZipFile(path)
    )
    archives._read_directory.cache_clear()
    read_documents(archive)
    assert len(opened) == 1
    assert archives.members(str(archive)) is archives.members(str(archive))


def test_an_archive_that_cannot_be_read_is_answered_with_a_sentence(archive, tmp_path, capsys):
    data = archive.read_bytes()
    out = ("--workers", "1", "--out", tmp_path / "out")
    archive.write_bytes(data[:-30])
    assert f"{archive}: cannot be unpacked (File is not a zip file)" in refusal(
        capsys, archive, *out
    )
    at = data.index(b"a.txt") + len("a.txt") + 3  # in the first member's data
    archive.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    assert f"{archive}/a.txt: " in (message := refusal(capsys, archive, *out))
    assert "or download" in message
    entry = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)  # the second: a folder is the first
    archive.write_bytes(data[: entry + 8] + b"\1" + data[entry + 9 :])
    message = refusal(capsys, archive, *out)
    assert f"{archive}/a.txt: is protected by a password; unpack" in message
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("picture.png", b"")
    assert f"{archive}: contains no text" in refusal(capsys, archive, *out)


def test_an_archive_that_changes_is_noticed(archive):
    found = find_inputs([str(archive)])
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", b"shorter")
    assert archives.size_of(found[0].path) == 7 != found[0].size
    assert archives.size_of(found[1].path) == 0
