"""A stand-in for GitHub's releases and the Hugging Face hub on 127.0.0.1, which can be told to misbehave."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """Serves `files` by path. `faults[path]` is what the next answers with a body are instead: a status, "cut" (half of
    the body), "slow" (half a second per quarter)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def offer(self, address: str, content: bytes) -> str:
        """Serve `content` where `address` would lie; returns the path."""
        path = urlsplit(address).path
        self.files[path] = content
        return path

    def __enter__(self) -> Server:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        content = self.server.files.get(path)
        if content is None:
            self._status(404)
        else:
            self._headers(200, content, len(content))

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked[path] += 1
        content = self.server.files.get(path)
        fault = self.server.faults[path].pop(0) if self.server.faults[path] else None
        if content is None or isinstance(fault, int):
            self._status(404 if content is None else fault)
            return
        first = 0
        if self.headers.get("Range"):
            first = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        body = content[first:]
        self._headers(206 if first else 200, content, len(body), first)
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        for part in range(4):
            piece = body[len(body) * part // 4 : len(body) * (part + 1) // 4]
            self.wfile.write(piece)
            self.server.sent[path] += len(piece)
            if fault == "slow":
                time.sleep(0.5)

    def _headers(self, status: int, content: bytes, length: int, first: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        # what the hub's client reads
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def _status(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
