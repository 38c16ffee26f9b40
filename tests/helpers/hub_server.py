"""A Hugging Face Hub on 127.0.0.1: the part of its HTTP API that model repositories need.

It keeps everything in memory, asks for the token ``TOKEN`` wherever something is written or
private, stores ``*.safetensors`` as LFS objects, and knows nothing of ncprior::

    with hub_server() as hub:
        subprocess.run([...], env=os.environ | hub.environment(home))

``HF_ENDPOINT`` is read when huggingface_hub is imported: clients run in a process of their own.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_local"
USER = "tester"

Files = dict[str, bytes]


@dataclass
class Repository:
    """Branches, and what the files were at every commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        contents = [branch, len(self.commits), sorted((n, _sha256(d)) for n, d in files.items())]
        sha = hashlib.sha1(json.dumps(contents).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class HubError(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: HTTPStatus, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """What is on the Hub, and what was asked of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.objects: Files = {}  # LFS objects by SHA-256
        self.requests: list[str] = []  # such as "GET /api/whoami-v2"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """The variables with which a client talks to this server alone."""
        environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",  # what is not LFS, the server does not speak
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return environment | ({} if token is None else {"HF_TOKEN": token})


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A Hub that answers as long as the context lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        hub = HubServer(f"http://127.0.0.1:{server.server_port}")
        server.RequestHandlerClass = partial(_Handler, hub)
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        self._body = self._read()
        try:
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    answer(self, *map(unquote, match.groups()))
                    return
            raise HubError(HTTPStatus.NOT_FOUND, message=f"no route for {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(
                json.dumps({"error": error.message}).encode(),
                {name: value for name, value in headers.items() if value},
                status=error.status,
            )

    do_HEAD = do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _json(self) -> Any:
        return json.loads(self._body or b"{}")

    # Who asks, and for what

    def _is_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _require_user(self) -> None:
        if not self._is_user():
            raise HubError(
                HTTPStatus.UNAUTHORIZED, message="Invalid credentials in Authorization header"
            )

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._is_user()):
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        return repository

    def _revision(self, name: str, revision: str) -> tuple[str, Files]:
        repository = self._repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            message = f"Invalid rev id: {revision}"
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", message)
        return sha, repository.commits[sha]

    # Accounts and repositories

    def whoami(self) -> None:
        self._require_user()
        access = {"type": "access_token", "accessToken": {"displayName": "a", "role": "write"}}
        self._send_json({"type": "user", "name": USER, "orgs": [], "auth": access})

    def create(self) -> None:
        self._require_user()
        asked = self._json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = json.dumps({"url": f"{self.hub.url}/{name}", "name": name, "id": name}).encode()
        if name in self.hub.repositories:
            self._send(answer, status=HTTPStatus.CONFLICT)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit("main", {".gitattributes": b"*.safetensors lfs\n"})
        self._send(answer)

    def branch(self, name: str, branch: str) -> None:
        self._require_user()
        sha, _ = self._revision(name, self._json().get("startingPoint", "main"))
        branches = self._repository(name).branches
        if branch in branches:
            raise HubError(HTTPStatus.CONFLICT, message="Reference already exists")
        branches[branch] = sha
        self._send_json({})

    def info(self, name: str, revision: str = "main") -> None:
        sha, files = self._revision(name, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self._repository(name).private
        about = {"_id": sha[:24], "id": name, "modelId": name, "sha": sha, "private": private}
        self._send_json(about | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, name: str, revision: str) -> None:
        _, files = self._revision(name, revision)
        answer = []
        for path, data in sorted(files.items()):
            known = {"type": "file", "path": path, "size": len(data), "oid": _git_sha1(data)}
            if _is_lfs(path):
                known["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
            answer.append(known)
        self._send_json(answer)

    # Uploads

    def validate_yaml(self) -> None:
        front = re.match(r"---\n(.*?)\n---\n", self._json()["content"], re.DOTALL)
        try:
            valid = front is not None and isinstance(yaml.safe_load(front.group(1)), dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            body = json.dumps({"errors": [{"message": "no valid front matter"}]}).encode()
            self._send(body, status=HTTPStatus.BAD_REQUEST)
            return
        self._send_json({})

    def preupload(self, name: str, revision: str) -> None:
        self._require_user()
        _, files = self._revision(name, revision)
        answer = []
        for asked in self._json()["files"]:
            path = asked["path"]
            oid = (_sha256 if _is_lfs(path) else _git_sha1)(files[path]) if path in files else None
            mode = "lfs" if _is_lfs(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send_json({"files": answer})

    def lfs_batch(self, name: str) -> None:
        self._require_user()
        self._repository(name)
        answer = []
        for asked in self._json()["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
                verify = {"href": f"{self.hub.url}/api/{name}/lfs-verify"}
                known["actions"] = {"upload": upload, "verify": verify}
            answer.append(known)
        self._send_json({"transfer": "basic", "objects": answer})

    def lfs_upload(self, oid: str) -> None:
        if _sha256(self._body) != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, message="The object is not what was announced")
        self.hub.objects[oid] = self._body
        self._send(b"")

    def lfs_verify(self, name: str) -> None:
        self._require_user()
        self._lfs_object(self._json())
        self._send_json({})

    def _lfs_object(self, asked: dict[str, Any]) -> bytes:
        data = self.hub.objects.get(asked["oid"])
        if data is None or len(data) != asked["size"]:
            raise HubError(HTTPStatus.BAD_REQUEST, message="The object was not uploaded")
        return data

    def commit(self, name: str, revision: str) -> None:
        self._require_user()
        repository = self._repository(name)
        if revision not in repository.branches:
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", "No such branch")
        files = dict(repository.commits[repository.branches[revision]])
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"], validate=True)
                case "lfsFile":
                    files[value["path"]] = self._lfs_object(value)
                case "deletedFile":
                    del files[value["path"]]
                case "header" if value["summary"]:
                    pass
                case key:
                    raise HubError(HTTPStatus.BAD_REQUEST, message=f"Cannot do {key}")
        sha = repository.commit(revision, files)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._send_json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # Downloads

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self._revision(name, revision)
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            body = b"Entry not found"
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": body.decode()}
            self._send(body, headers, status=HTTPStatus.NOT_FOUND)
        elif _is_lfs(path):
            oid, size = _sha256(files[path]), str(len(files[path]))
            headers |= {"ETag": f'"{oid}"', "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size}
            self._send(files[path], headers)
        else:
            self._send(files[path], headers | {"ETag": f'"{_git_sha1(files[path])}"'})


_REPOSITORY, _PART = r"([^/]+/[^/]+)", r"([^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/models/{_REPOSITORY}", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/revision/{_PART}", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/tree/{_PART}", _Handler.tree),
    ("POST", f"/api/models/{_REPOSITORY}/branch/{_PART}", _Handler.branch),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/{_PART}", _Handler.preupload),
    ("POST", f"/api/models/{_REPOSITORY}/commit/{_PART}", _Handler.commit),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", f"/api/{_REPOSITORY}/lfs-verify", _Handler.lfs_verify),
    ("PUT", f"/lfs/{_PART}", _Handler.lfs_upload),
    ("HEAD GET", f"/{_REPOSITORY}/resolve/{_PART}/(.+)", _Handler.resolve),
]


def _is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
