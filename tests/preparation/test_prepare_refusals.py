"""Error messages of `python -m jaxgpt.prepare` for mistakes and for unusable text."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.preparing import SMALL, prepare, refusal

from jaxgpt.data.manifest import load_manifest


def test_each_mistake_gives_one_sentence(
    texts: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (empty := tmp_path / "empty.txt").touch()
    os.mkfifo(tmp_path / "pipe.txt")
    for arguments, said in (
        ([tmp_path / "gone.txt"], "gone.txt: no such file or folder"),
        ([f"{tmp_path}/*.parquet"], "*.parquet: no file matches"),
        ([tmp_path / "a.pdf"], "a.pdf: is not a readable text file"),
        ([tmp_path / "pipe.txt"], "pipe.txt: is not a readable text file"),
        ([tmp_path / "empty"], "empty: contains no text"),
        ([prepared], "already contains tokens; train on them with"),
        ([next(prepared.glob("*.bin"))], "already contains tokens"),
        ([empty], "empty.txt: is empty; name a file that has text"),
        ([texts, "--tokenizer", "tok/"], "'tok/': no such folder or file"),
        ([texts, "--out", texts / "01.txt"], "is a file; choose a folder with --out"),
        ([texts, "--out", tmp_path / "run"], "so it is a run or a model; choose another"),
        ([texts, "--val-fraction", "2"], "must be between 0 and 1"),
        ([texts, "--val-fraction", "0.1", "--val-tokens", "5"], "are 2 ways to choose validation"),
        (
            [texts, "--limit-tokens", "many"],
            "--limit-tokens many: is not a positive integer; write 27B",
        ),
        ([texts, "--shard-tokens", "3B"], "has at most 2,147,483,647 tokens"),
        ([texts, "--tokens", "3"], "--tokens belongs to --ready"),
        (
            [texts, "--name", "x", "--split", "dev"],
            "--name and --split: only for datasets of the Hub",
        ),
        ([texts, "--out", texts], "contains the text itself; choose another folder with --out"),
        (["fineweb", "--ready", "--tokenizer", "byte"], "tokens; leave out --tokenizer"),
        (["fineweb", "fineweb-edu", "--ready"], "--ready takes one name"),
        (["--inspect", tmp_path / "gone"], "gone: no such folder; name a folder of tokens"),
        (
            ["--inspect", texts, "--limit-tokens", "3"],
            "takes only a folder; leave out --limit-tokens",
        ),
        (["--inspect"], "--inspect takes one folder"),
        ([], "name what to prepare"),
    ):
        out = ["--out", tmp_path / "o"]
        if "--out" in arguments or "--inspect" in arguments or not arguments:
            out = []
        assert said in refusal(capsys, *arguments, *out)
    assert not (tmp_path / "o").exists(), "a mistake leaves no folder"
    assert not (texts / ".prepare").exists()


def test_another_source_or_other_settings_are_refused(
    fineweb_like: Path, prepared: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(fineweb_like.glob("*.parquet"))[0]
    for arguments, said in (
        ([texts, *SMALL], "already contains 000_00000.parquet"),
        ([first, *SMALL], "already contains 001_00000.parquet"),
        ([fineweb_like, "--unit-bytes", "100K"], "--shard-tokens 30000, not 100000000"),
        ([fineweb_like, *SMALL, "--text-column", "url"], "--text-column text, not url"),
        ([fineweb_like, *SMALL, "--tokenizer", "byte"], "--tokenizer gpt2, not byte"),
        ([fineweb_like, *SMALL, "--val-tokens", "9"], "--val-tokens unset, not 9"),
    ):
        message = refusal(capsys, *arguments, "--out", prepared)
        assert said in message
        assert "--out" in message


def test_an_input_that_has_changed_since_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(texts, "--out", tmp_path / "out") == 0
    changed = texts / "07.txt"
    changed.write_text(changed.read_text().replace("7", "8"))  # as long as it was
    message = refusal(capsys, texts, "--out", tmp_path / "out")
    assert f"{changed}: has changed since {tmp_path / 'out'} was started" in message


def test_after_a_mistake_without_results_the_folder_can_be_reused(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    message = refusal(capsys, fineweb_like, "--out", out, "--text-column", "txt")
    assert "has no column 'txt'" in message
    assert "text, id, dump, url" in message
    assert prepare(fineweb_like, "--out", out, *SMALL) == 0


def test_skipped_documents_are_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps({"text": f"Document {n}."}).encode() for n in range(60)]
    bad = [b'{"text": null}', b'{"text": ""}', b'{"text": "caf\xe9"}', b"[" * 100_000, b'{"text"']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good, *bad]))
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    arguments = (tmp_path / "a.jsonl", tmp_path / "b.txt", "--val-fraction", "0.3")
    assert prepare(*arguments, "--out", tmp_path / "out") == 0
    told = " ".join(capsys.readouterr().out.split())
    for line in (
        "skipped: null 1 documents, the first in a.jsonl",
        "skipped: empty 1 documents, the first in a.jsonl",
        "skipped: not UTF-8 2 documents, the first in a.jsonl",
        "skipped: not a JSON object 2 documents, the first in a.jsonl",
    ):
        assert line in told
    manifest = load_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.documents is not None
    assert manifest.documents.used == 60
    assert sum(totals.documents for _, totals in manifest.splits.items()) == 60
    assert prepare(*arguments, "--out", tmp_path / "o2", "--encoding-errors", "replace") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not UTF-8" not in told
    replaced = load_manifest(tmp_path / "o2")
    assert replaced is not None
    assert replaced.documents is not None
    assert replaced.documents.used == 62


def test_text_without_a_usable_document_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "one", "others": [1, 2]}, indent=1))
    message = refusal(capsys, tmp_path / "a.json", "--out", tmp_path / "out")
    assert (
        f"none of the documents can be used, each is not a JSON object ({tmp_path / 'a.json'})"
        in message
    )


def test_tokens_inside_the_folder_of_the_text_are_ignored(
    texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(texts)
    assert prepare(".", "--val-fraction", "0.3") == 0
    assert (texts / "data" / "texts" / "manifest.json").is_file()
    assert prepare(".", "--val-fraction", "0.3") == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out


def test_a_missing_finished_shard_is_reported(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (texts, "--out", tmp_path / "out", "--val-fraction", "0.3")
    assert prepare(*arguments) == 0
    lost = tmp_path / "out" / "out_train_000001.bin"
    lost.unlink()
    assert f"{lost}: is missing" in refusal(capsys, *arguments)


def test_the_estimate_is_of_a_sample_of_the_text(
    fineweb_like: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*SMALL, "--val-tokens", "10K", "--limit-tokens", "20K")
    assert prepare(fineweb_like, "--out", tmp_path / "out", *flags) == 0
    told = " ".join(capsys.readouterr().out.split())
    manifest = load_manifest(prepared)
    assert manifest is not None
    tokens = sum(totals.tokens for _, totals in manifest.splits.items())
    size = sum(path.stat().st_size for path in fineweb_like.glob("*.parquet"))
    (kilobytes,) = re.findall(r"limit reached after about ([\d.]+) kB", told)
    assert float(kilobytes) == pytest.approx(size * 30_000 / tokens / 1000, rel=0.05)


def test_a_folder_with_foreign_shards_is_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxgpt.data.token_file import write_shard

    write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(9))
    assert "did not write" in refusal(capsys, texts, "--out", tmp_path)


def test_a_split_without_documents_is_reported_with_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    arguments = (tmp_path / "0.txt", tmp_path / "1.txt", "--out", tmp_path / "out")
    assert "leave out --val-fraction" in refusal(capsys, *arguments, "--val-fraction", "1e-9")
    arguments = (*arguments[:2], "--out", tmp_path / "out2", "--val-tokens", "1K")
    assert "all tokens are validation" in refusal(capsys, *arguments)


def test_equal_documents_are_refused_with_a_way_out(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "always the same"}\n' * 200)
    command = (tmp_path / "a.jsonl", "--tokenizer", "byte", "--workers", "1", "--out")
    message = refusal(capsys, *command, tmp_path / "one")
    advice = re.search(r"or all are equal; .* (--val-tokens \d+)$", message)
    assert advice, message
    assert prepare(*command, tmp_path / "other", *advice[1].split()) == 0


def test_names_and_paths_are_printed_as_they_are(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "10 [red] :cat:.txt").touch()
    out = tmp_path / "out [/x] :dog:"
    assert prepare(texts, "--out", out, "--val-fraction", "0.3") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the first in 10 [red] :cat:.txt" in told
    assert told.count("[/x] :dog:") >= 2


def test_a_file_name_that_is_not_utf_8_is_read_and_resumed(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (texts / "00.txt").rename(texts / name)
    (texts / os.fsdecode(b"empty\xe9.txt")).touch()  # its name is in the journal
    arguments = (texts, "--out", tmp_path / "out", "--val-fraction", "0.3")
    assert prepare(*arguments) == 0
    manifest = load_manifest(tmp_path / "out")
    assert manifest is not None
    assert name in manifest.source["files"]
    assert prepare(*arguments) == 0
    assert "is complete; there is nothing to do" in capsys.readouterr().out


def test_a_full_disk_is_reported_before_anything_is_read(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = refusal(capsys, texts, "--out", tmp_path / "out")
    assert "of disk and has 1.0 kB free" in message
    assert "fewer tokens (--limit-tokens, or --tokens with --ready)" in message
    assert not list((tmp_path / "out").glob("*.bin"))


def test_text_is_not_mixed_with_ready_made_shards(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    (tmp_path / "out" / ".prepare" / "ready.json").write_text('{"repo": "a/b"}')
    assert "contains ready-made shards" in refusal(capsys, texts, "--out", tmp_path / "out")
    (tmp_path / "out" / ".prepare" / "ready.json").write_text("{")
    message = refusal(capsys, "fineweb", "--ready", "--out", tmp_path / "out")
    assert "ready.json: " in message
    assert f"; delete {tmp_path / 'out'} and download it again" in message
