"""A chat endpoint on loopback that misbehaves on purpose, and keeps a log of every request.

What it does with a request is decided by a function (number of the request for this answer, from 0; the
answer's text) -> Behaviour. It runs on a thread of its own, or as a process: `misbehaving_server.py LOG`
holds back answers whose text contains "hold" until LOG.go is there, writes its address to stdout, and every
request and reply to LOG.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = re.compile(r"answer-[a-z0-9-]+")


@dataclass(frozen=True)
class Behaviour:
    """What happens to one request."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    wait: float = 0.0
    cut: bool = False
    close: bool = False
    dribble: float = 0.0
    stray: bytes = b""


def reply(text: str | None, wait: float = 0.0) -> Behaviour:
    message = {"role": "assistant", "content": text}
    return Behaviour(body=json.dumps({"choices": [{"message": message}]}).encode(), wait=wait)


def failure(status: int, message: str = "no", **headers: str) -> Behaviour:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Behaviour(status, json.dumps({"error": {"message": message}}).encode(), named)


HTML = Behaviour(body=b"<html><body>Score: 1</body></html>", headers=(("Content-Type", "text/html"),))
EMPTY = Behaviour(body=b'{"choices": []}')
HALF = Behaviour(body=reply("Score: 1").body, cut=True)
CLOSED = Behaviour(close=True)


@dataclass
class Request:
    """One request: the answer it is about, its body and headers, when it came and was answered."""

    answer: str
    body: dict
    headers: dict[str, str]
    came: float
    answered: float | None = None


@dataclass
class MisbehavingServer:
    """The endpoint, as a context manager."""

    behave: Callable[[int, str], Behaviour]
    log: list[Request] = field(default_factory=list)
    on_answered: Callable[[Request], None] = lambda request: None

    def __enter__(self) -> MisbehavingServer:
        outer = self
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.busy = self.most_busy = 0
        self.released = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.serve(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/chat/completions"

    def requests(self, answer: str) -> list[Request]:
        return [each for each in self.log if each.answer == answer]

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        answer = ANSWER.search(body["messages"][-1]["content"])[0]
        with self.lock:
            number = self.seen[answer]
            self.seen[answer] += 1
            request = Request(answer, body, dict(handler.headers.items()), time.time())
            self.log.append(request)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            self._send(handler, self.behave(number, answer))
            request.answered = time.time()
            self.on_answered(request)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.busy -= 1

    def _send(self, handler: BaseHTTPRequestHandler, behaviour: Behaviour) -> None:
        self.released.wait(behaviour.wait)
        if behaviour.close:
            handler.close_connection = True
            handler.connection.close()
            return
        handler.send_response(behaviour.status)
        for name, value in behaviour.headers:
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(behaviour.body)))
        handler.end_headers()
        if behaviour.dribble:
            for position in range(len(behaviour.body)):
                handler.wfile.write(behaviour.body[position : position + 1])
                handler.wfile.flush()
                if self.released.wait(behaviour.dribble):
                    break
            return
        body = behaviour.body[: len(behaviour.body) // 2] if behaviour.cut else behaviour.body
        handler.wfile.write(body + behaviour.stray)
        handler.wfile.flush()
        if behaviour.cut:
            handler.close_connection = True
            handler.connection.close()


def main(path: str) -> None:
    """Serve until killed."""
    go = pathlib.Path(path + ".go")
    lock = threading.Lock()

    def note(event: str, answer: str) -> None:
        with lock, pathlib.Path(path).open("a") as log:
            log.write(json.dumps([event, answer]) + "\n")

    def behave(number: int, answer: str) -> Behaviour:
        note("asked", answer)
        while "hold" in answer and not go.exists():
            time.sleep(0.02)
        return reply("Score: 0.25")

    with MisbehavingServer(behave, on_answered=lambda request: note("answered", request.answer)) as server:
        print(server.url, flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
