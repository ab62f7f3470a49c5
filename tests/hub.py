"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as publishing and fetching an adapter takes."""

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
        repos: {"user/name": {path: bytes}}.
        visibility: {"user/name": what was asked for}.
        token: what a request that changes something must bring.
    """

    def __init__(self, token="hf_test"):
        self.repos, self.visibility, self.token = {}, {}, token
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


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
        if parts[:2] == ["api", "models"]:
            repo = "/".join(parts[2:4])
            files = self.hub.repos.get(repo, {})
            if "tree" in parts:
                facts = {"type": "file", "oid": COMMIT}
                return self._answer(200, [{**facts, "path": path, "size": len(files[path])} for path in files])
            siblings = [{"rfilename": path} for path in files]
            found = {"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self._answer(200, found) if siblings else self._answer(404, {"error": "Repository not found"})
        content = self.hub.repos.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))  # /user/name/resolve/commit/path
        if content is None:
            return self._answer(404, {"error": "Entry not found"})
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, content, "application/octet-stream", etag)

    def _answer(self, status, content):
        self._send(status, json.dumps(content).encode(), "application/json", {})

    def _send(self, status, content, kind, headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass
