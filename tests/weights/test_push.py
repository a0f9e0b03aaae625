import base64
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from jaxgpt.config.checks import ConfigError
from jaxgpt.weights.hub import check_login, push


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs."""

    commits: list[dict[str, bytes]]
    created: list[str]
    refuses: bool = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses:
            return self.answer(403, {"error": "you may not write here"})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body)["name"])
            return self.answer(200, {"url": f"http://{self.headers['Host']}/me/my-model"})
        if self.path == "/api/models/me/my-model/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": path, **modes} for path in paths]})
        if self.path == "/api/models/me/my-model/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
            url = f"http://{self.headers['Host']}/me/my-model/commit/abc"
            return self.answer(200, {"success": True, "commitUrl": url, "commitOid": "abc"})
        return self.answer(200, {"errors": [], "warnings": []})  # of the card

    def answer(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """A local server in place of the Hub."""

    class Handler(Hub):
        commits: list = []  # noqa: RUF012
        created: list = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    api = partial(huggingface_hub.HfApi, endpoint=url, token="hf_test")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for name in ("my-model.gguf", "README.md"):
        (tmp_path / name).write_bytes(b"bytes of " + name.encode())
    return sorted(tmp_path.iterdir())


def test_the_files_and_the_card_go_up_in_one_commit(hub, files: list[Path]) -> None:
    url = push("me/my-model", files[0], files, "# The card of this upload")
    assert url.endswith("/me/my-model/commit/abc")
    assert hub.created == ["my-model"]
    assert hub.commits == [
        {"my-model.gguf": b"bytes of my-model.gguf", "README.md": b"# The card of this upload"}
    ]


def test_a_refused_upload_says_what_is_complete_and_how_to_go_on(hub, tmp_path: Path) -> None:
    hub.refuses = True
    model, modelfile = tmp_path / "m.gguf", tmp_path / "m.Modelfile"
    for file in (model, modelfile):
        file.touch()
    upload = "hf upload me/my-model"
    for target, remedy in (
        (model, f"{upload} {model} && {upload} {modelfile}"),
        (tmp_path, f"{upload} {tmp_path}"),
    ):
        with pytest.raises(ConfigError) as refused:
            push("me/my-model", target, [model, modelfile], "")
        assert f"{target} is complete, but uploading it failed" in str(refused.value)
        assert str(refused.value).endswith(f"upload it with {remedy}")


def test_a_wrong_name_or_a_missing_login_is_reported_before_anything_is_written(
    monkeypatch,
) -> None:
    for name in ("my-model", "me/", "/my-model", "me/my/model"):
        with pytest.raises(ConfigError, match="must be owner/name"):
            check_login(name)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="not logged in to the Hub; run hf auth login"):
        check_login("me/my-model")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_test")
    check_login("me/my-model")
