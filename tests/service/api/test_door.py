"""The application behind real sockets, with all places of its queue taken."""

import asyncio
import json
import math
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from uvicorn.server import ServerState

from service.api import door, middleware
from service.api.door import Door
from service.app import create_app
from service.settings import Settings
from tests.tiny import grey

PLACES = 200
INFER, OLDER = "/v2/models/greys/infer", "/v1/models/greys:predict"
WAITING = f"{PLACES} pictures are waiting and 1 more don't fit: the limit is {PLACES}; try again in 1 s"


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass
class Line:
    """One connection."""

    socket: socket.socket
    read: bytes = b""

    def send(
        self, method: str, target: str, body: bytes = b"", *more: str, length: int | None = None, version: str = "1.1"
    ) -> None:
        """A request, with more lines of its head; where it has a `length` and no body, its head alone."""
        length = len(body) if length is None else length
        lines = [f"{method} {target} HTTP/{version}", "Host: x", "Content-Type: image/png", f"Content-Length: {length}"]
        self.socket.sendall("\r\n".join([*lines, *more, "", ""]).encode() + body)

    def receive(self) -> Reply:
        while b"\r\n\r\n" not in self.read:
            self._more()
        head, _, rest = self.read.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        self.read = rest
        while len(self.read) < length:
            self._more()
        body, self.read = self.read[:length], self.read[length:]
        return Reply(int(first.split()[1]), headers, body)

    def _more(self) -> None:
        part = self.socket.recv(1 << 16)
        assert part, "the connection ended"
        self.read += part


@dataclass
class House:
    client: TestClient
    port: int
    doors: list[Door]

    @contextmanager
    def line(self) -> Iterator[Line]:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect(("127.0.0.1", self.port))
            yield Line(connection)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Nobody finds a place."""
        places = self.client.app_state["registry"].at_hand(None, None)._batcher.admit(PLACES, math.inf)
        assert self.client.portal
        self.client.portal.call(places.__enter__)
        try:
            yield
        finally:
            self.client.portal.call(places.__exit__, None, None, None)


@contextmanager
def open_house(settings: Settings, **options: Any) -> Iterator[House]:
    app = create_app(settings.model_copy(update={"queue_size": PLACES}))
    config = uvicorn.Config(app, log_config=None, access_log=False, **options)
    doors: list[Door] = []

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.sleep(2)

    def new_door() -> Door:
        doors.append(Door(config, ServerState(), client.app_state))
        return doors[-1]

    async def listen() -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(new_door, sock=listener)

    with socket.create_server(("127.0.0.1", 0)) as listener, TestClient(app) as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        assert client.portal
        server = client.portal.call(listen)
        yield House(client, listener.getsockname()[1], doors)
        client.portal.call(server.close)


@pytest.fixture
def house(settings: Settings) -> Iterator[House]:
    with open_house(settings) as house:
        yield house


def test_who_finds_no_room_is_told_at_the_head_and_the_connection_goes_on(house: House) -> None:
    with house.line() as line:
        with house.full():
            line.send("POST", "/predict", b"", "X-Request-ID: r-1", length=9)
            reply = line.receive()  # though the body is still to come
            line.socket.sendall(b"a picture")
            line.send("GET", "/health/live")
            assert line.receive().status == 200
        line.send("POST", "/predict", grey(3))
        answered = line.receive()
    assert json.loads(reply.body) == {
        "type": "urn:safelight:problem:queue_full",
        "title": "The queue is full",
        "status": 429,
        "detail": WAITING,
        "code": "queue_full",
        "request_id": "r-1",
        "limit": PLACES,
        "pending": PLACES,
    }
    assert reply.status == 429
    assert {name: reply.headers[name] for name in ("content-type", "retry-after", "x-request-id")} == {
        "content-type": "application/problem+json",
        "retry-after": "1",
        "x-request-id": "r-1",
    }
    assert json.loads(answered.body)["predictions"][0]["label"] == "grey-3"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (INFER, {"error": WAITING, "code": "queue_full"}),
        ("/v2/models/greys/versions/1/infer", {"error": WAITING, "code": "queue_full"}),
        (OLDER, {"error": {"message": WAITING, "type": "rate_limit_error", "param": None, "code": "queue_full"}}),
    ],
)
def test_each_protocol_has_its_own_words(house: House, path: str, body: object) -> None:
    with house.line() as line, house.full():
        line.send("POST", path, length=9)
        reply = line.receive()
    assert (reply.status, json.loads(reply.body)) == (429, body)


def test_a_refusal_is_counted_and_logged_as_any_request(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> tuple[float, float]:
        labels = {"route": INFER.replace("greys", "{model}"), "status": "429"}
        requests = REGISTRY.get_sample_value("safelight_requests_total", labels)
        return requests or 0, REGISTRY.get_sample_value("safelight_errors_total", {"code": "queue_full"}) or 0

    monkeypatch.setattr(middleware, "_refusals", defaultdict(middleware.Refusals))
    before = counted()
    with open_house(settings) as house, house.line() as line, house.full():
        for _ in range(3):
            line.send("POST", INFER, length=0)
            assert line.receive().status == 429
    after = counted()
    assert (after[0] - before[0], after[1] - before[1]) == (3, 3)
    logged = [json.loads(text) for text in capsys.readouterr().err.splitlines()]
    (first,) = (entry for entry in logged if entry.get("code") == "queue_full")
    expected = {"event": "request", "method": "POST", "path": INFER, "status": 429, "model": "greys", "version": "1"}
    assert {name: first[name] for name in expected} == expected
    assert first["refused"] == 1


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("POST", "/predict?model=dogs", 404, "model_not_found"),
        ("POST", "/predict?version=7", 404, "version_not_found"),
        ("POST", "/predict?top_k=x", 422, "invalid_parameter"),
        ("POST", "/v2/models/gre%79s/infer", 429, "queue_full"),  # once the name is read
        ("POST", "/v2/models/greys/ready", 405, "method_not_allowed"),
        ("GET", "/predict", 405, "method_not_allowed"),
    ],
)
def test_what_is_no_matter_of_room_is_for_the_application_to_say(
    house: House, method: str, target: str, status: int, code: str
) -> None:
    question = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 8, 8], "data": [0] * 64}]}
    with house.line() as line, house.full():
        line.send(method, target, json.dumps(question).encode())
        reply = line.receive()
    assert (reply.status, json.loads(reply.body)["code"]) == (status, code)


def test_a_refusal_waits_for_the_answers_before_it(house: House) -> None:
    with house.line() as line, house.full():
        requests = [b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"]
        requests += [b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1\r\n\r\nx"] * 2
        line.socket.sendall(b"".join(requests))
        replies = [line.receive() for _ in requests]
    assert [reply.status for reply in replies] == [200, 429, 429]
    assert b"safelight_pending_images" in replies[0].body


@pytest.mark.parametrize(("version", "connection"), [("1.1", "close"), ("1.0", "keep-alive"), ("1.0", "close")])
def test_a_connection_that_ends_with_the_answer_is_closed(house: House, version: str, connection: str) -> None:
    with house.line() as line, house.full():
        line.send("POST", "/predict", grey(3), f"Connection: {connection}", version=version)
        reply = line.receive()
        assert line.socket.recv(1) == b""
    assert (reply.status, reply.headers["connection"]) == (429, "close")
    assert json.loads(reply.body)["detail"] == WAITING


def test_a_chunked_body_and_one_that_waits_to_be_asked_for_are_refused_too(house: House) -> None:
    with house.line() as line, house.full():
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
        line.socket.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n".encode())
        assert line.receive().status == 429
        line.send("POST", "/predict", b"", "Expect: 100-continue", length=9)
        assert line.receive().status == 429  # and no 100


def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not(settings: Settings) -> None:
    with open_house(settings, timeout_keep_alive=1) as house, house.line() as line, house.full():
        line.send("POST", "/predict", length=9)
        assert line.receive().status == 429
        line.socket.sendall(b"a picture")
        assert line.socket.recv(1) == b""
    with open_house(settings, timeout_keep_alive=1) as house, house.line() as line, house.full():
        refused = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
        line.socket.sendall(refused + b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [line.receive().status for _ in range(2)] == [429, 200]


def test_what_fails_at_the_door_is_for_the_application_to_answer(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(door, "note", lambda *_: 1 // 0)
    with house.line() as line, house.full():
        line.send("POST", "/predict", grey(3))
        assert line.receive().status == 429
    assert "the door failed" in [record.message for record in caplog.records]


def test_a_deadline_beyond_all_numbers_is_the_longest_there_is(house: House) -> None:
    with house.line() as line:
        line.send("POST", "/predict", grey(3), f"X-Deadline-Ms: 1{'0' * 400}")
        assert line.receive().status == 200


def test_who_asks_on_and_reads_no_answers_is_not_written_to_without_end(house: House) -> None:
    count = 1000
    request = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1\r\n\r\nx"
    with house.line() as line, house.full():
        asking = threading.Thread(target=line.socket.sendall, args=(request * count,))
        asking.start()
        held = [0]
        while held[-1] == 0 or held[-1] != held[-10:][0]:  # until no more comes for half a second
            time.sleep(0.05)
            held.append(sum(one.transport.get_write_buffer_size() for one in house.doors if one.transport))
        replies = [line.receive() for _ in range(count)]
        asking.join()
    assert held[-1] < 100_000  # of half a megabyte; asyncio stops at 64 KiB
    assert {reply.status for reply in replies} == {429}
