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

from jaxgpt.errors import UserError
from jaxgpt.weights.hub import read_folder

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_an_unsupported_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "foreign"))
    assert read_folder(folder, "foreign")[1].name == "byte"
    for name in ("vocab.json", "tokenizer.json"):
        (folder / name).unlink()
    assert read_folder(folder, "foreign")[1].name == "byte"  # the only one with 257 ids
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(UserError, match=r"foreign has no tokenizer.json; make one"):
        read_folder(folder, "foreign")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download needs; it serves a folder as openai-community/gpt2."""

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
    """The address of a local server in place of the Hub."""
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


def test_weights_come_from_the_hub_by_name_and_then_from_the_cache(
    hub, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(exported.parent)  # a model beside it must not hide the Hub's
    done = sample_from_hub("gpt2", hub, tmp_path)
    assert (done.returncode, "gpt2: 11,600 parameters" in done.stderr) == (0, True), done.stderr
    again = sample_from_hub("gpt2", "http://127.0.0.1:9", tmp_path)  # no server there
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr


def test_a_missing_model_and_an_unreachable_hub_are_reported(hub, tmp_path: Path) -> None:
    done = sample_from_hub("nobody/nothing", hub, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nobody/nothing cannot be downloaded (RepositoryNotFoundError" in done.stderr
    done = sample_from_hub("gpt2", "http://127.0.0.1:9", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not in the local cache, and the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
