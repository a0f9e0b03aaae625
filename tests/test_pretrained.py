import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_train import last_params

from jaxgpt import train
from jaxgpt.config import ConfigError
from jaxgpt.presets import load_config, load_preset
from jaxgpt.pretrained import find_folder, read_folder, start_from
from jaxgpt.training.records import read_metrics

SHA = "0123456789abcdef0123456789abcdef01234567"


def val_losses(out_dir: Path) -> dict[int, float]:
    records = read_metrics(out_dir / "metrics.jsonl")
    return {r["step"]: r["val/loss"] for r in records if "val/loss" in r}


def fine_tune(exported: Path, out_dir: Path, *flags: str) -> int:
    shape = ["--batch-size=4", "--effective-batch-size=4", "--eval-iters=5", "--sample-tokens=0"]
    source = ["--preset", "demo", "--init-from", str(exported), "--out-dir", str(out_dir)]
    return train.main([*source, *shape, *flags])


# ---------------------------------------------------------------- folders and the Hub


def test_a_run_is_not_taken_for_a_hugging_face_folder(tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a run; .*python -m jaxgpt.export --out-dir"):
        find_folder(str(tiny_run))


def test_a_vocabulary_that_no_tokenizer_here_has_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "foreign"))
    assert read_folder(folder)[1].name == "byte"
    for name in ("vocab.json", "tokenizer.json"):
        (folder / name).unlink()
    assert read_folder(folder)[1].name == "byte"  # 257 ids can be no other
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(ConfigError, match="its tokenizer, of 257 ids, is none of gpt2 and byte"):
        read_folder(folder)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: openai-community/gpt2 is the folder it is given."""

    def __init__(self, folder: Path, *args):
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        prefix = "/api/models/openai-community/gpt2/"
        if path == f"{prefix}revision/main":
            files = [{"rfilename": file.name} for file in self.folder.iterdir()]
            return self.answer(json.dumps({"id": "gpt2", "sha": SHA, "siblings": files}).encode())
        if path.startswith(f"{prefix}tree/"):
            files = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in self.folder.iterdir()
            ]
            return self.answer(json.dumps(files).encode())
        file = self.folder / path.rpartition("/")[2]
        if path == f"/openai-community/gpt2/resolve/{SHA}/{file.name}" and file.exists():
            return self.answer(file.read_bytes())
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(exported: Path):
    """The address of a stand-in for the Hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, exported))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def sample_from_hub(name: str, endpoint: str, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "jaxgpt.sample", "--init-from", name, "--max-new-tokens=4"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_weights_come_from_the_hub_by_name_and_then_from_the_cache(hub, tmp_path: Path) -> None:
    done = sample_from_hub("gpt2", hub, tmp_path)
    assert (done.returncode, "gpt2: 11,600 parameters" in done.stderr) == (0, True), done.stderr
    again = sample_from_hub("gpt2", "http://127.0.0.1:9", tmp_path)  # nobody listens there
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr


def test_a_hub_without_the_model_or_none_at_all_is_said_in_a_sentence(hub, tmp_path: Path) -> None:
    done = sample_from_hub("nobody/nothing", hub, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nobody/nothing cannot be downloaded (RepositoryNotFoundError" in done.stderr
    done = sample_from_hub("gpt2", "http://127.0.0.1:9", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not in the local cache, and the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def tuned(exported: Path, tmp_path_factory) -> Path:
    """Four steps on from the exported weights, through a context that is cut to 12."""
    out_dir = tmp_path_factory.mktemp("tuned") / "run"
    assert fine_tune(exported, out_dir, "--max-iters=4", "--block-size=12") == 0
    return out_dir


def test_fine_tuning_starts_from_the_weights(exported, tiny_run, tmp_path, capsys) -> None:
    assert fine_tune(exported, tmp_path, "--max-iters=1") == 0
    assert val_losses(tmp_path)[0] == pytest.approx(val_losses(tiny_run)[8], abs=1e-6)
    out = " ".join(capsys.readouterr().out.split())
    assert "n_layer 2, n_head 2, n_embd 16, block_size 16" in out
    assert f"weights {exported}" in out


def test_a_fine_tuned_run_goes_on_bit_for_bit_and_without_its_source(
    exported, tuned: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(exported, tmp_path / "source"))
    short = ["--block-size=12", "--lr-decay-iters=4", "--max-iters=2"]
    assert fine_tune(source, tmp_path / "run", *short) == 0
    shutil.rmtree(source)
    flags = ["--preset=demo", "--batch-size=4", "--effective-batch-size=4", "--sample-tokens=0"]
    longer = ["--eval-iters=5", "--max-iters=4", "--block-size=12"]
    assert train.main([*flags, *longer, "--out-dir", str(tmp_path / "run")]) == 0
    assert last_params(tmp_path / "run") == last_params(tuned)


def test_the_same_command_goes_on_too_though_its_source_is_gone(tuned: Path) -> None:
    saved = load_config(tuned / "config.json")
    assert saved.model.block_size == 12
    asked = dataclasses.replace(load_preset("demo"), init_from=saved.init_from)
    cfg, folder = start_from(asked, saved, given=["init_from"])
    assert (cfg.model, cfg.tokenizer, folder) == (saved.model, "byte", None)
    elsewhere = dataclasses.replace(asked, init_from="no/such/folder")
    with pytest.raises(ConfigError, match="no such folder"):
        start_from(elsewhere, saved, given=["init_from"])


@pytest.mark.parametrize(
    ("flags", "answers"),
    [
        (["--n-layer=3", "--bias=True"], ["--n-layer 3: the weights of", "--bias True"]),
        (["--block-size=32"], ["--block-size 32: the weights of", "for 16 tokens", "shorter"]),
        (["--tokenizer=gpt2"], ["--tokenizer gpt2: the weights of", "have byte; leave it out"]),
        (["--init-from=nowhere"], ["--init-from nowhere: no such folder"]),
        (["--init-from=scratch"], ["a new --out-dir starts from scratch"]),
    ],
)
def test_what_is_at_odds_with_the_weights_is_refused(
    exported, tmp_path, capsys, flags, answers
) -> None:
    with pytest.raises(SystemExit) as left:
        fine_tune(exported, tmp_path / "run", *flags)
    err = capsys.readouterr().err
    assert left.value.code == 2
    assert [part for part in answers if part not in err] == []
    assert not (tmp_path / "run").exists()


def test_a_run_from_scratch_does_not_become_a_fine_tuned_one(tiny_run, exported, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        fine_tune(exported, tiny_run, "--max-iters=9")
    assert left.value.code == 2
    assert "init_from" in capsys.readouterr().err
