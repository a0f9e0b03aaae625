"""`prepare --val`: the user's own validation text."""

from pathlib import Path

import pytest
from helpers.preparing import contents, prepare, refusal, stream

from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.tokenizer import load_tokenizer

SMALL = ("--tokenizer", "byte", "--shard-tokens", "5K", "--unit-bytes", "2K", "--workers", "1")
BYTES = load_tokenizer("byte")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Eight files, of which the third is to be held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Text {number}. " * 150)
    return folder


def documents(out: Path, split: str) -> list[str]:
    return BYTES.decode(stream(out, split)[1:]).split(BYTES.decode([BYTES.eot]))


def test_a_file_among_the_text_is_held_out_whatever_the_workers_and_units(
    texts: Path, tmp_path: Path
) -> None:
    held_out = texts / "2.txt"
    one, other = tmp_path / "a/x", tmp_path / "b/x"
    assert prepare(texts, "--val", held_out, "--out", one, *SMALL) == 0
    flags = ("--val", held_out, "--out", other, *SMALL[:4], "--unit-bytes", "1M", "--workers", "2")
    assert prepare(texts, *flags, "--limit-tokens", "5K") == 0  # and continued
    assert prepare(texts, *flags) == 0
    shards = {name for name in contents(one) if name.endswith(".bin")}
    assert {n: contents(one)[n] for n in shards} == {n: contents(other)[n] for n in shards}
    assert documents(one, "val") == [held_out.read_text()]
    expected = [path.read_text() for path in sorted(texts.iterdir()) if path != held_out]
    assert documents(one, "train") == expected
    manifest = load_manifest(one)
    assert manifest is not None
    assert (manifest.validation.rule, manifest.validation.files) == ("text of its own", ["2.txt"])


def test_later_text_joins_the_training_text_and_the_validation_stays(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    held_out = texts / "2.txt"
    command = (texts / "0.txt", texts / "1.txt", "--out", out, *SMALL)
    assert prepare(*command, "--val", held_out) == 0
    before = contents(out)
    assert prepare(texts / "5.txt", *command) == 0  # the folder knows its --val
    assert documents(out, "val") == [held_out.read_text()]
    assert len(documents(out, "train")) == 3
    assert before.items() - contents(out).items() <= {("manifest.json", before["manifest.json"])}
    for other in (("--val", texts / "3.txt"), ("--val-fraction", "0.5")):
        assert "was started with --val" in refusal(capsys, *command, *other)


def test_a_saved_dataset_gives_its_own_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    saved, out = tmp_path / "saved", tmp_path / "out"
    rows = {"train": ["a" * 90, "b" * 90], "test": ["c" * 50]}
    splits = {name: datasets.Dataset.from_dict({"text": x}) for name, x in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(saved)
    assert prepare(saved, "--val", "test", "--out", out, *SMALL) == 0
    assert (documents(out, "train"), documents(out, "val")) == (rows["train"], rows["test"])
    capsys.readouterr()
    assert prepare(saved, "--out", tmp_path / "hint", *SMALL) == 0
    assert "--val test makes it the validation split" in capsys.readouterr().out
    message = refusal(capsys, saved, "--val", "valid", "--out", tmp_path / "x", *SMALL)
    assert "has no such split (test, train)" in message


def test_a_wrong_val_is_refused_in_a_sentence(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    message = refusal(capsys, texts, *out, "--val", texts / "2.txt", "--val-tokens", "5")
    assert "--val and --val-tokens are 2 ways to choose validation; give one" in message
    assert "is all of the text" in refusal(capsys, texts, *out, "--val", texts)
    (tmp_path / "blank.txt").write_text("")
    message = refusal(capsys, texts, *out, "--val", tmp_path / "blank.txt", "--workers", "1")
    assert "blank.txt or the other text has no tokens" in message


def test_characters_of_the_validation_text_have_ids_too(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("Ωmega " * 50)
    flags = ("--val", tmp_path / "held.txt", "--out", tmp_path / "out", "--tokenizer", "char")
    assert prepare(texts, *flags, "--workers", "1") == 0
    assert "Ω" in load_tokenizer("char", tmp_path / "out").decode(stream(tmp_path / "out", "val"))
