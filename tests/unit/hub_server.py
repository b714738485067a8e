"""A hub on 127.0.0.1 that speaks the routes that headgram uses, with another server to redirect to, and faults on demand."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Commit = dict[str, bytes]


@dataclass
class Fault:
    """What to do wrong, the next `times` times that large files are asked for.

    Attributes
    ----------
    status, headers
        Answer with this status; 200 means that the range is ignored.
    drop_after
        Close the connection after so many bytes.
    total
        The length of the file that is claimed.
    """

    times: int = 1_000_000
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    total: int | None = None


class Hub:
    """Repositories by name, revision and commit; what was asked for and how much was sent is counted."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Commit]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.listing_fault: Fault | None = None
        self.listing: bytes | None = None  # sent instead of the true one
        self.fault: Fault | None = None
        self.bodies: dict[str, str] = {}  # how a body is sent, by a part of its path, see `_send_body`
        self.etag: str | None = None  # claimed instead of the true one
        self.requests: list[tuple[str, str, str | None]] = []  # server, path, token
        self.weight_bytes = 0
        self.lock = threading.Lock()
        self.url = self.cdn_url = ""

    def add(self, repo: str, files: Commit, revision: str = "main") -> str:
        """Commit files under a revision; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs[repo, revision] = self.refs[repo, commit] = commit
        return commit

    def files(self, repo: str, revision: str) -> Commit | None:
        return self.repos.get(repo, {}).get(self.refs.get((repo, unquote(revision)), ""))

    def take(self, name: str) -> Fault | None:
        """The fault that holds for this request, if any."""
        with self.lock:
            fault: Fault | None = getattr(self, name)
            if fault is None or fault.times == 0:
                return None
            fault.times -= 1
            return fault


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


def _handler(hub: Hub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            with hub.lock:
                hub.requests.append((server, path, self.headers.get("Authorization")))
            if how := next((how for part, how in hub.bodies.items() if part in path), None):
                self._send_body(how)
                return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self._describe("/".join(parts[2:4]), parts[5])
            elif len(parts) < 4:
                self._answer(404, b"", {})
            elif server == "hub" and parts[2] == "resolve":
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self._send_range("/".join(parts[:2]), parts[2], "/".join(parts[3:]))

        def _describe(self, repo: str, revision: str) -> None:
            if fault := hub.take("listing_fault"):
                return self._answer(fault.status or 500, b"", fault.headers)
            if hub.listing is not None:
                return self._answer(200, hub.listing, {"Content-Type": "application/json"})
            files = hub.files(repo, revision)
            if files is None:
                code = "RevisionNotFound" if repo in hub.repos else "RepoNotFound"
                return self._answer(404, b"{}", {"X-Error-Code": code})
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest(), **self._lfs(name, data)}
                for name, data in files.items()
            ]
            content = {"id": repo, "modelId": repo, "sha": hub.refs[repo, unquote(revision)], "siblings": siblings}
            return self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _lfs(self, name: str, data: bytes) -> dict:
            return (
                {"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 1}}
                if _is_large(name)
                else {}
            )

        def _resolve(self, repo: str, commit: str, name: str) -> None:
            files = hub.files(repo, commit) or {}
            if name not in files:
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            data, common = files[name], {"X-Repo-Commit": commit}
            if not _is_large(name):
                return self._answer(200, data, {**common, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
            if (fault := hub.take("fault")) and fault.status and fault.status != 200:
                return self._answer(fault.status, b"", fault.headers)
            if fault:
                fault.times += 1  # for the other server
            linked = {"X-Linked-Etag": f'"{hub.etag or hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
            return self._answer(302, b"", {**common, **linked, "Location": f"{hub.cdn_url}/{repo}/{commit}/{name}"})

        def _send_range(self, repo: str, commit: str, name: str) -> None:
            data, fault = (hub.files(repo, commit) or {})[name], hub.take("fault") or Fault()
            first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
            body = data if fault.status == 200 else data[first : last + 1]
            total = len(data) if fault.total is None else fault.total
            self.send_response(fault.status or 206)
            self.send_header("ETag", '"the other server\'s own"')
            self.send_header("Content-Length", str(len(body)))
            if fault.status != 200:
                self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
            self.end_headers()
            sent = body if fault.drop_after is None else body[: fault.drop_after]
            try:
                self.wfile.write(sent)
            except OSError:
                self.close_connection = True
                return
            with hub.lock:
                hub.weight_bytes += len(sent)
            self.close_connection = len(sent) < len(body)

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _send_body(self, how: str) -> None:
            """A body that is endless, a bomb (compressed), or comes byte by byte."""
            self.send_response(200)
            if how == "bomb":
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.close_connection = True
            piece = {"endless": b" " * 2**16, "bomb": gzip.compress(bytes(2**26)), "drops": b" "}[how]
            with contextlib.suppress(OSError):
                for _ in range(2**20):
                    self.wfile.write(piece)
                    if how == "drops":
                        time.sleep(0.05)

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub and the server that it redirects to, on free ports, until the block ends."""
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, name)) for name in ("hub", "cdn")]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
