"""A small HTTP server that plays a served model, and the faults that such servers have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

VOCABULARY = 12
Respond = Callable[[dict[str, Any], int], Any]


def log_probabilities(tokens: list[int]) -> np.ndarray:
    """Log-probabilities of the token after each position, shape ``(T, V)``: those of the tokens up to there."""
    rows = []
    for end in range(1, len(tokens) + 1):
        scores = 3 * np.random.default_rng(tokens[:end]).standard_normal(VOCABULARY)
        rows.append(scores - np.log(np.exp(scores).sum()))
    return np.stack(rows)


def entry(row: np.ndarray, count: int, own: int | None = None) -> dict[str, dict[str, float]]:
    """An entry of vLLM's: the likeliest tokens, and the sequence's own."""
    chosen = set(np.argsort(-row)[:count].tolist()) | ({own} if own is not None else set())
    return {str(token): {"logprob": float(row[token])} for token in sorted(chosen)}


def choice(tokens: list[int], count: int, index: int = 0) -> dict[str, Any]:
    """One choice of a response, as vLLM returns it."""
    rows = log_probabilities(tokens)
    entries = [entry(row, count, own) for row, own in zip(rows, tokens[1:], strict=False)]
    after = {f"token_id:{token}": value["logprob"] for token, value in entry(rows[-1], count).items()}
    return {"index": index, "prompt_logprobs": [None, *entries], "logprobs": {"tokens": [], "top_logprobs": [after]}}


def response(body: dict[str, Any], call: int) -> dict[str, Any]:
    """The right response to a request."""
    count = body["prompt_logprobs"]
    return {"choices": [choice(tokens, count, index) for index, tokens in enumerate(body["prompt"])]}


class StatusError(Exception):
    """Makes the server answer with a status code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Served:
    """A running server.

    Attributes:
        url: Its address.
        requests: The bodies of the requests so far.
        respond: Called with a body and the number of the call; what it returns is sent, a string as it is.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.respond: Respond = response


@contextmanager
def serving() -> Iterator[Served]:
    """A context with a server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.requests.append(body)
            try:
                answer = served.respond(body, len(served.requests))
            except StatusError as code:
                self.send_error(code.code)
                return
            content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """No-op: the tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away
    served = Served(f"http://127.0.0.1:{server.server_port}/v1/completions")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slow(seconds: float, then: Respond = response) -> Respond:
    """The right response, but late in the first call."""

    def respond(body: dict[str, Any], call: int) -> Any:
        if call == 1:
            time.sleep(seconds)
        return then(body, call)

    return respond
