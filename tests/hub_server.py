"""A small stand-in for the Hub on loopback: what huggingface_hub asks for over HTTP when it looks
repositories up, uploads (plain LFS), commits and downloads. It keeps everything in memory.

A commit is made whole or not at all, as on the Hub; what an upload left behind is no commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin")  # files that go over LFS


@dataclass
class Repo:
    """A repository: its commits, each {path: bytes}, the newest last."""

    kind: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes], message: str) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{message}".encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        self.commits[digest.hexdigest()] = files
        self.messages.append(message)
        return digest.hexdigest()


class Hub:
    """The server. Use as a context manager.

    Attributes:
        users: token -> what whoami says. repos: (kind, "user/name") -> repository.
        objects: sha256 -> uploaded LFS object. uploaded: the order in which they came whole.
        requests: "METHOD /path" of each request.
        fault: what goes wrong: None; "refuse" or "hang" an upload of an object that is not named in
            `spared` when half of it has come; "cut" it once; "drop" the commit half way; have
            somebody else commit first ("race").
        seen: set when an upload hangs.
        altered: path -> bytes that are served instead of those of the commit.
    """

    def __init__(self):
        self.users: dict[str, dict] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.requests: list[str] = []
        self.fault: str | None = None
        self.spared: set[str] = set()
        self.seen, self.released = Event(), Event()
        self.altered: dict[str, bytes] = {}
        self.lock = Lock()
        self.open: set[socket.socket] = set()
        self.listen(0)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def listen(self, port: int) -> None:
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", port), handler)
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @contextmanager
    def away(self):
        """Nobody listens."""
        port = self.server.server_address[1]
        self.close()
        try:
            yield
        finally:
            self.listen(port)

    def add_user(self, name: str, token: str, role: str = "write", orgs: tuple[str, ...] = ()):
        self.users[token] = {
            "type": "user",
            "name": name,
            "orgs": [{"name": org} for org in orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
        }

    def add_repo(self, name: str, files=None, kind: str = "model", private: bool = False) -> Repo:
        repo = self.repos[kind, name] = Repo(kind, private)
        repo.commit({".gitattributes": b"", **(files or {})}, "initial commit")
        return repo

    def model(self, name: str) -> Repo:
        return self.repos["model", name]

    @contextmanager
    def failing(self, fault: str, spared=()):
        self.fault, self.spared = fault, set(spared)
        self.seen.clear(), self.released.clear()
        try:
            yield
        finally:
            self.fault = None
            self.released.set()


class Server(ThreadingHTTPServer):
    """A thread a connection; those that break off are no news."""

    daemon_threads = True

    def handle_error(self, *address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.hub.open.add(self.connection)

    def finish(self) -> None:
        self.hub.open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    # Answers

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), **headers)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # Questions

    @property
    def length(self) -> int:
        return int(self.headers.get("Content-Length", 0))

    def body(self) -> dict:
        return json.loads(self.rfile.read(self.length) or b"{}")

    def user(self) -> dict | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def may_write(self, name: str) -> bool:
        user = self.user()
        if user is None or user["auth"]["accessToken"]["role"] != "write":
            return False
        return name.split("/")[0] in [user["name"], *(org["name"] for org in user["orgs"])]

    def repo(self, kind: str, name: str) -> Repo | None:
        """The repository, or None when the answer has gone out."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self.may_write(name)):
            self.refuse(404 if self.user() else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if "Authorization" in self.headers and self.user() is None:
            self.rfile.read(self.length)
            return self.refuse(401, message="Invalid credentials in Authorization header")
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return answer(self, *match.groups())
        self.rfile.read(self.length)
        self.refuse(404, message="no such page")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def whoami(self) -> None:
        user = self.user()
        self.json(user) if user else self.refuse(401, message="Invalid username or password.")

    def create(self) -> None:
        asked = self.body()
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or self.user()['name']}/{asked['name']}"
        if not self.may_write(name):
            return self.refuse(403, message=f"You don't have the rights to create {name}")
        if (kind, name) in self.hub.repos:
            return self.refuse(409, message="You already created this model repo")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.add_repo(name, kind=kind, private=bool(private))
        self.json({"url": f"{self.hub.url}/{name}"})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        sha = repo.head if revision in (None, "main") else revision
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        card = re.match(r"---\n(.*?)\n---", repo.commits[sha].get("README.md", b"").decode(), re.S)
        self.json(
            {
                "id": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
                "cardData": yaml.safe_load(card[1]) if card else None,
            }
        )

    def tree(self, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        entries = []
        for path, content in repo.commits[repo.head if revision == "main" else revision].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
            if path.endswith(LARGE):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.json(entries)

    def validate_yaml(self) -> None:
        header = re.match(r"---\n(.*?)\n---", self.body()["content"], re.S)
        values = yaml.safe_load(header[1]) if header else {}
        errors = []
        if not re.fullmatch(r"[a-z0-9.\-]+", str(values.get("license", "mit"))):
            errors.append({"message": '"license" must be one of the known licences'})
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, name: str, _revision: str) -> None:
        repo, asked = self.repo(kind, name), self.body()
        if repo is None:
            return
        if not self.may_write(name):
            return self.refuse(403, message=f"You don't have the rights to write to {name}")
        files = []
        for file in asked["files"]:
            large = file["path"].endswith(LARGE)
            known = repo.files.get(file["path"])
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if large else blob_id(known)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            files[-1]["oid"] = oid
        self.json({"files": files})

    def lfs_batch(self, _name: str) -> None:
        objects = []
        for wanted in self.body()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs-objects/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        self.json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        hub, half = self.hub, self.length // 2
        content = self.rfile.read(half)
        if hub.fault in ("refuse", "cut", "hang") and oid not in hub.spared:
            fault = hub.fault
            if fault == "hang":
                hub.seen.set()
                hub.released.wait()
            if fault == "cut":
                hub.fault = None  # once
            if fault == "refuse":
                self.close_connection = True
                return self.refuse(403, message="Request has expired")
            return self.hang_up()
        content += self.rfile.read(self.length - half)
        assert hashlib.sha256(content).hexdigest() == oid
        with hub.lock:
            hub.objects[oid] = content
            hub.uploaded.append(oid)
        self.send(200)

    def commit(self, kind: str, name: str, _revision: str) -> None:
        repo = self.repo(kind, name)
        if repo is None:
            return
        if self.hub.fault == "drop":
            self.rfile.read(self.length // 2)
            return self.hang_up()
        lines = [json.loads(line) for line in self.rfile.read(self.length).splitlines()]
        header, files = lines[0]["value"], dict(repo.files)
        if self.hub.fault == "race":
            repo.commit(repo.files | {"notes.txt": b""}, "somebody else's")
        if header.get("parentCommit", repo.head) != repo.head:
            return self.refuse(412, message="A commit has happened since.")
        for value in (line["value"] for line in lines[1:]):
            if "content" in value:
                files[value["path"]] = base64.b64decode(value["content"])
            elif "oid" in value:
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        sha = repo.commit(files, header["summary"])
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo("model", name)
        if repo is None:
            return
        sha = repo.head if revision == "main" else revision
        if sha not in repo.commits:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        content = repo.commits[sha].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        large = path.endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Content_Length": str(len(content))}
        self.send(200, self.hub.altered.get(path, content), **headers)


def blob_id(content: bytes) -> str:
    """git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/(model|dataset|space)s/{NAME}", Handler.info),
    ("GET", rf"/api/(model|dataset|space)s/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/(model|dataset|space)s/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", rf"/api/(model|dataset|space)s/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/(model|dataset|space)s/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs-objects/([0-9a-f]{64})", Handler.upload),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
