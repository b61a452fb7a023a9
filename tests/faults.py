"""A proxy on loopback in front of a real S3 server that can be told to fail, as networks and servers do.

Bytes pass unchanged, so signatures (which cover the Host header) stay valid: clients talk to `FaultProxy.url`. Every
connection carries one request: the answer is passed on with `Connection: close`, so each request meets the fault that
is set when it comes.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass

ERRORS = {
    500: ("Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    503: ("Service Unavailable", "SlowDown", "Please reduce your request rate."),
    403: ("Forbidden", "AccessDenied", "Access Denied"),
}


@dataclass(frozen=True)
class Fault:
    """What happens to a request. `kind`:

    `reset` (before anything is forwarded), `error` (answered with `status`, not forwarded), `delay` (forwarded after
    `seconds`), `cut headers` and `cut body` (forwarded; the answer ends in the middle of them), `drop` (forwarded and
    done; no answer), `hang` (no answer until `clear`).
    """

    kind: str
    only: str = ""  # a regular expression searched in "METHOD /path?query"; empty: every request
    times: int | None = None  # after so many requests met it, it is over; None: until `clear`
    status: int = 503
    seconds: float = 0.0
    keep: float = 0.5  # how much of the headers or of the body comes through when they are cut


class FaultProxy:
    """`with FaultProxy("http://127.0.0.1:8333") as proxy: proxy.set(Fault("reset")); …; proxy.clear()`."""

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition("//")[2].partition(":")
        self._upstream = (host, int(port))
        self._lock = threading.Lock()
        self._cleared = threading.Event()
        self._closing = False
        self._fault: Fault | None = None
        self._left: int | None = None
        self.requests: Counter[str] = Counter()  # by method
        self.faults = 0  # requests that met a fault
        self.lines: list[str] = []  # "METHOD /path?query" of every request
        self._listener: socket.socket | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        self.refuse()
        self._cleared.set()

    def set(self, fault: Fault) -> None:
        with self._lock:
            self._fault, self._left, self.faults = fault, fault.times, 0
            self._cleared.clear()

    def clear(self) -> None:
        """No fault from now on; what hangs goes on."""
        with self._lock:
            self._fault = None
        self._cleared.set()

    def refuse(self) -> None:
        """Closes the port: connections are refused until `accept`."""
        if self._listener:
            listener, self._listener = self._listener, None
            # A thread that waits in accept() keeps the port open: shutdown wakes it.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def accept(self) -> None:
        """Opens the port, the same one as before."""
        if self._listener:
            return
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener,), daemon=True, name="fault proxy").start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed by `refuse`
            threading.Thread(target=self._handle, args=(client,), daemon=True, name="fault proxy request").start()

    def _handle(self, client: socket.socket) -> None:
        with client:
            try:
                self._one_request(client)
            except OSError:
                return  # one of both sides went away: what clients and servers do

    def _one_request(self, client: socket.socket) -> None:
        head, rest = _read_head(client)
        if not head:
            return
        line = head.split(b" HTTP/", 1)[0].decode("latin-1")
        fault = self._meet(line)
        if fault and fault.kind == "hang":
            self._cleared.wait()
            return
        if fault and fault.kind == "reset":
            # Closing with zero lingering sends RST instead of FIN.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        if b"100-continue" in head.lower() and (not fault or fault.kind != "error"):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault and fault.kind == "error":
            _read_body(client, head, rest)
            client.sendall(_error_answer(fault.status, line.startswith("HEAD ")))
            return
        if fault and fault.kind == "delay":
            time.sleep(fault.seconds)
        body = _read_body(client, head, rest)
        with socket.create_connection(self._upstream, timeout=60) as server:
            server.sendall(_without_continue(head) + body)
            answer_head, answer_rest = _read_head(server)
            while answer_head.split(b" ")[1:2] == [b"100"]:
                answer_head, answer_rest = _read_head(server, answer_rest)
            answer_body = b"" if line.startswith("HEAD ") else _read_body(server, answer_head, answer_rest, to_end=True)
        if fault and fault.kind == "drop":
            return
        if fault and fault.kind == "cut headers":
            client.sendall(answer_head[: int(len(answer_head) * fault.keep)])
            return
        closing = re.sub(rb"(?im)^connection:.*\r\n", b"", answer_head)
        client.sendall(closing[:-2] + b"Connection: close\r\n\r\n")
        cut = int(len(answer_body) * fault.keep) if fault and fault.kind == "cut body" else len(answer_body)
        client.sendall(answer_body[:cut])

    def _meet(self, line: str) -> Fault | None:
        with self._lock:
            self.requests[line.split(" ", 1)[0]] += 1
            self.lines.append(line)
            fault = self._fault
            if not fault or not re.search(fault.only, line):
                return None
            if self._left is not None:
                if self._left == 0:
                    return None
                self._left -= 1
            self.faults += 1
            return fault


def _read_head(source: socket.socket, buffer: bytes = b"") -> tuple[bytes, bytes]:
    """(headers with the empty line, what came after them); empty when the other side closed before."""
    while b"\r\n\r\n" not in buffer:
        piece = source.recv(65536)
        if not piece:
            return b"", b""
        buffer += piece
    head, _, rest = buffer.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _read_body(source: socket.socket, head: bytes, rest: bytes, to_end: bool = False) -> bytes:
    """The body as it travels, chunk sizes included. `to_end`: without a length, it ends with the connection."""
    pieces, size = [rest], len(rest)
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    chunked = re.search(rb"(?im)^transfer-encoding:.*chunked", head)
    if not length and not chunked and not to_end:
        return rest

    def complete() -> bool:
        if length:
            return size >= int(length[1])
        return bool(chunked) and b"".join(pieces[-2:]).endswith(b"0\r\n\r\n")

    if re.match(rb"HTTP/1.1 (204|304)", head):
        return b""
    while not complete():
        piece = source.recv(1 << 20)
        if not piece:
            break
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _without_continue(head: bytes) -> bytes:
    """The proxy said 100 itself. `Expect` is in no signature."""
    return re.sub(rb"(?im)^expect:.*\r\n", b"", head)


def _error_answer(status: int, head_only: bool) -> bytes:
    reason, code, message = ERRORS[status]
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{'' if head_only else body}".encode()
