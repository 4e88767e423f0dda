"""A publisher on 127.0.0.1 that misbehaves when asked to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Publisher:
    """What the server holds, what it does wrong, and what it was asked for.

    ``faults`` are used up one per request: ``"truncate"`` (half of what it announced), ``"stall"``, ``"reset"``, or a
    status such as 404 or 500.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str | int] = []
        self.requests: list[tuple[str, str | None]] = []
        self.resumes = True
        self.etag = '"one"'
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
            first, total = 0, len(body)
            if span and publisher.resumes and self.headers.get("If-Range", publisher.etag) == publisher.etag:
                first = int(span.removeprefix("bytes=").rstrip("-"))
                if first >= total:
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(total - first))
            self.send_header("Content-Type", publisher.kind)
            if publisher.etag:
                self.send_header("ETag", publisher.etag)
            self.end_headers()
            rest = body[first:]
            with contextlib.suppress(OSError):
                if fault in ("truncate", "stall"):
                    self.wfile.write(rest[: len(rest) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        done.wait(5)
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
