"""A server that answers what huggingface_hub asks when it creates a repository and uploads a folder."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test_token"


class FakeHub(ThreadingHTTPServer):
    """A hub with one user, who may write with `TOKEN` below "me".

    Attributes:
        role: Role of the token: write or read.
        visibility: Visibility of each repository that was created.
        files: Content of each file that was committed.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.role = "write"
        self.visibility: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(chunks)

    def refuses_token(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.answer(401, {"error": "Invalid username or password."})
        return True

    def do_GET(self) -> None:
        if self.refuses_token():
            return
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            token = {"displayName": "test", "role": self.server.role}
            self.answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})
            return
        repo, _, rest = path.removeprefix("/api/models/").partition("/tree/")
        if repo.split("/revision/")[0] not in self.server.visibility:
            self.answer(404, {"error": "Repository not found"})
        elif rest:
            self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.server.files])
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(200, {"id": repo, "sha": "0" * 40, "private": True, "siblings": siblings, "tags": []})

    def do_POST(self) -> None:
        body = self.read()
        if self.refuses_token():
            return
        if self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"} for f in files
            ]
            self.answer(200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.server.url}/blobs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit(body)
        else:
            self.answer(200, {})  # checks of the card

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[-1]] = self.read()
        self.answer(200, {})

    def create(self, request: dict[str, Any]) -> None:
        owner, name = request.get("organization") or "me", request["name"]
        repo = f"{owner}/{name}"
        if owner != "me":
            self.answer(403, {"error": f'You don\'t have the rights to create a model under the namespace "{owner}"'})
        elif repo in self.server.visibility:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        else:
            self.server.visibility[repo] = request.get("visibility") or ("private" if request.get("private") else "public")
            self.answer(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.files[value["path"]]
        self.answer(200, {"commitUrl": f"{self.server.url}/me/model/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True})


@contextlib.contextmanager
def serve_fake_hub() -> Iterator[FakeHub]:
    """Yield a running server."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
