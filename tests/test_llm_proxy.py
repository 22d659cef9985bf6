"""examples/llm_proxy.py: an LLM that streams tokens, a client that reads them, and either of them goes."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kaio.testing import blackhole

from .test_examples import BOUND, SHORT, running

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUEST = b"POST /v1/chat HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\n{}"
SLACK = 6.0


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Model:
    """An LLM's server with one connection: it writes tokens until it is told to do something else, or is left."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.tokens = 0
        self.comments_after = 1 << 30
        self.started = threading.Event()
        self.left = threading.Event()
        self.stop = threading.Event()
        self.connection: Any = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}"

    def _serve(self) -> None:
        self.listening.settimeout(20)
        with contextlib.suppress(OSError):
            self.connection, _ = self.listening.accept()
            with contextlib.suppress(OSError):
                received = b""
                while not received.endswith(b"{}"):
                    received += self.connection.recv(10_000)
                self.connection.sendall(HEAD)
                for number in itertools.count():
                    if self.stop.is_set():
                        break
                    content = b": keep-alive\n\n" if number >= self.comments_after else b'data: {"token": 1}\n\n'
                    self.connection.sendall(chunk(content))
                    self.tokens += 1
                    self.started.set()
                    time.sleep(0.05)
            self.left.set()

    def close(self) -> None:
        self.stop.set()
        self.listening.close()
        self._thread.join()
        if self.connection is not None:
            self.connection.close()


@pytest.fixture
def model() -> Iterator[Model]:
    running_model = Model()
    yield running_model
    running_model.close()


def read_until(sock: socket.socket, found: Callable[[bytes], object]) -> bytes:
    """Receive until there is enough."""
    received = b""
    while not found(received):
        more = sock.recv(65536)
        if not more:
            break
        received += more
    return received


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "leaves"])
def test_no_more_tokens_are_written_for_a_client_that_is_gone(how: str, model: Model, dead_peers: None) -> None:
    """The model's connection is closed."""
    with running("llm_proxy.py", "--port", "0", "--upstream", model.url, "--keepalive", SHORT) as program:
        with program.connect() as client:
            client.sendall(REQUEST)
            assert read_until(client, lambda data: data.count(b'{"token": 1}') >= 3)
            if how == "leaves":
                client.close()
                assert model.left.wait(SLACK)
            else:
                with blackhole(client):
                    assert model.left.wait(BOUND + SLACK)
        program.find(r"client gone after \d+ events: upstream closed", within=5)
        written = model.tokens
        time.sleep(0.3)
        assert model.tokens == written


@pytest.mark.slow
@pytest.mark.parametrize("why", ["dead", "closed", "comments"])
def test_a_client_is_told_that_its_model_is_gone(why: str, model: Model, dead_peers: None) -> None:
    """By an event of the proxy's, within the detection time or that for contents."""
    if why == "comments":
        model.comments_after = 5
    options = ("--upstream", model.url, "--keepalive", SHORT, "--content-timeout", "1")
    with running("llm_proxy.py", "--port", "0", *options) as program, program.connect() as client:
        client.settimeout(BOUND + SLACK)
        client.sendall(REQUEST)
        assert model.started.wait(SLACK)
        with blackhole(model.connection) if why == "dead" else contextlib.nullcontext():
            if why == "closed":
                model.stop.set()
                assert model.left.wait(SLACK)
                model.connection.close()
            said = read_until(client, lambda data: data.endswith(b"0\r\n\r\n"))
        event = re.search(rb"event: error\ndata: (.*)\n", said)
        assert event
        assert json.loads(event[1])["error"]["type"] == "upstream_gone"
        program.find(r"upstream gone after \d+ events: .*", within=5)
        if why == "comments":
            assert b"no content for 1 s" in event[1]
            assert said.count(b'{"token": 1}') == 5


def test_a_model_that_is_not_there_is_a_bad_gateway() -> None:
    """With the reason."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with running("llm_proxy.py", "--port", "0", "--upstream", url) as program, program.connect() as client:
        client.sendall(REQUEST)
        assert read_until(client, lambda data: b"upstream_gone" in data).startswith(b"HTTP/1.1 502")
        program.find("no answer from upstream", within=5)
