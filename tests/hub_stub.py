"""A stub of the Hub's protocol on loopback: repositories in memory, faults on demand, every request on record.

It answers what ``huggingface_hub`` asks when it reads (info, tree, resolve with ranges; large files are redirected to
a "storage" server of another name, as the real Hub redirects to a CDN) and writes (create, preupload, LFS batch and PUT
in one or several parts, commit with a parent check, pull requests). Xet is not spoken: ``HF_HUB_DISABLE_XET=1``.

    with Hub() as hub:
        oid = hub.add("user/model", {"config.json": b"{}"})
        hub.cut("GET", r"/blob/.*/model")           # the next answer with a large file ends half-way
        ...
        assert hub.fetched() == ["config.json", "model.safetensors"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_" + "T" * 34  # accepted by the stub, and to be looked for where it must not stand
LARGE = (".safetensors", ".bin", ".gguf", ".model")  # what .gitattributes sends to LFS, whatever its size
REPO = r"(?P<repo>[^/]+/[^/]+)"


def git_oid(content: bytes) -> str:
    """What git calls a blob with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one moment."""

    oid: str
    parent: str | None
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """``refs`` maps branches, tags and pull requests to commits."""

    private: bool = False
    gated: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: Mapping[str, bytes], message: str, parent: str | None) -> str:
        text = json.dumps([parent, message, len(self.commits), sorted((n, sha256(b)) for n, b in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, dict(files))
        self.refs[revision] = oid
        return oid

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


@dataclass(frozen=True)
class Request:
    """What a client asked. ``storage``: of the storage server, where no token may arrive."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    storage: bool


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What happens to the next ``times`` requests of a method whose path matches."""

    method: str
    pattern: re.Pattern[str]
    times: int
    skip: int = 0  # requests that pass before
    answer: Answer | None = None  # instead of the real one
    at: float | None = None  # part of the body after which the connection is cut
    lost: bool = False  # the request is served, its answer is not sent
    action: Callable[[], object] | None = None  # done before the request is served


def failure(status: int, message: str, code: str = "", **headers: str) -> Answer:
    """An error as the Hub words it."""
    known = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), {**known, **headers})


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Hub:
    """The servers, the repositories, and what tests do to them. Use it with ``with``."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files by sha256, committed or not
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.token = TOKEN
        self.part_size: int | None = None  # larger files are asked for in parts of this size
        self.page_size = 1000  # entries of a tree at a time
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._servers = [_Server(self, storage=False), _Server(self, storage=True)]
        main, storage = (server.server_port for server in self._servers)
        # Two names: clients keep the token to the host that they were told of.
        self.url, self.storage_url = f"http://127.0.0.1:{main}", f"http://localhost:{storage}"

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What tests see and do

    def add_folder(self, name: str, folder: Path, **options: Any) -> str:
        """:meth:`add` the files of a folder."""
        return self.add(name, {path.name: path.read_bytes() for path in folder.iterdir()}, **options)

    def add(
        self,
        name: str,
        files: Mapping[str, bytes],
        revision: str = "main",
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Replace the files of a branch, making the repository first if need be; the commit's id."""
        with self.lock:
            repo = self.repos.setdefault(name, Repo(private=private, gated=gated))
            self.blobs |= {sha256(content): content for file, content in files.items() if is_large(file, content)}
            return repo.commit(revision, files, "by the test", repo.refs.get(revision))

    def put(self, name: str, file: str, content: bytes, revision: str = "main") -> str:
        """Somebody else commits one file."""
        return self.add(name, {**self.files(name, revision), file: content}, revision)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[name].resolve(revision)
        return dict(commit.files) if commit else {}

    def head(self, name: str, revision: str = "main") -> str:
        return self.repos[name].refs[revision]

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, sorted."""
        paths = [r.path for r in self.requests if r.method == "GET"]
        found = [re.fullmatch(rf"/(?:{REPO}/resolve/[^/]+|blob/\w+)/(?P<file>.+)", path) for path in paths]
        return sorted({unquote(match["file"]) for match in found if match})

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of a method whose path holds ``pattern``."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def fail(
        self, method: str, pattern: str, status: int, *, times: int = 1, skip: int = 0, code: str = "", **headers: str
    ) -> None:
        """Answer with an error status; headers as ``retry_after="1"``."""
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        answer = failure(status, f"the stub says {status}", code, **named)
        self._faults.append(Fault(method, re.compile(pattern), times, skip, answer))

    def cut(self, method: str, pattern: str, *, at: float = 0.5, times: int = 1, skip: int = 0) -> None:
        """Close the connection after a part of the body, of a PUT's or POST's own or of the answer to a GET.

        A large file is sent from ``/blob/SHA256/NAME`` and taken at ``/upload/SHA256``.
        """
        self._faults.append(Fault(method, re.compile(pattern), times, skip, at=at))

    def lose(self, method: str, pattern: str, *, times: int = 1, skip: int = 0) -> None:
        """Serve the request and close the connection without an answer."""
        self._faults.append(Fault(method, re.compile(pattern), times, skip, lost=True))

    def before(self, method: str, pattern: str, action: Callable[[], object], *, times: int = 1, skip: int = 0) -> None:
        """Do something just before a request is served."""
        self._faults.append(Fault(method, re.compile(pattern), times, skip, action=action))

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    # What the servers ask

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method == method and fault.pattern.search(path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def serve(self, request: Request) -> Answer:
        with self.lock:
            for method, pattern, handler in _STORAGE if request.storage else _ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and method == request.method.replace("HEAD", "GET"):
                    values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return handler(self, request, **values)
            return failure(404, f"no such route: {request.method} {request.path}")

    # Reading

    def _readable(self, request: Request, name: str) -> Repo | Answer:
        repo, known = self.repos.get(name), self._is_known(request)
        if repo is None or (repo.private and not known):
            return failure(404 if known else 401, "Repository not found", "RepoNotFound")
        if repo.gated and not known:
            return failure(401, "Access to model is restricted.", "GatedRepo")
        return repo

    def _at(self, request: Request, name: str, revision: str) -> tuple[Repo, Commit] | Answer:
        repo = self._readable(request, name)
        if isinstance(repo, Answer):
            return repo
        commit = repo.resolve(revision)
        if commit is None:
            return failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def _is_known(self, request: Request) -> bool:
        return request.headers.get("authorization") == f"Bearer {self.token}"

    def info(self, request: Request, repo: str, revision: str = "main") -> Answer:
        found = self._at(request, repo, revision)
        if isinstance(found, Answer):
            return found
        kept, commit = found
        return as_json(
            {
                "id": repo,
                "modelId": repo,
                "sha": commit.oid,
                "private": kept.private,
                "gated": "auto" if kept.gated else False,
                "disabled": False,
                "tags": [],
                "cardData": kept.card or None,
                "siblings": [_sibling(path, content) for path, content in sorted(commit.files.items())],
            }
        )

    def tree(self, request: Request, repo: str, revision: str) -> Answer:
        found = self._at(request, repo, revision)
        if isinstance(found, Answer):
            return found
        entries = [_tree_entry(path, content) for path, content in sorted(found[1].files.items())]
        start = int(request.query.get("cursor", ["0"])[0])
        end, headers = start + self.page_size, {}
        if end < len(entries):
            headers["Link"] = f'<{self.url}{request.path}?recursive=True&cursor={end}>; rel="next"'
        return as_json(entries[start:end], **headers)

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        found = self._at(request, repo, revision)
        if isinstance(found, Answer):
            return found
        commit = found[1]
        headers = {"X-Repo-Commit": commit.oid}
        content = commit.files.get(path)
        if content is None:
            return failure(404, "Entry not found", "EntryNotFound", **headers)
        if not is_large(path, content):
            return _content(request, content, ETag=f'"{git_oid(content)}"', **headers)
        headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        headers |= {"Location": f"{self.storage_url}/blob/{sha256(content)}/{quote(path)}?signature=s"}
        return Answer(302, b"", headers)

    def blob(self, request: Request, oid: str, name: str) -> Answer:
        del name
        content = self.blobs.get(oid)
        return failure(404, "no such key") if content is None else _content(request, content, ETag=f'"{oid}"')

    # Writing

    def _refusal(self, request: Request) -> Answer | None:
        if self._is_known(request):
            return None
        if "authorization" in request.headers:
            return failure(401, "Invalid credentials in Authorization header")
        return failure(401, "Invalid username or password.")

    def create(self, request: Request) -> Answer:
        asked = json.loads(request.body)
        name = f"{asked['organization']}/{asked['name']}"
        if refused := self._refusal(request):
            return refused
        if name in self.repos:
            return as_json({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        repo = self.repos[name] = Repo(private=asked.get("private") is True or asked.get("visibility") == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit", None)
        return as_json({"url": f"{self.url}/{name}", "name": name})

    def branch(self, request: Request, repo: str, branch: str) -> Answer:
        kept = self._refusal(request) or self._readable(request, repo)
        if isinstance(kept, Answer):
            return kept
        if branch in kept.refs:
            return failure(409, "Reference already exists")
        start = kept.resolve(json.loads(request.body or b"{}").get("startingPoint", "main"))
        if start is None:
            return failure(404, "Invalid rev id", "RevisionNotFound")
        kept.refs[branch] = start.oid
        return as_json({})

    def validate_yaml(self, request: Request) -> Answer:
        text = json.loads(request.body)["content"]
        bad = text.startswith("---") and "\n---" not in text[3:]
        problems = [{"message": "the metadata do not end"}] if bad else []
        return as_json({"errors": problems, "warnings": []}, 400 if bad else 200)

    def preupload(self, request: Request, repo: str, revision: str) -> Answer:
        found = self._refusal(request) or self._at(request, repo, revision)
        if isinstance(found, Answer):
            return found
        files = []
        for asked in json.loads(request.body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked["sample"])
            old = found[1].files.get(path)
            oid = None if old is None else sha256(old) if is_large(path, old) else git_oid(old)
            mode = "lfs" if is_large(path, sample, asked["size"]) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files, "commitOid": found[1].oid})

    def lfs_batch(self, request: Request, repo: str) -> Answer:
        del repo
        if refused := self._refusal(request):
            return refused
        objects = []
        for asked in json.loads(request.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            if oid in self.blobs:
                objects.append({"oid": oid, "size": size})
                continue
            verify = {"href": f"{self.url}/verify/{oid}"}
            upload: dict[str, Any] = {"href": f"{self.storage_url}/upload/{oid}?signature=s", "header": {}}
            if self.part_size is not None and size > self.part_size:
                count = -(-size // self.part_size)
                upload = {"href": f"{self.url}/complete/{oid}", "header": {"chunk_size": str(self.part_size)}}
                upload["header"] |= {
                    str(i + 1): f"{self.storage_url}/upload/{oid}/{i + 1}?signature=s" for i in range(count)
                }
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return as_json({"transfer": "basic", "objects": objects})

    def upload(self, request: Request, oid: str, part: str = "") -> Answer:
        if part:
            self.parts[oid, int(part)] = request.body
        elif sha256(request.body) != oid:
            return failure(400, "BadDigest")
        else:
            self.blobs[oid] = request.body
        return Answer(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})

    def complete(self, request: Request, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(request.body)["parts"]]
        content = b"".join(self.parts.pop((oid, number)) for number in sorted(numbers))
        if sha256(content) != oid:
            return failure(400, "BadDigest")
        self.blobs[oid] = content
        return as_json({})

    def verify(self, request: Request, oid: str) -> Answer:
        refused = self._refusal(request)
        return refused or (as_json({}) if oid in self.blobs else failure(404, "no such object"))

    def commit(self, request: Request, repo: str, revision: str) -> Answer:
        refused = self._refusal(request)
        if refused:
            return refused
        kept = self._readable(request, repo)
        if isinstance(kept, Answer):
            return kept
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        pull = request.query.get("create_pr") == ["1"]
        parent, head = header.get("parentCommit"), kept.refs.get(revision)
        if head is None:
            return failure(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if pull and parent is not None:
            head = parent
        elif parent is not None and parent != head:
            return failure(412, "A commit has happened since. Please refresh and try again.")
        files = self._changed(kept.commits[head].files, lines)
        if isinstance(files, Answer):
            return files
        number = sum(ref.startswith("refs/pr/") for ref in kept.refs) + 1
        oid = kept.commit(f"refs/pr/{number}" if pull else revision, files, header["summary"], head)
        made = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}
        return as_json(made | ({"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if pull else {}))

    def _changed(self, old: Mapping[str, bytes], lines: Iterable[dict[str, Any]]) -> dict[str, bytes] | Answer:
        files = dict(old)
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.blobs:
                    return failure(400, f"Your push was rejected: an LFS pointer points to no file: {value['path']}")
                files[value["path"]] = self.blobs[value["oid"]]
            elif kind == "deletedFile" and files.pop(value["path"], None) is None:
                return failure(404, "A file with this name doesn't exist", "EntryNotFound")
        return files


Route = tuple[str, str, Callable[..., Answer]]

_ROUTES: tuple[Route, ...] = (
    ("GET", rf"/api/models/{REPO}", Hub.info),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Hub.info),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Hub.tree),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Hub.resolve),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Hub.branch),
    ("POST", r"/api/validate-yaml", Hub.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Hub.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("POST", r"/complete/(?P<oid>\w+)", Hub.complete),
    ("POST", r"/verify/(?P<oid>\w+)", Hub.verify),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Hub.commit),
)
_STORAGE: tuple[Route, ...] = (
    ("GET", r"/blob/(?P<oid>\w+)/(?P<name>.+)", Hub.blob),
    ("PUT", r"/upload/(?P<oid>\w+)(?:/(?P<part>\d+))?", Hub.upload),
)


def is_large(path: str, content: bytes, size: int | None = None) -> bool:
    """Whether the Hub keeps a file apart from git."""
    return path.endswith(LARGE) or (len(content) if size is None else size) > 10 << 20


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_large(path, content):
        entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    """A file as the info of a repository with ``blobs=true`` has it."""
    entry = _tree_entry(path, content)
    sibling = {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}
    if lfs := entry.get("lfs"):
        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return sibling


def _content(request: Request, content: bytes, **headers: str) -> Answer:
    """All of it, or the range that was asked for."""
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not asked:
        return Answer(200, content, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
    if start > end:
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Answer(206, content[start : end + 1], headers)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, *, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is not news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30
    server: _Server

    def _do(self) -> None:
        hub, split = self.server.hub, urlsplit(self.path)
        fault = hub.take_fault(self.command, split.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._read_body(headers, fault.at if fault else None)
        request = Request(self.command, split.path, parse_qs(split.query), headers, body, self.server.storage)
        hub.requests.append(request)
        if fault and fault.action:
            fault.action()
        if fault and fault.at is not None and self.command in ("POST", "PUT"):
            self._drop()
            return
        answer = fault.answer if fault and fault.answer else hub.serve(request)
        if fault and fault.lost:
            self._drop()
            return
        self._send(answer, fault.at if fault else None)

    do_GET = do_HEAD = do_POST = do_PUT = _do  # noqa: N815

    def _read_body(self, headers: Mapping[str, str], at: float | None) -> bytes:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        size = int(headers.get("content-length", 0))
        return self.rfile.read(size if at is None else int(size * at))

    def _send(self, answer: Answer, at: float | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body if at is None else answer.body[: int(len(answer.body) * at)])
        if at is not None:
            self._drop()

    def _drop(self) -> None:
        """Close for both directions, whatever is still to come."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        """Tests read ``requests``."""
