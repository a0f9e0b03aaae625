"""Token shards and token lists of the Hub, which are made ready."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.hub_files import TOKEN_ROWS, kill_at_first_file, run, shards
from helpers.hub_server import Hub

from jaxgpt.data.manifest import check_manifest, load_manifest
from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import write_shard
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation import pretokenized


def test_ready_made_shards_are_downloaded_checked_and_added_to(
    hub: Hub, environment: dict[str, str], stored: Path, tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    done = run(environment, "fineweb", "--ready", "--tokens", "7K", "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(shards(out)) == [f"fineweb_train_00000{n}.bin" for n in (1, 2)] + [
        "fineweb_val_000000.bin"
    ]
    assert len(load_split(out, "train", 50257)) == 10_000
    kill_at_first_file(hub, environment, "fineweb", "--ready", "--out", str(out))
    with pytest.raises(UserError, match="is not finished; unless its"):
        check_manifest(out, load_tokenizer("gpt2"))
    hub.requests.clear()
    more = run(environment, "fineweb", "--ready", "--out", out)
    assert more.returncode == 0, more.stderr
    assert sum("GET /datasets" in request for request in hub.requests) == 1, "only the new one"
    manifest = load_manifest(out)
    assert manifest is not None
    original = stored / "kjj0" / "fineweb10B-gpt2"
    assert {s.file: s.sha256 for s in manifest.shards} == shards(original)
    (out / "fineweb_train_000002.bin").unlink()
    assert run(environment, "fineweb", "--ready", "--out", out).returncode == 0
    assert shards(out) == shards(original), "what is gone is fetched again"
    (out / "fineweb_train_000003.bin").unlink()
    fewer = run(environment, "fineweb", "--ready", "--tokens", "7K", "--out", out)
    assert fewer.returncode == 0, fewer.stderr
    manifest = load_manifest(out)
    assert manifest is not None
    assert {s.file for s in manifest.shards} == set(shards(out)), "only files that are there"
    other = run(environment, "fineweb-edu", "--ready", "--name", "sample-10BT", "--out", out)
    assert "contains shards of kjj0/fineweb10B-gpt2" in other.stderr


def test_ready_made_shards_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a/x_train_000001.bin", "a/x_val_000000.bin", "b/x_train_000001.bin")
    files = [SimpleNamespace(path=name, size=4096) for name in names]
    monkeypatch.setattr(pretokenized, "find_commit", lambda *_: "c0ffee")
    monkeypatch.setattr(pretokenized, "list_files", lambda *_: files)
    with pytest.raises(UserError, match=r"a/x_\S+ and b/x_train_000001.bin have the same name"):
        pretokenized.list_shards("someone/tokens", None, None)
    assert len(pretokenized.list_shards("someone/tokens", 1000, None)[1]) == 2


def test_a_ready_made_shard_with_foreign_ids_is_refused(
    hub: Hub, environment: dict[str, str], stored: Path, tmp_path: Path
) -> None:
    folder = stored / "someone" / "else"
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        write_shard(folder / f"x_{split}_000000.bin", np.full(100, 60_000))
    done = run(environment, "someone/else", "--ready", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "is id 60000, outside the tokenizer's 50,257" in done.stderr
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("name", [(), ("--name", "climbmix_small")])
def test_ready_tokens_of_climbmix_become_shards_and_their_licence_is_said(
    environment: dict[str, str], tmp_path: Path, name: tuple[str, ...]
) -> None:
    out = tmp_path / "climbmix"
    flags = ("--ready", *name, "--workers", "1", "--out", out)
    done = run(environment, "climbmix", *flags)
    assert done.returncode == 0, done.stderr
    assert "licence is CC BY-NC 4.0" in done.stdout
    splits = [load_split(out, split, 50_257) for split in ("train", "val")]
    tokens = np.concatenate([split.window(0, len(split)) for split in splits])
    documents = np.split(tokens, np.flatnonzero(tokens == 50_256))[1:]
    assert sorted(ids[1:].tolist() for ids in documents) == TOKEN_ROWS
    manifest = load_manifest(out)
    assert manifest is not None
    assert manifest.token_count is not None
    assert manifest.token_count.equal
    assert (manifest.tokenizer.name, manifest.source["text_column"]) == ("gpt2", "tokens")


def test_ready_tokens_that_are_not_gpt2_s_are_refused(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.folder = tmp_path / "hub"
    stored = hub.folder / "nvidia" / "Nemotron-ClimbMix" / "part_0.tokenized.jsonl"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps({"tokens": [1, 50_257]}))
    done = run(environment, "climbmix", "--ready", "--workers", "1", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "part_0.tokenized.jsonl: id 50257 is not one of the 50,257 ids" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
