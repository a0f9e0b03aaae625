"""`python -m jaxgpt.prepare` from the command line to the shards, and on to a trained model."""

import hashlib
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from helpers.preparing import RESULTS, SMALL, build, contents, prepare, stream

from jaxgpt import train
from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.preparation.text_manifest import SMALL_DATA, train_command


def test_two_commands_go_from_parquet_files_to_a_trained_model(
    fineweb_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data" / "fineweb"
    files = sorted(fineweb_like.glob("*.parquet"))
    assert prepare(*files, "--out", out, "--val-tokens", "20K", "--shard-tokens", "100K") == 0
    told = capsys.readouterr().out.splitlines()[-1]
    command = told.removeprefix("train on it: python -m jaxgpt.train ").split()
    small = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--eval-iters=2"]
    flags = ["--preset=demo", "--tokenizer=gpt2", f"--out-dir={tmp_path}/run", "--max-iters=3"]
    assert train.main([*command, *flags, *small]) == 0
    assert "epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    assert prepare(fineweb_like, "--out", tmp_path / "out", *SMALL, "--workers", "3") == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_the_bytes_do_not_depend_on_the_size_of_the_units(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    flags = ("--shard-tokens", "30K", "--unit-bytes", "1M")
    assert prepare(fineweb_like, "--out", tmp_path / "out", *flags) == 0
    assert contents(tmp_path / "out") == contents(prepared)


def test_every_document_occurs_once_after_an_end_of_text_token(
    fineweb_like: Path, prepared: Path
) -> None:
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer("gpt2")
    expected = []
    for path in sorted(fineweb_like.glob("*.parquet")):
        expected += pq.read_table(path, columns=["text"])["text"].to_pylist()
    found = []
    for split in ("train", "val"):
        tokens = stream(prepared, split)
        assert tokens[0] == tokenizer.eot
        starts = np.flatnonzero(tokens == tokenizer.eot)
        found += [tokenizer.decode(ids[1:]) for ids in np.split(tokens, starts)[1:]]
    assert sorted(found) == sorted(expected)


def test_tokens_minus_documents_are_the_source_s_own_count(prepared: Path) -> None:
    manifest = load_manifest(prepared)
    assert manifest is not None
    count = manifest.token_count
    assert count is not None
    assert count.equal
    tokens = sum(totals.tokens for _, totals in manifest.splits.items())
    documents = sum(totals.documents for _, totals in manifest.splits.items())
    assert count.source_says == count.tokens_minus_documents == tokens - documents > 100_000


def test_a_wrong_count_in_the_source_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["some words"] * 100, "token_count": [3] * 100})
    pq.write_table(table, tmp_path / "a.parquet")
    arguments = (tmp_path / "a.parquet", "--val-tokens", "10")
    assert prepare(*arguments, "--out", tmp_path / "o") == 0
    assert "NOT EQUAL" in capsys.readouterr().out
    assert prepare(*arguments, "--out", tmp_path / "b", "--tokenizer", "byte") == 0
    assert "token_count" not in capsys.readouterr().out, "the source counts GPT-2's tokens"


# Limits, added data, validation


def test_a_larger_limit_continues_where_a_smaller_one_stopped(
    fineweb_like: Path, tmp_path: Path
) -> None:
    flags = (fineweb_like, *SMALL, "--val-tokens", "20K", "--workers", "2")
    assert prepare(*flags, "--out", tmp_path / "all") == 0
    out = tmp_path / "limited"
    assert prepare(*flags, "--out", out, "--limit-tokens", "45K") == 0
    assert len(stream(out, "train")) == 45_000
    first = contents(out)
    assert prepare(*flags, "--out", out, "--limit-tokens", "100K") == 0
    assert len(stream(out, "train")) == 100_000
    kept = {name: sha for name, sha in contents(out).items() if name in first}
    first.pop("manifest.json"), kept.pop("manifest.json")
    assert kept == first, "a finished shard was written again"
    assert prepare(*flags, "--out", out) == 0
    for split in ("train", "val"):
        np.testing.assert_array_equal(stream(out, split), stream(tmp_path / "all", split))


def test_a_limited_run_does_not_depend_on_the_workers(fineweb_like: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers) / "out"
        flags = ("--limit-tokens", "70K", "--workers", workers)
        assert prepare(fineweb_like, "--out", out, *SMALL, *flags) == 0
    assert contents(tmp_path / "1" / "out") == contents(tmp_path / "3" / "out")


def test_val_tokens_makes_the_first_tokens_validation(
    fineweb_like: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    flags = ("--val-tokens", "50K", "--shard-tokens", "50K", "--unit-bytes", "100K")
    assert prepare(fineweb_like, "--out", out, *flags) == 0
    names = [shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]]
    assert names[:2] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert names[-1] == "fineweb_val_000000.bin"
    import pyarrow.parquet as pq

    first = pq.read_table(sorted(fineweb_like.glob("*.parquet"))[0], columns=["text"])["text"]
    tokenizer = load_tokenizer("gpt2")
    expected = np.concatenate([[tokenizer.eot, *tokenizer.encode(str(t))] for t in first[:10]])
    val = stream(out, "val")
    assert len(val) == 50_000
    np.testing.assert_array_equal(val[: len(expected)], expected)


def test_adding_files_changes_no_finished_shard(texts: Path, tmp_path: Path) -> None:
    out, flags = tmp_path / "out", ("--val-fraction", "0.3", "--shard-tokens", "200")
    later = [texts / "00.txt", texts / "39.txt"]
    first = [path for path in sorted(texts.iterdir()) if path not in later]
    assert prepare(*first, "--out", out, *flags) == 0
    before, val = contents(out), stream(out, "val")
    assert prepare(*first, *later, "--out", out, *flags) == 0
    after = contents(out)
    assert all(after[name] == sha for name, sha in before.items() if name != "manifest.json")
    np.testing.assert_array_equal(stream(out, "val")[: len(val)], val)
    tokens = sum(len(stream(out, split)) for split in ("train", "val"))
    assert prepare(texts, "--out", tmp_path / "all", *flags) == 0
    assert tokens == sum(len(stream(tmp_path / "all", split)) for split in ("train", "val"))


def test_the_split_of_a_document_depends_on_its_text_only(texts: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("gpt2")

    def validation(out: Path) -> set[str]:
        tokens = stream(out, "val")
        pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))[1:]
        return {tokenizer.decode(ids[1:]) for ids in pieces}

    some = sorted(texts.iterdir())[::2]
    assert prepare(texts, "--out", tmp_path / "all", "--val-fraction", "0.3") == 0
    assert prepare(*some, "--out", tmp_path / "some", "--val-fraction", "0.3") == 0
    named = {path.read_text() for path in some}
    assert validation(tmp_path / "some") == validation(tmp_path / "all") & named
    assert validation(tmp_path / "some")


def test_a_document_longer_than_a_shard_is_split(tmp_path: Path) -> None:
    text = "".join(f"word{number} " for number in range(20_000))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n")
    flags = ("--val-tokens", "100", "--shard-tokens", "1K")
    assert prepare(tmp_path / "long.jsonl", "--out", tmp_path / "out", *flags) == 0
    tokens = np.concatenate([stream(tmp_path / "out", split) for split in ("val", "train")])
    assert load_tokenizer("gpt2").decode(tokens[1:]) == text
    assert len(list((tmp_path / "out").glob("*.bin"))) > 50


def test_the_train_command_names_the_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(texts, "--out", out, "--tokenizer", "byte") == 0
    assert f"--preset demo --dataset out --data-dir {out}" in capsys.readouterr().out
    tokens = stream(out, "train")
    assert tokens[0] == 256
    assert bytes(tokens[1:7].astype(np.uint8)) == b"Text n"


def test_the_train_command_for_the_current_folder_names_it(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    manifest = load_manifest(Path("."))
    assert manifest is not None
    command = train_command(Path("."), manifest, False)
    assert f"--dataset {prepared.name} --data-dir . " in command
    assert f"--out-dir runs/{prepared.name}" in command
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data", "mine").symlink_to(prepared)
    assert train_command(Path("data/mine"), manifest, False).startswith(
        "python -m jaxgpt.train --preset demo --dataset mine --"
    )


def test_the_train_command_has_the_tokenizers_vocabulary(prepared: Path) -> None:
    """The presets for cards have GPT-2's, too large for other tokenizers, or too small."""
    manifest = load_manifest(prepared)
    assert manifest is not None
    size = msgspec.structs.replace(manifest.splits.train, tokens=SMALL_DATA)
    of_gpt2 = msgspec.structs.replace(
        manifest, splits=msgspec.structs.replace(manifest.splits, train=size)
    )
    other = msgspec.structs.replace(manifest.tokenizer, name="mine", n_vocab=32_001)
    of_another = msgspec.structs.replace(of_gpt2, tokenizer=other)
    plain = "python -m jaxgpt.train --dataset mine"
    assert train_command(Path("data/mine"), of_gpt2, True) == plain
    assert train_command(Path("data/mine"), of_another, True) == f"{plain} --vocab-size 32064"


# Other trainers


def test_shards_are_those_of_llm_c_and_modded_nanogpt_byte_for_byte(tmp_path: Path) -> None:
    """The hashes are of files that their own scripts wrote of this text; see the JSON's command."""
    recorded = json.loads((RESULTS / "interchange.json").read_text())
    assert len(recorded["writers_whose_files_are_equal_byte_for_byte"]) == 2
    build(tmp_path / "text", files=2, n_bytes=600_000)
    out, tokens = tmp_path / "fineweb", recorded["shard_tokens"]
    flags = ("--val-tokens", tokens, "--shard-tokens", tokens, "--unit-bytes", "100K")
    assert prepare(tmp_path / "text", "--out", out, *flags) == 0
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.bin")}
    assert found == recorded["shards"]
