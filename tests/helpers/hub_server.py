"""A stand-in for the Hugging Face Hub, which serves the files of a folder to its client."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


class Fault(NamedTuple):
    """An error in the response to the next request whose path matches."""

    pattern: str
    status: int = 200  # instead of the normal response
    headers: dict[str, str] = {}  # noqa: RUF012  # of the response, or in addition to those of a file
    cut_after: int | None = None  # the connection drops after so many bytes of the body
    flip: bool = False  # flip a bit of the body


NO_FAULT = Fault("")


class Hub:
    """The datasets in a folder, as `owner/name/...`, with its requests and its coming faults."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.hold = threading.Event()  # while it is clear, files are not sent
        self.hold.set()
        self.url = ""

    def of_xet(self) -> dict[str, str]:
        """Headers of a file that is in Xet's storage."""
        return {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{self.url}/xet"}

    def xet_headers(self) -> dict[str, str]:
        """The address of Xet's storage: a path of this server that does not exist."""
        return {
            "X-Xet-Cas-Url": f"{self.url}/storage",
            "X-Xet-Access-Token": "token",
            "X-Xet-Token-Expiration": "9999999999",
        }


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """A server on a free port of this machine."""
    hub = Hub(folder)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.hold.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("content-length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        request = f"{self.command} {path}"
        fault = next((f for f in self.hub.faults if re.search(f.pattern, request)), NO_FAULT)
        if fault in self.hub.faults:
            self.hub.faults.remove(fault)
        if fault.status != 200:
            return self._send(fault.status, b"no", fault.headers)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._dataset(*found.groups())
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", path):
            return self._tree(*found.groups())
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            return self._paths_info(found[1], body)
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[3], fault)
        if path == "/xet":
            return self._send(200, b"", self.hub.xet_headers())
        return self._send(404, b"{}", {})

    def _dataset(self, repo: str, revision: str | None) -> None:
        if not (self.hub.folder / repo).is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": info["path"]} for info in self._files(repo, "")]
        info = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False}
        return self._json({**info, "downloads": 0, "likes": 0, "tags": [], "disabled": False})

    def _tree(self, repo: str, revision: str, under: str) -> None:
        files = self._files(repo, under)
        if not files:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        recursive = "recursive=true" in self.path.lower() or "recursive=1" in self.path.lower()
        if not recursive:
            depth = under.count("/") + 1 if under else 0
            folders = {f["path"].split("/")[depth] for f in files if f["path"].count("/") > depth}
            prefix = f"{under}/" if under else ""
            files = [f for f in files if f["path"].count("/") == depth]
            files += [
                {"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40}
                for name in sorted(folders)
            ]
        return self._json(files)

    def _paths_info(self, repo: str, body: bytes) -> None:
        if b"=" in body and not body.startswith(b"{"):
            from urllib.parse import parse_qs

            paths = parse_qs(body.decode())["paths"]
        else:
            paths = json.loads(body)["paths"]
        infos = {info["path"]: info for info in self._files(repo, "")}
        return self._json([infos[path] for path in paths if path in infos])

    def _files(self, repo: str, under: str) -> list[dict[str, Any]]:
        base = self.hub.folder / repo
        infos = []
        for path in sorted((base / under).rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            info: dict[str, Any] = {
                "type": "file",
                "path": str(path.relative_to(base)),
                "size": len(data),
                "oid": hashlib.sha1(data).hexdigest(),
            }
            if path.suffix in (".parquet", ".bin", ".zst", ".gz"):
                sha256 = hashlib.sha256(data).hexdigest()
                info["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
            infos.append(info)
        return infos

    def _file(self, repo: str, name: str, fault: Fault) -> None:
        path = self.hub.folder / repo / name
        if not path.is_file():
            code = "EntryNotFound" if (self.hub.folder / repo).is_dir() else "RepoNotFound"
            return self._send(404, b"", {"X-Error-Code": code})
        if self.command == "GET":
            self.hub.hold.wait(120)
        data = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            **fault.headers,
        }
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if fault.flip:
            data = bytes([data[0] ^ 1]) + data[1:]
        return self._send(status, data, headers, fault.cut_after)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_after])
        if cut_after is not None:
            self.close_connection = True
