"""The part of the hub's HTTP interface that fetching and sending models uses, on this machine.

It follows what huggingface_hub asks: repositories are created, files are announced, large ones go to a store
by their sha256, one commit adds and deletes, and files are read by branch or commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standintokenstandintoken"


@dataclass
class Repository:
    """Commits by name, each a folder; ``main`` is the newest. One that is private asks for the token."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name] = dict(files)
        return name

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return next(reversed(self.commits), None)
        return next((name for name in self.commits if name.startswith(revision)), None)


@dataclass
class Hub:
    """What the stand-in holds and has been asked.

    Attributes:
        url: Where it listens.
        repositories: By ``OWNER/NAME``.
        asked: Method and path of every request.
        broken: It answers everything with error 500.
        pretended: Bytes that a file is said to have, by its path.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: bool = False
    pretended: dict[str, int] = field(default_factory=dict)

    def put(self, name: str, files: dict[str, bytes], **settings: bool) -> str:
        """Commits files to a repository, made where there is none; returns the commit."""
        return self.repositories.setdefault(name, Repository(**settings)).commit(files)

    def files(self, name: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        repository = self.repositories[name]
        return repository.commits[repository.resolve("main") or ""]


@contextmanager
def running() -> Iterator[Hub]:
    """Inside, a hub answers on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def handle_any(self) -> None:
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken:
            return self.send(500, {"error": f"at {self.headers.get('authorization')}"})
        for pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return answer(self, body, *found.groups())
        return self.send(404, {"error": "unknown"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def allowed(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {TOKEN}"

    def refuse(self, code: str, status: int = 404) -> None:
        self.send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": f"{code} of the hub"})

    def repository(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """A repository that may be read, and the commit of a revision; else the refusal is sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.allowed):
            self.refuse("RepoNotFound")
        elif repository.gated and not self.allowed:
            self.refuse("GatedRepo", 403)
        elif repository.commits and repository.resolve(revision) is None:
            self.refuse("RevisionNotFound")
        else:
            return repository, repository.resolve(revision) or ""
        return None

    # -- routes ----------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        if not self.allowed:
            return self.send(401, {"error": "no"})
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private=private)
        return self.send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def valid(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def announce(self, body: bytes, name: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.send(200, {"files": modes})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/store/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def keep(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send(400, {"error": "another sha256"})
        self.hub.store[oid] = body
        return self.send(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self.allowed:
            return self.send(403, {"error": "no"})
        repository = self.hub.repositories[name]
        files = dict(self.hub.files(name)) if repository.commits else {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repository.commit(files)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        found = self.repository(name, revision)
        if found is not None:
            repository, commit = found
            names = sorted(repository.commits.get(commit, {}))
            self.send(200, {"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in names]})

    def tree(self, body: bytes, name: str, revision: str) -> None:
        found = self.repository(name, revision)
        if found is not None:
            repository, commit = found
            files = repository.commits.get(commit, {})
            self.send(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in sorted(files.items())
                ],
            )

    def read(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self.repository(name, revision)
        if found is None:
            return None
        repository, commit = found
        data = repository.commits[commit].get(path)
        if data is None:
            return self.send(
                404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            )
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        told = {"ETag": etag, "X-Repo-Commit": commit, "Content-Type": "text/plain"}
        if path in self.hub.pretended:
            told |= {"X-Linked-Size": str(self.hub.pretended[path]), "X-Linked-Etag": etag}
        return self.send(200, data, told)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.valid),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.announce),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /store/(\w+)", _Handler.keep),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.read),
)
