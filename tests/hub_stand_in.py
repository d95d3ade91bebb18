"""A Hugging Face Hub on loopback, with the endpoints that huggingface_hub calls.

It serves model repositories from memory, and takes uploads, as the Hub's HTTP API
does (https://huggingface.co/docs/hub/api, and git-lfs's batch API for large files).
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    """Commits by branch, tag or hash; a commit is its files by path."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    gated: bool = False


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + b"\0" + content)
    return digest.hexdigest()


class Hub(ThreadingHTTPServer):
    """The server.

    Args:
        repositories: By ``owner/name``.
        broken: Bytes after which the connection drops, once, by file.
        requests: Method, path and ``Range`` of all requests so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.broken: dict[str, int] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> set[str]:
        """Files that were fetched."""
        found = (re.search("/resolve/[^/]+/(.*)", path) for _, path, _ in self.requests)
        return {match[1] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        model = "(?P<model>[^/]+/[^/]+)"
        for method, pattern, respond in (
            ("GET", f"/api/models/{model}(/revision/(?P<revision>.+))?", self.info),
            ("GET", f"/api/models/{model}/tree/(?P<revision>[^/]+)", self.tree),
            ("HEAD GET", f"/{model}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self.file),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate),
            ("POST", f"/api/models/{model}/preupload/(?P<revision>.+)", self.preupload),
            ("POST", f"/{model}.git/info/lfs/objects/batch", self.batch),
            ("PUT", "/lfs/(?P<oid>.+)", self.store),
            ("POST", f"/api/models/{model}/commit/(?P<revision>.+)", self.commit),
        ):
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                return respond(**match.groupdict())
        self.refuse(404, "", f"the stand-in has no {self.command} {path}")

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # A client may have seen enough.
                self.wfile.write(body)

    def send_json(self, content: object) -> None:
        self.send(200, json.dumps(content).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send(status, b"", X_Error_Code=code, X_Error_Message=message)

    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def files(self, model: str, revision: str) -> dict[str, bytes] | None:
        """The files of a commit; else the request was refused."""
        repository = self.server.repositories.get(model)
        if repository is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
            return None
        commits = {commit_of(files): files for files in repository.revisions.values()}
        files = (repository.revisions | commits).get(revision)
        if files is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    # Reading.

    def info(self, model: str, revision: str | None) -> None:
        files = self.files(model, revision or "main")
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            self.send_json(
                {"id": model, "modelId": model, "sha": commit_of(files), "siblings": siblings}
            )

    def tree(self, model: str, revision: str) -> None:
        files = self.files(model, revision)
        if files is not None:
            self.send_json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for path, content in files.items()
                ]
            )

    def file(self, model: str, revision: str, path: str) -> None:
        files = self.files(model, revision)
        if files is None:
            return
        # The Hub tells anyone what a gated repository holds, but not the contents.
        if self.server.repositories[model].gated:
            if not self.logged_in():
                return self.refuse(401, "GatedRepo", "Access to this model is restricted")
            return self.refuse(403, "GatedRepo", "You are not in the authorized list")
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X_Repo_Commit": commit_of(files),
            "Accept_Ranges": "bytes",
        }
        status, start = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(wanted[1])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        if self.command == "GET" and path in self.server.broken:
            cut = self.server.broken.pop(path)
            self.send(status, content[:cut], **headers, Content_Length=str(len(content)))
            self.close_connection = True
            return
        self.send(status, content, **headers)

    # Writing.

    def create(self) -> None:
        if not self.logged_in():
            return self.refuse(401, "", "Invalid username or password.")
        wanted = json.loads(self.body)
        model = f"{wanted['organization']}/{wanted['name']}"
        self.server.repositories.setdefault(model, Repository())
        self.send_json({"url": f"{self.server.endpoint}/{model}", "id": model, "name": model})

    def validate(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, model: str, revision: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith(".safetensors") else "regular"

        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.send_json(
            {
                "files": [
                    {"path": path, "uploadMode": mode(path), "shouldIgnore": False}
                    for path in paths
                ]
            }
        )

    def batch(self, model: str) -> None:
        objects = [
            file | {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{file['oid']}"}}}
            for file in json.loads(self.body)["objects"]
        ]
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        self.send(200, b"")

    def commit(self, model: str, revision: str) -> None:
        files = self.server.repositories[model].revisions[revision]
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        oid = commit_of(files)
        url = f"{self.server.endpoint}/{model}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": url})


@contextmanager
def running_hub():
    """A hub that serves in a thread of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
