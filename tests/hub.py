"""A stand-in of the Hugging Face Hub on this machine, for its real client: what creating, committing, listing and
downloading need, in memory. Everything that arrives is kept, so that tests can search it."""

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
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants, hf_api

TOKEN = "hf_of_tests"


@dataclass
class Repo:
    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    heads: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.heads["main"]]

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha], self.heads["main"] = files, sha
        return sha


class Hub:
    """Repositories by name, bytes that came, and requests as (method, path)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.bent: dict[str, bytes] = {}  # served in place of the file of that name
        self.endpoint = ""

    def arrived(self) -> bytes:
        """All that the hub was sent, files decoded."""
        files = [data for repo in self.repos.values() for files in repo.commits.values() for data in files.values()]
        return b"\n".join([*self.received, *self.blobs.values(), *files])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route("GET", b"")

    def do_HEAD(self):
        self.route("HEAD", b"")

    def do_POST(self):
        self.route("POST", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self):
        self.route("PUT", self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def route(self, method: str, body: bytes) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((method, path))
        if body:
            self.hub.received.append(body)
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, f"{method} {path}"):
                return handle(self, body, **found.groupdict())
        return self.answer({"error": f"no route {method} {path}"}, 404)

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, said in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), said)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository if whoever asks may; else the error a hub answers with."""
        repo = self.hub.repos.get(name)
        if repo is None or ((repo.private or write) and not self.known()):
            return self.answer({"error": "Repository not found"}, 401, X_Error_Code="RepoNotFound")
        if repo.gated:
            return self.answer({"error": "gated"}, 403, X_Error_Code="GatedRepo")
        return repo

    # -- routes --------------------------------------------------------------------------------------------------------

    def validate(self, body):
        self.answer({"warnings": [], "errors": []})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if not self.known():
            return self.answer({"error": "Invalid username or password."}, 401)
        if name in self.hub.repos:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        return self.answer(url)

    def info(self, body, name, rev=None):
        if repo := self.repo(name):
            sha = repo.heads.get(rev or "main", rev)
            if sha not in repo.commits:
                return self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": path} for path in repo.commits[sha]]
            self.answer({"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, body, name, rev):
        if repo := self.repo(name):
            files = repo.commits[repo.heads.get(rev, rev)].items()
            self.answer([described(path, data) for path, data in files])

    def preupload(self, body, name, rev):
        if self.repo(name, write=True):
            paths = [asked["path"] for asked in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, body, name):
        if self.repo(name, write=True):
            to = {one["oid"]: f"{self.hub.endpoint}/lfs/{one['oid']}" for one in json.loads(body)["objects"]}
            sizes = {one["oid"]: one["size"] for one in json.loads(body)["objects"]}
            objects = [
                {"oid": oid, "size": sizes[oid], "actions": {"upload": {"href": href}}} for oid, href in to.items()
            ]
            self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer({})

    def commit(self, body, name, rev):
        if not (repo := self.repo(name, write=True)):
            return
        files = dict(repo.files)
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}"})

    def resolve(self, body, name, rev, path):
        if not (repo := self.repo(name)):
            return
        sha = repo.heads.get(rev, rev)
        data = repo.commits[sha].get(path)
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(self.hub.bent.get(path, data), ETag=etag, X_Repo_Commit=sha)


def described(path: str, data: bytes) -> dict:
    """A file as a listing tells it."""
    sha = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {"oid": sha, "size": len(data), "pointerSize": 130}} if path.endswith(".safetensors") else {}
    return {"type": "file", "path": path, "size": len(data), "oid": sha[:40], **lfs}


REPO = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/validate-yaml", Handler.validate),
    (r"POST /api/repos/create", Handler.create),
    (rf"POST /api/models/{REPO}/preupload/(?P<rev>[^/]+)", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<rev>[^/]+)", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.store),
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"GET /api/models/{REPO}/revision/(?P<rev>[^/]+)", Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<rev>[^/]+)", Handler.tree),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the client in this process speaks to, as somebody who is logged in."""
    with running() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        places = made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", places)
        monkeypatch.setattr(hf_api.api, "endpoint", made.endpoint)  # what PEFT asks
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made
