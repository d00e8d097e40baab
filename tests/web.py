"""A server on this machine that misbehaves on demand."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

PAYLOAD = bytes(range(256)) * 400


class Server(ThreadingHTTPServer):
    """Serves `files`; logs requests as (path, value of Range)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.breaks_after: int | None = None  # bytes of body, in every connection
        self.ranges, self.validator, self.length = True, '"v1"', "Content-Length"

    def url(self, path: str, content: bytes = PAYLOAD) -> str:
        self.files[path] = content
        return f"http://127.0.0.1:{self.server_port}{path}"

    def asked(self) -> list[str | None]:
        """The Range of every request since the last call."""
        ranges = [value for _, value in self.requests]
        self.requests.clear()
        return ranges


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        if self.path not in server.files:
            return self.send_error(404)
        body = server.files[self.path]
        same = self.headers.get("If-Range", server.validator) == server.validator
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and same else 0
        if server.ranges and start:
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        if server.validator:
            self.send_header("ETag", server.validator)
        if server.length:
            self.send_header(server.length, str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
