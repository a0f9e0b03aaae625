"""From text to a tokenizer of its own, to a trained model, and out again."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.preparing import prepare, refusal
from helpers.runs import train

from jaxgpt import evaluate, export, plan, sample
from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.shards import load_split
from jaxgpt.data.sources import load_embedded_documents
from jaxgpt.data.tokenizer import byte_characters, load_tokenizer
from jaxgpt.preparation.inspect_folder import inspect_folder
from jaxgpt.tokenizer.__main__ import main
from jaxgpt.weights.gguf_file import gguf_vocabulary

FLAGS = ("--dataset", "mine", "--sample-tokens", "0")


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("".join(load_embedded_documents()[:20]))
    return Path("book.txt")


def test_a_tokenizer_travels_from_its_folder_to_the_exported_model(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*[str(book)] * 4, "--vocab-size", "600", "--out", "tok"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "600 ids trained on" in told
    assert "jaxgpt.prepare book.txt book.txt book.txt ... --tokenizer tok" in told
    assert "held out; with GPT-2: " in told
    flags = (book, "--workers", "1", "--out", "data/mine", "--tokenizer")
    assert prepare(*flags, "tok") == 0
    assert prepare(*flags, "tok/") == 0  # another name for it
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    Path("tok").rename("gone")  # the data has a copy
    assert train(Path("run"), *FLAGS, "--max-iters", "1") == 0
    Path("data/mine").rename("data/moved")  # the run has one, too
    assert train(Path("run"), *FLAGS, "--data-dir", "data/moved", "--max-iters", "2") == 0
    assert sample.main(["--out-dir", "run", "--prompt", "It is", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("It is")
    assert export.main(["--out-dir", "run", "--to", "exported"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (Path("exported") / name).read_bytes() == (Path("gone") / name).read_bytes()
    assert gguf_vocabulary(load_tokenizer("exported")).pre == "qwen35"
    flags = ["--init-from", "./exported", "--prompt", "It is", "--max-new-tokens", "4"]
    assert sample.main(flags) == 0


def test_data_of_another_tokenizer_is_refused(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("a", "600"), ("b", "601")):
        assert main([str(book), "--vocab-size", size, "--out", name]) == 0
    assert prepare(book, "--tokenizer", "a", "--workers", "1", "--out", "data/mine") == 0
    with pytest.raises(SystemExit):
        train(Path("run"), *FLAGS, "--tokenizer", "b", "--max-iters", "1")
    assert "was made with tokenizer 'a', but the model's is 'b'" in capsys.readouterr().err


def test_characters_train_and_come_out_as_a_tokenizer(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--tokenizer", "char", "--workers", "1", "--out", "data/mine")
    assert prepare(book, *flags) == 0
    assert inspect_folder(Path("data/mine"), "gpt2") == 0
    tokenizer, text = load_tokenizer("char", Path("data/mine")), book.read_text()
    assert tokenizer.n_vocab == len(set(text)) + 2  # an unknown character, the end of text
    splits = [load_split(Path("data/mine"), split, tokenizer.n_vocab) for split in ("train", "val")]
    ids = np.concatenate([split.window(0, len(split)) for split in splits])
    assert tokenizer.decode(ids[1:]) == text
    capsys.readouterr()
    flags_of_plan = ["--dataset", "mine", "--vram", "8", "--estimate", "--json"]
    assert plan.main(["--preset", "demo", *flags_of_plan]) == 0
    padding = json.loads(capsys.readouterr().out)["padding_parameters"]
    assert padding == -tokenizer.n_vocab % 64 * 128
    assert train(Path("run"), *FLAGS, "--max-iters", "1") == 0
    assert (Path("run") / "tokenizer.json").is_file()
    assert prepare(book, *flags) == 0  # again: nothing to do


def test_characters_do_not_mix_with_another_tokenizer(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (book, "--workers", "1", "--out", "data/mine")
    assert prepare(*flags) == 0
    message = refusal(capsys, *flags, "--tokenizer", "char")
    assert "data/mine: was started with --tokenizer gpt2, not char; a folder has" in message


def test_mistakes_are_known_before_a_tokenizer_is_trained(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(book), "--out", str(book)], "book.txt: is a file"),
        ([str(book), "--out", "~nobody-here/tok"], "there is no such home folder"),
        (["fineweb", "--out", "tok"], "this command reads nothing from the Hub"),
        ([str(book), "--out", f"{book}/tok"], "book.txt/tok: Not a directory"),
        ([str(book), "--out", "tok", "--vocab-size", "1000000000000"], "from 512 to 4194304"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_vocabulary_of_qwen3s_size_trains_and_evaluates(book: Path) -> None:
    tokens = [*byte_characters().values(), *(f"x{number}" for number in range(151_412))]
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}, "merges": []}
    eos = {"id": len(tokens), "content": "</s>", "special": True, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    values = {
        "added_tokens": [{**eos, "single_word": False, "lstrip": False, "rstrip": False}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": model,
    }
    Path("large.json").write_text(json.dumps(values))
    assert prepare(book, "--tokenizer", "large.json", "--workers", "1", "--out", "data/mine") == 0
    manifest = load_manifest(Path("data/mine"))
    assert manifest is not None
    assert (manifest.dtype, manifest.tokenizer.n_vocab) == ("uint32", 151_669)
    assert inspect_folder(Path("data/mine"), "gpt2") == 0
    assert train(Path("run"), *FLAGS, "--max-iters", "1", "--n-embd", "4") == 0
    assert json.loads(Path("run/config.json").read_text())["vocab_size"] == 151_680
    assert evaluate.main(["--out-dir", "run", "--val-tokens", "64"]) == 0
