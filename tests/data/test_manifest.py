"""Training and --inspect with a manifest, without one, and with changed shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from jaxgpt import train
from jaxgpt.data.manifest import check_manifest, fingerprint, load_manifest
from jaxgpt.data.token_file import PREPARE, DataError, write_shard
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.prepare import main

BYTE = load_tokenizer("byte")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of several shards, bytes as tokens."""
    folder = tmp_path_factory.mktemp("original")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"line {number} of a text. " * 40)
    out = folder / "out"
    flags = ["--tokenizer=byte", "--shard-tokens=5K", "--val-fraction=0.3"]
    assert main([str(folder), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*_train_*.bin"))[0]


def flip_a_bit(folder: Path) -> None:
    path = first_shard(folder)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def remove(folder: Path) -> None:
    first_shard(folder).unlink()


def cut(folder: Path) -> None:
    first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-2])


def add(folder: Path) -> None:
    write_shard(folder / "other_train_000009.bin", np.arange(10))


def add_of_build_nanogpt(folder: Path) -> None:
    np.save(folder / "other_train_000009.npy", np.arange(10, dtype=np.uint16))


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def strip_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"version": 1}')


def age_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (remove, "is missing"),
        (cut, "were written"),
        (add, "is not in manifest.json"),
        (add_of_build_nanogpt, "is not in manifest.json"),
        (damage_manifest, "JSON"),
        (strip_manifest, "Object missing required field `source`"),
        (age_manifest, "has version 99"),
    ],
)
def test_training_refuses_a_changed_folder(
    folder: Path, fault: Callable[[Path], None], said: str
) -> None:
    assert check_manifest(folder, BYTE)
    fault(folder)
    with pytest.raises(DataError, match=said) as caught:
        check_manifest(folder, BYTE)
    assert str(folder) in str(caught.value)


def test_a_shard_is_in_the_manifest_once(folder: Path) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_bytes())
    values["shards"].append(values["shards"][0])
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"^{path}: Expected each shard once, got .* 2 times; copy"):
        check_manifest(folder, BYTE)


def test_another_tokenizer_than_the_data_s_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="made with tokenizer 'byte', but the model's is 'gpt2'"):
        check_manifest(folder, load_tokenizer("gpt2"))


def test_an_unfinished_folder_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not finished; unless its"):
        check_manifest(folder, BYTE)
    shutil.rmtree(folder / ".prepare")
    assert check_manifest(folder, BYTE) is None
    (folder / "manifest-000-of-002.json").touch()
    with pytest.raises(DataError, match="several ranks, which an earlier version"):
        check_manifest(folder, BYTE)


def test_the_fingerprint_is_of_the_contents(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert manifest is not None
    before = fingerprint(manifest)
    assert fingerprint(replace(manifest, source={})) == before
    other = replace(manifest.shards[0], sha256="0" * 64)
    assert fingerprint(replace(manifest, shards=[other, *manifest.shards[1:]])) != before


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('"out_train_000001.bin"', '"../x.bin"', "shards[0]: Expected the name of a .bin file"),
        ('"out_train_000001.bin"', '"/etc/x.bin"', "shards[0]: Expected the name of a .bin file"),
        ('"out_train_000001.bin"', '".."', "shards[0]: Expected the name of a .bin file"),
        ('"out_train_000001.bin"', "7", "shards[0].file: Expected `str`, got `int`"),
        ('"split": "val"', '"split": "dev"', ".split: Invalid enum value 'dev'"),
        ('"n_vocab": 257', '"n_vocab": -1', "tokenizer.n_vocab: Expected `int` >= 0"),
        ('"fraction": 0.3', '"fraction": "x"', "validation.fraction: Expected `float | null`"),
        ('"train": {', '"trein": {', "splits: Object missing required field `train`"),
        ('"source": {', '"source": 5, "x": {', "source: Expected `object`, got `int`"),
    ],
)
def test_a_wrong_type_is_reported_with_the_key_and_what_was_expected(
    folder: Path, was: str, now: str, said: str
) -> None:
    path = folder / "manifest.json"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises(DataError) as caught:
        check_manifest(folder, BYTE)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert message.endswith(f"; copy {folder} again, or delete it and make it with {PREPARE}")


# A run and its data


def run(folder: Path, out: Path, max_iters: int) -> int:
    small = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--eval-iters=2"]
    flags = ["--preset=demo", "--dataset=mine", f"--data-dir={folder}", f"--out-dir={out}"]
    return train.main([*flags, *small, f"--max-iters={max_iters}", "--lr-decay-iters=4"])


def without_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / ".prepare")


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_run_resumes_with_its_data_and_refuses_other_data_of_the_same_size(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], with_manifest: bool
) -> None:
    if not with_manifest:
        without_a_manifest(folder)
    assert run(folder, tmp_path / "run", 2) == 0
    if with_manifest:
        assert run(folder, tmp_path / "run", 3) == 0
    shard = first_shard(folder)
    tokens = np.fromfile(shard, "<u2", offset=1024)
    write_shard(shard, tokens[::-1])
    if with_manifest:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["shards"][0]["sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as caught:
        run(folder, tmp_path / "run", 4)
    assert caught.value.code == 2
    assert "the data is not what the run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data_dir", "preset", "command"),
    [
        ("data/fineweb", "24gb", "fineweb --name sample-100BT --limit-tokens 27B,"),
        ("x/fineweb", "gpt2-124m", "fineweb --name sample-10BT --out x/fineweb,"),
        ("x/mine", "24gb", "YOUR_TEXT --out x/mine,"),
    ],
)
def test_for_missing_data_the_message_has_the_command_that_makes_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    data_dir: str,
    preset: str,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        train.main([f"--preset={preset}", "--device=cpu", f"--data-dir={data_dir}"])
    assert caught.value.code == 2
    assert f"make them with python -m jaxgpt.prepare {command}" in capsys.readouterr().err


# --inspect


def test_inspect_shows_the_contents_of_an_intact_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--inspect", str(folder)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    manifest = load_manifest(folder)
    assert manifest is not None
    for split in ("train", "val"):
        assert f"{getattr(manifest.splits, split).tokens:,} tokens" in said
    assert "<|endoftext|>line" in said
    assert "intact: headers, sizes, checksums, ids checked" in said


def test_inspect_prints_text_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[INST] one [/INST] [red]two[/] :smile: [link=x]"
    folder = tmp_path / ("long " * 30) / "data [/x] :cat:"  # wider than a terminal
    folder.mkdir(parents=True)
    tokens = np.array([BYTE.eot, *BYTE.encode(text)])
    for split in ("val", "train"):
        write_shard(folder / f"{split}_0.bin", tokens)
    assert main(["--inspect", str(folder), "--tokenizer=byte"]) == 0
    out = capsys.readouterr().out
    assert f"train begins <|endoftext|>{text}" in " ".join(out.split())
    assert out.startswith(f"{folder}\n")


@pytest.mark.parametrize("fault", [flip_a_bit, remove, cut, add])
def test_inspect_finds_every_error(
    folder: Path, capsys: pytest.CaptureFixture[str], fault: Callable[[Path], None]
) -> None:
    fault(folder)
    assert main(["--inspect", str(folder)]) == 2
    assert "ERROR" in capsys.readouterr().out


def test_inspect_reads_shards_without_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer("gpt2")
    text = tokenizer.encode("Some text of somebody else's.")
    for name in ("fineweb_val_000000", "fineweb_train_000001"):
        write_shard(tmp_path / f"{name}.bin", np.array([tokenizer.eot, *text]))
    assert main(["--inspect", str(tmp_path)]) == 0
    assert "somebody else's" in " ".join(capsys.readouterr().out.split())
    write_shard(tmp_path / "fineweb_train_000002.bin", np.array([50_300]))
    assert main(["--inspect", str(tmp_path)]) == 2
    assert "is id 50300" in capsys.readouterr().out
