"""The Hub, through its real client, against a server on this machine."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hub_server import COMMIT, Fault, Hub, serve
from helpers.preparing import build

from jaxgpt.data.manifest import check_manifest, load_manifest
from jaxgpt.data.shards import load_split
from jaxgpt.data.token_file import write_shard
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.hub import download
from jaxgpt.prepare import main

SMALL = ("--shard-tokens", "20K", "--unit-bytes", "60K", "--val-tokens", "20K")
CARD = """\
---
configs:
- config_name: plain
  data_files:
  - split: train
    path: plain/*.jsonl
  - split: test
    path: other/*.jsonl
- config_name: second
  data_files: other/*.jsonl
---
"""


NAMED = {
    "HuggingFaceFW/fineweb-2": "---\nconfigs:\n- config_name: arb_Arab\n  data_files: data/*\n---",
    "mlfoundations/dclm-baseline-1.0-parquet": "",
    "OptimalScale/ClimbMix": "",
}


TOKEN_ROWS = [[*range(first, first + 40)] for first in range(0, 50_000, 200)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the stand-in Hub."""
    folder = tmp_path_factory.mktemp("hub")
    sample = folder / "HuggingFaceFW" / "fineweb" / "sample"
    build(sample / "10BT", files=3, n_bytes=450_000, row_group=20)
    build(sample / "100BT", files=1, n_bytes=20_000, seed=1)
    plain = folder / "someone" / "jokes" / "plain"
    plain.mkdir(parents=True)
    (plain.parent / "README.md").write_text(CARD)
    for number in range(2):
        lines = [json.dumps({"joke": f"joke {number} {line} " * 9}) for line in range(300)]
        (plain / f"{number}.jsonl").write_text("\n".join(lines))
    (plain.parent / "other").mkdir()
    (plain.parent / "other" / "0.jsonl").write_text(json.dumps({"joke": "one more"}))
    for repo, card in NAMED.items():
        (folder / repo / "data").mkdir(parents=True)
        (folder / repo / "README.md").write_text(card)
        lines = [json.dumps({"text": f"{repo} {line} " * 9}) for line in range(300)]
        (folder / repo / "data" / "0.jsonl").write_text("\n".join(lines))
    rows = [{"cluster_id": 1, "tokens": ids, "token_count": len(ids)} for ids in TOKEN_ROWS]
    climbmix = folder / "nvidia" / "Nemotron-ClimbMix"
    (climbmix / "climbmix_small").mkdir(parents=True)
    (climbmix / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---"
    )
    (climbmix / "part_0.tokenized.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, climbmix / "climbmix_small" / "shard_0.tokenized.parquet")
    pictures = folder / "someone" / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes(b"png")
    (folder / "someone" / "scripted").mkdir()
    (folder / "someone" / "scripted" / "scripted.py").write_text("import datasets")
    ready = folder / "kjj0" / "fineweb10B-gpt2"
    ready.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("val_000000", "train_000001", "train_000002", "train_000003"):
        write_shard(ready / f"fineweb_{name}.bin", random.integers(0, 50257, 5000))
    return folder


@pytest.fixture
def hub(stored: Path) -> Iterator[Hub]:
    with serve(stored) as running:
        yield running


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The client connects to the stand-in only."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxgpt.prepare", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def shards(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.bin"))}


@pytest.fixture(scope="module")
def expected(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of the same files, read from the disk."""
    out = tmp_path_factory.mktemp("local") / "fineweb"
    files = stored / "HuggingFaceFW" / "fineweb" / "sample" / "10BT"
    assert main([str(files), "--out", str(out), *SMALL]) == 0
    return shards(out)


def test_fineweb_is_listed_downloaded_tokenized_and_its_downloads_deleted(
    hub: Hub, environment: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    done = run(environment, "fineweb", "--name", "sample-10BT", "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert shards(out) == expected
    manifest = load_manifest(out)
    assert manifest is not None
    assert manifest.source["repo"] == "HuggingFaceFW/fineweb"
    assert manifest.source["commit"] == COMMIT
    assert manifest.token_count is not None
    assert manifest.token_count.equal
    assert not (out / ".prepare" / "downloads").exists()
    assert "it/s" not in done.stderr, "one progress bar is enough"
    assert not any("100BT" in request for request in hub.requests)
    before = len(hub.requests)
    again = run(environment, "fineweb", "--name", "sample-10BT", "--out", out, *SMALL)
    assert "is complete" in again.stdout
    assert len(hub.requests) == before, "a finished folder asks for nothing"


def test_fineweb_under_its_full_name_has_llm_c_s_validation_too(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out")
    done = run(environment, "HuggingFaceFW/fineweb", "--name", "sample-100BT", *out)
    assert done.returncode == 2
    assert "all tokens are validation, which is the first 100,000,000" in done.stderr


def test_a_limit_leaves_no_download_behind(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "fineweb"
    done = run(environment, "fineweb", "--out", out, *SMALL, "--limit-tokens", "500")
    assert done.returncode == 0, done.stderr
    assert len(load_split(out, "train", 50257)) == 500
    assert not (out / ".prepare" / "downloads").exists()


def test_a_killed_or_interrupted_download_resumes(
    hub: Hub, environment: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    arguments = ["fineweb", "--out", str(out), *SMALL]
    _kill_at_first_file(hub, environment, *arguments)
    left = set(out.rglob("*.incomplete"))
    assert left
    _kill_at_first_file(hub, environment, *arguments)
    assert not left & set(out.rglob("*.incomplete")), "they would fill the disk"
    hub.faults += [
        Fault("GET .*000_00000.parquet", cut_after=20_000),
        Fault("GET .*001_00000.parquet", status=503),
        Fault("HEAD .*002_00000.parquet", status=429, headers={"Retry-After": "0"}),
    ]
    done = run(environment, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    assert not hub.faults
    assert shards(out) == expected


def test_a_corrupt_download_is_repeated(
    hub: Hub, environment: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    hub.faults += [Fault("GET .*001_00000.parquet", flip=True)]
    done = run(environment, "fineweb", "--out", tmp_path / "fineweb", *SMALL)
    assert done.returncode == 0, done.stderr
    told = (
        "001_00000.parquet of data set 'HuggingFaceFW/fineweb': the download is corrupt; retrying"
    )
    assert told in done.stdout
    assert shards(tmp_path / "fineweb") == expected


def test_an_error_of_the_hub_s_xet_storage_is_retried(
    hub: Hub, environment: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("hf_xet")
    hub.faults += [Fault("HEAD .*001_00000.parquet", headers=hub.of_xet())]
    done = run(environment, "fineweb", "--out", tmp_path / "fineweb", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "retrying" in done.stdout
    assert any("/storage/" in request for request in hub.requests)
    assert shards(tmp_path / "fineweb") == expected


def test_ctrl_c_during_a_download_ends_at_once(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.hold.clear()
    command = [sys.executable, "-m", "jaxgpt.prepare", "fineweb", "--out", str(tmp_path), *SMALL]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for_request(hub, "GET /datasets/.*parquet")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert errors == "\npython -m jaxgpt.prepare: stopped; run the same command again to resume\n"


def _kill_at_first_file(hub: Hub, environment: dict[str, str], *arguments: str) -> None:
    """Run a command until it asks for a file."""
    hub.hold.clear()
    hub.requests.clear()
    command = [sys.executable, "-m", "jaxgpt.prepare", *arguments]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for_request(hub, "GET /datasets/")
    finally:
        child.kill()
        child.wait()
        hub.hold.set()


def _wait_for_request(hub: Hub, pattern: str) -> None:
    import re

    deadline = time.monotonic() + 30
    while not any(re.search(pattern, request) for request in hub.requests):
        assert time.monotonic() < deadline, hub.requests
        time.sleep(0.01)


def test_any_data_set_is_read_by_its_card(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "jokes"
    flags = ("--name", "plain", "--text-column", "joke", "--out", out)
    done = run(environment, "someone/jokes", *flags)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    assert manifest is not None
    assert manifest.documents is not None
    assert manifest.documents.used == 600
    assert manifest.source["files"] == ["plain/0.jsonl", "plain/1.jsonl"]
    for flags, said in (
        (("--name", "plian"), "plian"),
        (("--name", "plain", "--split", "dev"), "has no split 'dev'"),
    ):
        wrong = run(environment, "someone/jokes", *flags, "--out", tmp_path / "x")
        assert wrong.returncode == 2
        assert said in wrong.stderr
        assert len(wrong.stderr.strip().splitlines()) == 1, wrong.stderr


def test_another_split_of_the_data_set_is_the_validation(
    environment: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "jokes"
    flags = ("--name", "plain", "--text-column", "joke", "--val", "test", "--out", out)
    done = run(environment, "someone/jokes", *flags)
    assert done.returncode == 0, done.stderr
    held_out = load_split(out, "val", 50257)
    assert load_tokenizer("gpt2").decode(held_out.window(1, len(held_out) - 1)) == "one more"
    manifest = load_manifest(out)
    assert manifest is not None
    assert manifest.splits.train.documents == 600


@pytest.mark.parametrize(
    ("arguments", "repo"),
    [*zip([["fineweb-2", "--name", "arb_Arab"], ["dclm"], ["climbmix"]], NAMED, strict=True)],
)
def test_a_data_set_by_its_short_name(
    environment: dict[str, str], tmp_path: Path, arguments: list[str], repo: str
) -> None:
    out = tmp_path / "out"
    done = run(environment, *arguments, "--tokenizer", "byte", "--workers", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    manifest = load_manifest(out)
    assert manifest is not None
    assert manifest.source["repo"] == repo
    assert manifest.validation.rule != "first tokens"  # FineWeb's
    assert ("CC BY-NC 4.0" in done.stdout) == (arguments == ["climbmix"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["someone/nothing"], "does not exist on the Hub"),
        (["fineweb", "--name", "sample-1BT"], "check --name (sample-10BT, sample-100BT"),
        (["fineweb", "--split", "test"], "has no split 'test', only 'train'"),
        (["fineweb", "--revision", "v9"], "has no such --revision"),
        (["someone/pictures"], "--revision refs/convert/parquet"),
        (
            ["someone/scripted"],
            "but found scripted.py; the Hub has a parquet copy of most data sets",
        ),
    ],
)
def test_a_wrong_name_gives_one_sentence(
    environment: dict[str, str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    done = run(environment, *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_network_is_reported_soon(environment: dict[str, str], tmp_path: Path) -> None:
    began = time.monotonic()
    environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    done = run(environment, "fineweb", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "the Hub could not be reached" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert time.monotonic() - began < 40
    offline = run({**environment, "HF_HUB_OFFLINE": "1"}, "fineweb", "--out", tmp_path / "out")
    assert "HF_HUB_OFFLINE is set" in offline.stderr


def test_the_same_command_resumes_after_all_retries_have_failed(
    hub: Hub, environment: dict[str, str], expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "fineweb"
    refusal = Fault("HEAD .*002_00000.parquet", status=429, headers={"Retry-After": "0"})
    hub.faults += [refusal] * 100
    arguments = ["fineweb", "--out", str(out), *SMALL]
    code = (
        "import sys; from jaxgpt.preparation import hub_retry; from jaxgpt.prepare import main\n"
        "if __name__ == '__main__': hub_retry.WAITS = (); sys.exit(main(sys.argv[1:]))"
    )
    script = tmp_path / "impatient.py"  # workers import it again
    script.write_text(code)
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "still limits the rate of requests (429); set HF_TOKEN" in done.stderr
    assert "run the same command again later to resume" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    finished = shards(out)
    assert finished
    assert expected.items() > finished.items()
    hub.faults.clear()
    again = run(environment, *arguments)
    assert again.returncode == 0, again.stderr
    assert shards(out) == expected


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
    _kill_at_first_file(hub, environment, "fineweb", "--ready", "--out", str(out))
    with pytest.raises(UserError, match="is not finished; run its"):
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
    other = run(environment, "fineweb-edu", "--ready", "--name", "sample-10BT", "--out", out)
    assert "contains shards of kjj0/fineweb10B-gpt2" in other.stderr


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


@pytest.mark.parametrize("name", ["../../a.parquet", "data/../../../a.parquet", "/tmp/a.parquet"])
def test_a_file_outside_the_folder_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """huggingface_hub 1.0 would write where it points."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="is outside the data set's folder"):
        download("someone/jokes", name, 9, None, COMMIT, tmp_path / "downloads", print)
