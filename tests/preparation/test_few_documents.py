"""A few small texts: two commands, without flags, lead to a trained model."""

import json
from pathlib import Path

import pytest
from helpers.preparing import prepare

from jaxgpt import train
from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.tokenizer import load_tokenizer

NOVELS = "".join(load_embedded_documents())


def write_texts(folder: Path, kind: str) -> list[Path]:
    """The inputs of one of the cases below."""
    sizes = {"one file": [5_000], "eight files": [24_400] * 8, "two files": [20, 700]}.get(kind)
    if sizes is None:
        path = folder / "lines.jsonl"
        lines = [line for line in NOVELS.splitlines() if line][:1000]
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
        return [path]
    paths = [folder / f"{number}.txt" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        path.write_text(NOVELS[:size])
    return paths


@pytest.mark.parametrize("kind", ["one file", "eight files", "two files", "1,000 lines"])
def test_the_command_printed_after_preparing_trains(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)  # the next one is free
    inputs = write_texts(tmp_path, kind)
    assert prepare(*inputs, "--workers", "1", "--out", "data/mine") == 0
    manifest = load_manifest(Path("data/mine"))
    assert manifest is not None
    assert 0 < manifest.splits.val.tokens < manifest.splits.train.tokens
    assert manifest.splits.val.tokens > 10
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("train on it: python -m jaxgpt.train --preset demo --dataset mine ")
    command = told.removeprefix("train on it: python -m jaxgpt.train ").split()
    assert command[-2:] == ["--out-dir", "runs/mine-2"]
    if kind == "one file":
        small = ["--n-layer=1", "--n-embd=16", "--block-size=16", "--eval-iters=1"]
        assert train.main([*command, *small, "--max-iters=1", "--sample-tokens=0"]) == 0
        assert json.loads(Path("runs/mine-2/config.json").read_text())["tokenizer"] == "gpt2"


def test_the_end_of_one_file_is_its_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(NOVELS[:5000])
    assert prepare(text, "--tokenizer", "byte", "--workers", "1", "--out", tmp_path / "out") == 0
    assert "the last 10% of the text" in " ".join(capsys.readouterr().out.split())
    ids = load_tokenizer("byte").encode_documents([NOVELS[:5000]])
    assert (tmp_path / "out" / "out_train_000001.bin").read_bytes()[1024:] == ids[:4501].tobytes()
    assert (tmp_path / "out" / "out_val_000000.bin").read_bytes()[1024:] == ids[4501:].tobytes()
