"""A local stand-in of the hub's HTTP interface, as far as creating a repository and uploading a folder go."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_0123456789"
USER = "me"
LARGE = (".safetensors", ".gguf")


class Hub:
    """What the server holds.

    Attributes:
        repos: name -> ``private`` and ``files``, name -> bytes.
        fail: part of a path; requests that hold it are answered 500.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fail = ""
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers."""
        if self.fail and self.fail in path:
            return 500, {"error": "out of order"}, {"X-Error-Message": "out of order"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path.startswith("/lfs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}, {}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        rest = path.removeprefix(f"/api/models/{name}")
        if rest == "/preupload/main":
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}, {}
        if rest == "/commit/main":
            self._commit(name, body)
            return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}, {}
        siblings = [{"rfilename": file} for file in self.repos[name]["files"]]
        return 200, {"id": name, "private": self.repos[name]["private"], "siblings": siblings, "sha": "0" * 40}, {}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.url}/{name}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repos[name] = {"private": private, "files": {".gitattributes": b""}}
        return 200, {"url": url, "name": name}, {}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        return {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}}}

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                self.repos[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.repos[name]["files"][value["path"]] = self.objects[value["oid"]]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """The server on a port of this machine, at ``hub.url``, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self._body()
            path = self.path.split("?")[0]
            hub.asked.append(f"{self.command} {path}")
            signed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
            denied = (
                401,
                {"error": "Invalid credentials"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
            status, found, headers = hub.answer(self.command, path, body) if signed else denied
            content = json.dumps(found).encode()
            self.send_response(status)
            for key, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815 - names of the base class

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
