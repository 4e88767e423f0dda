"""A publisher on 127.0.0.1 that misbehaves when asked to."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Publisher:
    """What the server holds, what it does wrong, and what it was asked for.

    ``faults`` are used up one per request: a status such as 404 or 500, or a word:

    ============  ================================================================================
    ``truncate``  half of what it announced, then an orderly end
    ``stall``     half of it, then nothing for a long time
    ``reset``     headers only
    ``abort``     half of it, then a connection reset (TCP RST)
    ``longer``    announces twice as much as there is
    ``shorter``   announces half of what there is
    ``unsized``   announces no length
    ``redirect``  sends elsewhere, where the file is
    ``empty``     an empty file
    ``deaf``      answers a request for the rest with the rest of today's file, whatever If-Range says
    ============  ================================================================================
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str | int] = []
        self.requests: list[tuple[str, str | None]] = []
        self.resumes = True
        self.etag: str | None = '"one"'
        self.modified: str | None = None
        self.kind = "application/octet-stream"
        self.address = ""


@contextlib.contextmanager
def serve() -> Iterator[Publisher]:
    publisher = Publisher()
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            span = self.headers.get("Range")
            publisher.requests.append((self.path, span))
            fault = publisher.faults.pop(0) if publisher.faults else None
            body = publisher.files.get(self.path.lstrip("/"))
            if isinstance(fault, int) or body is None:
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            if fault == "redirect":
                self.send_response(302)
                self.send_header("Location", f"{publisher.address}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = b"" if fault == "empty" else body
            first, total = 0, len(body)
            mine = publisher.etag or publisher.modified
            is_same = self.headers.get("If-Range", mine) == mine or fault == "deaf"
            if span and publisher.resumes and is_same:
                first = int(span.removeprefix("bytes=").rstrip("-"))
                if first >= total:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            else:
                self.send_response(200)
            factor = {"longer": 2.0, "shorter": 0.5}.get(str(fault), 1.0)
            if fault != "unsized":
                self.send_header("Content-Length", str(int((total - first) * factor)))
            self.send_header("Content-Type", publisher.kind)
            if publisher.etag:
                self.send_header("ETag", publisher.etag)
            if publisher.modified:
                self.send_header("Last-Modified", publisher.modified)
            self.end_headers()
            rest = body[first:]
            with contextlib.suppress(OSError):
                if fault in ("truncate", "stall", "abort"):
                    self.wfile.write(rest[: len(rest) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        done.wait(5)
                    elif fault == "abort":
                        time.sleep(0.1)  # a reset overtakes what was sent just before
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        os.close(self.connection.detach())
                elif fault != "reset":
                    self.wfile.write(rest)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    publisher.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield publisher
    finally:
        done.set()
        server.shutdown()
        server.server_close()
