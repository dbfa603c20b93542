"""A hub for tests: the calls of huggingface_hub that publish and fetch a model, over HTTP, held in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """revisions: files by commit of each repository; the newest commit is `main`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        found = self.commits.get(repo, [])
        return next((c for c in reversed(found) if revision in ("main", c[0])), None)


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"{}", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, code: str) -> None:
        self._answer(404, b'{"error": "not found"}', {"X-Error-Code": code})

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if match := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:/?\?.*)?$", self.path):
            found = self.server.find(match[1], match[2] or "main")
            if found is None:
                self._missing("RevisionNotFound" if match[1] in self.server.commits else "RepoNotFound")
                return
            files = [{"rfilename": name, "size": len(content)} for name, content in found[1].items()]
            info = {
                "id": match[1],
                "modelId": match[1],
                "sha": found[0],
                "siblings": files,
                "private": False,
                "tags": [],
            }
            self._answer(200, json.dumps(info).encode())
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)", self.path):
            found = self.server.find(match[1], match[2])
            if found is None:
                self._missing("RevisionNotFound")
                return
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in found[1].items()
            ]
            self._answer(200, json.dumps(tree).encode())
        elif match := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path):
            found = self.server.find(match[1], match[2])
            if found is None or match[3] not in found[1]:
                self._missing("EntryNotFound" if found else "RepoNotFound")
                return
            content = found[1][match[3]]
            tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": found[0]}
            self._answer(200, content, tag)
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.commits.setdefault(repo, [])
            self._answer(200, json.dumps({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo}).encode())
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, json.dumps({"files": files}).encode())
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = dict(self.server.commits[match[1]][-1][1]) if self.server.commits[match[1]] else {}
            files |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commit = hashlib.sha1(body).hexdigest()
            self.server.commits[match[1]].append((commit, files))
            answer = {
                "success": True,
                "commitOid": commit,
                "commitUrl": f"{self.server.url}/{match[1]}/commit/{commit}",
            }
            self._answer(200, json.dumps(answer).encode())
        else:
            self._answer(200)
