"""A judge that answers from a table: an OpenAI-compatible endpoint on this machine, with its moods."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class StubJudge:
    """What was asked, and what is answered.

    Attributes:
        url: of the API.
        verdict: from the messages of a request to the text of its verdict.
        limit: of the words of a verdict, whatever the request says; the rest is cut.
        failures: answers to the first requests, instead of a verdict: a status, or a body.
        requests: bodies, in the order of their arrival.
        keys: values of the header that carries the key.
    """

    url: str
    verdict: Callable[[list[dict[str, str]]], str | None]
    limit: int | None = None
    failures: list[int | bytes] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def stub_judge(verdict: Callable[[list[dict[str, str]]], str | None]) -> Iterator[StubJudge]:
    """Serve until the end of the block."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.requests.append(body)
                stub.keys.append(self.headers["Authorization"])
                failure = stub.failures.pop(0) if stub.failures else None
            if self.path != "/v1/chat/completions":
                failure = 404
            status = failure if isinstance(failure, int) else 200
            text, finish = stub.verdict(body["messages"]), "stop"
            if stub.limit is not None and len((text or "").split()) > stub.limit:
                text, finish = " ".join(text.split()[: stub.limit]), "length"
            message = {"role": "assistant", "content": text}
            choice = {"message": message, "finish_reason": finish}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(failure if isinstance(failure, bytes) else answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = StubJudge(f"http://127.0.0.1:{server.server_address[1]}/v1", verdict)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
