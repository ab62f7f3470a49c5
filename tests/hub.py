"""A stand-in for the Hugging Face Hub: what publishing adapters and fetching models and data take of its interface."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories in memory.

    Attributes:
        repos: {"user/name": {path: bytes}}; of a data set "datasets/user/name".
        gated: those of them that only a request with the token may read.
        revisions: {repository: a revision that it has besides "main" and its commit}.
        cut: {path: bytes after which its next download breaks off}.
        served: every download's path and revision, and the byte that it began with.
        visibility: {"user/name": what was asked for}.
        token: what a request that changes something must bring.
    """

    def __init__(self, token="hf_test"):
        self.repos, self.visibility, self.token = {}, {}, token
        self.gated, self.revisions, self.cut, self.served = set(), {}, {}, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


def ask(hub, monkeypatch, cache):
    """Has the libraries ask a Hub that was started after they were imported, as HF_ENDPOINT would before."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    # of what has come when a connection breaks, whole pieces are kept, of 10 MB
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache / "datasets"))


@contextlib.contextmanager
def running_hub():
    hub = Hub()
    try:
        yield hub
    finally:
        hub.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.repos.setdefault(repo, {})
            self.hub.visibility[repo] = asked.get("visibility")
            return self._answer(200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})
        _, _, _, user, name, action, *_ = self.path.split("/")  # /api/models/user/name/action/main
        files = self.hub.repos[f"{user}/{name}"]
        if action == "preupload":
            asked = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._answer(200, {"files": asked})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{self.hub.endpoint}/{user}/{name}/commit/{COMMIT}"
        return self._answer(200, {"commitUrl": address, "commitOid": COMMIT, "success": True})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            return self._about("/".join(parts[2:4]), parts[4:], "datasets/" if parts[1] == "datasets" else "")
        kind = "datasets/" if parts[0] == "datasets" else ""
        user, name, _, revision, *path = parts[1:] if kind else parts  # user/name/resolve/revision/path
        self._file(f"{kind}{user}/{name}", revision, "/".join(path))

    def _about(self, repo, more, kind):
        """What the API says of a repository: its facts, its files, or whether the caller may read them."""
        files = self.hub.repos.get(kind + repo)
        if not files:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if more[:1] in (["revision"], ["tree"]) and not self._has_revision(kind + repo, more[1]):
            return self._no_revision()
        if more == ["auth-check"]:
            return self._answer(200, {}) if self._may_read(kind + repo) else self._refuse()
        if more[:1] == ["tree"]:
            return self._tree(files, "".join(f"{part}/" for part in more[2:]))
        if "paths-info" in more:
            return self._answer(200, [])
        gated = "manual" if kind + repo in self.hub.gated else False
        siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        facts = {"private": False, "gated": gated, "tags": ["license:cc-by-4.0"], "downloads": 0}
        self._answer(200, {"id": repo, "sha": COMMIT, "siblings": siblings, **facts})

    def _tree(self, files, inside):
        """What lies in a folder: its files, and the folders in it or, if the caller wants so, their files."""
        found = {}
        for path in (path for path in files if path.startswith(inside)):
            folder, mark, _ = path.removeprefix(inside).partition("/")
            if mark and "recursive=true" not in self.path.lower():
                found[inside + folder] = {"type": "directory", "size": 0}
            else:
                found[path] = {"type": "file", "size": len(files[path])}
        if not found:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        self._answer(200, [{"path": path, "oid": COMMIT, **facts} for path, facts in found.items()])

    def _has_revision(self, repo, revision):
        return revision in ("main", COMMIT, self.hub.revisions.get(repo))

    def _no_revision(self):
        self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})

    def _file(self, repo, revision, path):
        """A file, from where the caller wants it on; ``cut`` breaks off after so many bytes, once."""
        content = self.hub.repos.get(repo, {}).get(path)
        if not self._has_revision(repo, revision):
            return self._no_revision()
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if not self._may_read(repo):
            return self._refuse()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").partition("-")[0] or 0) if wanted.startswith("bytes=") else 0
        if self.command == "GET":
            self.hub.served.append((path, revision, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cut.pop(path, None) if self.command == "GET" else None
        self._send(206 if start else 200, content[start:], "application/octet-stream", headers, cut)

    def _may_read(self, repo):
        return repo not in self.hub.gated or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _refuse(self):
        status = 403 if self.headers.get("Authorization") else 401
        self._answer(status, {"error": "Access to this repository is restricted."}, {"X-Error-Code": "GatedRepo"})

    def _answer(self, status, content, headers=None):
        self._send(status, json.dumps(content).encode(), "application/json", headers or {})

    def _send(self, status, content, kind, headers, cut=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *arguments):
        pass
