"""The Hub, through its real client, against a server on this machine."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.hub_files import NAMED, SMALL, kill_at_first_file, run, shards, wait_for_request
from helpers.hub_server import COMMIT, Fault, Hub

from jaxgpt.data.manifest import load_manifest
from jaxgpt.data.shards import load_split
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.preparation.hub import download


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
    kill_at_first_file(hub, environment, *arguments)
    left = set(out.rglob("*.incomplete"))
    assert left
    kill_at_first_file(hub, environment, *arguments)
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
    told = "001_00000.parquet of dataset 'HuggingFaceFW/fineweb': the download is corrupt; retrying"
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
        wait_for_request(hub, "GET /datasets/.*parquet")
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert errors == "\npython -m jaxgpt.prepare: stopped; run the same command again to resume\n"


def test_any_dataset_is_read_by_its_card(
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


def test_another_split_of_the_dataset_is_the_validation(
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
def test_a_dataset_by_its_short_name(
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
            "but found scripted.py; the Hub has a parquet copy of most datasets",
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
    assert "limits the rate of requests (429); set HF_TOKEN" in done.stderr
    assert "run the same command again later to resume" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    finished = shards(out)
    assert finished
    assert expected.items() > finished.items()
    hub.faults.clear()
    again = run(environment, *arguments)
    assert again.returncode == 0, again.stderr
    assert shards(out) == expected


@pytest.mark.parametrize("name", ["../../a.parquet", "data/../../../a.parquet", "/tmp/a.parquet"])
def test_a_file_outside_the_folder_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """huggingface_hub 1.0 would write where it points."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(UserError, match="is outside the dataset's folder"):
        download("someone/jokes", name, 9, None, COMMIT, tmp_path / "downloads", print)
