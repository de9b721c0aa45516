"""A Hugging Face hub of one process: as many of its endpoints as huggingface_hub needs to create a
repository, commit files to it, and download them. Programs find it through HF_ENDPOINT."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_let_me_in"


@dataclass
class Repo:
    """files: path -> content"""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class FakeHub:
    """Serves `repos` (id -> Repo) while the with-block runs; `requests` lists what was asked for.

    Anyone may read what is public; writing, and reading what is private, takes TOKEN."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
        self.server.RequestHandlerClass.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=None) -> dict[str, str]:
        """Variables that make a program use this hub, with its cache and tokens in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_one(self):
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self.chunks())
        else:
            body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, body, **match.groupdict())
        return self.json(404, {"error": f"no endpoint {path}"})

    do_GET = do_HEAD = do_POST = handle_one

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    @property
    def trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, status, value, **headers):
        if status >= 400:
            headers["X-Error-Message"] = value["error"]
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def found(self, repo):
        """The repository, or None after an answer that it is not there."""
        known = self.hub.repos.get(repo)
        if known is None or (known.private and not self.trusted):
            return self.json(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return known

    def create(self, body):
        if not self.trusted:
            return self.json(401, {"error": "Invalid user token."})
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}
        if repo in self.hub.repos:
            return self.json(409, {"error": "You already created this model repo"} | address)
        self.hub.repos[repo] = Repo(asked.get("private") or asked.get("visibility") == "private")
        return self.json(200, address)

    def info(self, body, repo):
        if known := self.found(repo):
            files = [{"rfilename": path} for path in known.files]
            self.json(
                200, {"id": repo, "sha": known.sha, "private": known.private, "siblings": files}
            )

    def tree(self, body, repo):
        if known := self.found(repo):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                for path, data in known.files.items()
            ]
            self.json(200, entries)

    def resolve(self, body, repo, file):
        if known := self.found(repo):
            if file not in known.files:
                return self.json(
                    404,
                    {"error": "Entry not found"},
                    X_Error_Code="EntryNotFound",
                    X_Repo_Commit=known.sha,
                )
            data = known.files[file]
            self.send(200, data, ETag=f'"{_oid(data)}"', X_Repo_Commit=known.sha)

    def preupload(self, body, repo):
        files = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.json(200, {"files": files})

    def commit(self, body, repo):
        if not self.trusted:
            return self.json(403, {"error": "Forbidden: you may not write here."})
        known = self.hub.repos[repo]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                known.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        address = f"{self.hub.url}/{repo}/commit/{known.sha}"
        self.json(200, {"success": True, "commitOid": known.sha, "commitUrl": address})

    def yaml(self, body):
        """The hub checks the front matter of a card; we check that there is one."""
        card = json.loads(body)["content"]
        errors = [] if re.match(r"---\n.+\n---\n", card, re.DOTALL) else [{"message": "no YAML"}]
        self.json(400 if errors else 200, {"errors": errors, "warnings": [], "error": ""})


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.yaml),
    (("POST",), f"/api/models/{REPO}/preupload/main", _Handler.preupload),
    (("POST",), f"/api/models/{REPO}/commit/main", _Handler.commit),
    (("GET",), f"/api/models/{REPO}/tree/[^/]+", _Handler.tree),
    (("GET",), f"/api/models/{REPO}(/revision/[^/]+)?", _Handler.info),
    (("GET", "HEAD"), f"/{REPO}/resolve/[^/]+/(?P<file>.+)", _Handler.resolve),
]
