"""A real web server on loopback whose answers a test writes down, path by path."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.asked.append((self.path, dict(self.headers)))
        self.server.answers[self.path](self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def give(self, status: int, body: bytes, **headers: str) -> None:
        """`body`, under a Content-Length that is its own unless the headers say another."""
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    @property
    def begin(self) -> int:
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def give_rest(self, data: bytes, upto: int | None = None, **headers: str) -> None:
        """The asked part of `data`, cut off in front of byte `upto`."""
        at = self.begin
        headers = {"Content_Length": str(len(data) - at), **headers}
        if "Range" in self.headers:
            headers["Content_Range"] = f"bytes {at}-{len(data) - 1}/{len(data)}"
        self.give(206 if "Range" in self.headers else 200, data[at:upto], **headers)


Answer = Callable[[Handler], object]


class Web(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.end = threading.Event()  # releases the answers that hang

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def has(self, path: str, *answers: Answer) -> str:
        """The url of `path`, which answers so: the first time the first way, and the last way for ever."""
        left = list(answers)
        self.answers[path] = lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)
        return self.url(path)

    def ranges(self) -> list[tuple[str | None, str | None]]:
        return [(headers.get("Range"), headers.get("If-Range")) for _, headers in self.asked]
