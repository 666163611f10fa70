import asyncio
import base64
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import REGISTRY
from starlette.types import Message, Scope

from service.api import middleware
from service.api.middleware import BodyLimit, Cap, Refusals
from service.app import create_app
from service.errors import BodyTooLarge
from service.settings import Settings
from tests.tiny import Slow, grey, make_bundle

PNG = {"Content-Type": "image/png"}


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The lines since the last look, of an application that was made within the test: it keeps the stderr of then."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def requests(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [line for line in logged(capsys) if line["event"] == "request"]


def test_a_request_id_is_made_unless_a_decent_one_is_offered(client: TestClient) -> None:
    made = client.get("/health/live").headers["x-request-id"]
    assert len(made) == 32
    assert client.get("/health/live").headers["x-request-id"] != made
    for offered, taken in (
        ("abc-1.2:3_4", True),
        ("x" * 129, False),
        ("a b", False),
        ("é".encode().decode("latin-1"), False),
    ):
        response = client.get("/health/live", headers={"X-Request-ID": offered.encode("latin-1")})
        assert (response.headers["x-request-id"] == offered) is taken


INFER, OLDER = "/v2/models/greys/infer", "/v1/models/greys:predict"
ONE_PICTURE = {  # by path: a body and its headers
    "/predict": (grey(3), PNG),
    INFER: (grey(3), {"Inference-Header-Content-Length": "0"}),
    OLDER: (json.dumps({"instances": [{"b64": base64.b64encode(grey(3)).decode()}]}).encode(), {}),
}


@pytest.mark.parametrize("path", ONE_PICTURE)
def test_one_line_tells_of_each_request_and_its_reply_of_timings_and_weights(
    capsys: pytest.CaptureFixture[str], settings: Settings, path: str
) -> None:
    content, headers = ONE_PICTURE[path]
    with TestClient(create_app(settings)) as client:
        reply = client.post(path, content=content, headers=headers | {"X-Request-ID": "r-1"})
        manifest = client.get("/models/greys/versions/1").json()["manifest"]
    line, _ = requests(capsys)
    assert re.fullmatch(r"decode;dur=\d+\.\d\d, queue;dur=\d+\.\d\d, infer;dur=\d+\.\d\d", line["timing"])
    assert line.pop("ms") > 0
    assert datetime.now() - datetime.strptime(line.pop("at"), "%Y-%m-%d %H:%M:%S,%f") < timedelta(minutes=1)
    assert line == {
        "level": "INFO",
        "logger": "safelight",
        "event": "request",
        "request_id": "r-1",
        "method": "POST",
        "path": path,
        "status": 200,
        "model": "greys",
        "version": "1",
        "images": 1,
        "timing": reply.headers["server-timing"],
    }
    assert reply.headers["x-weights-sha256"] == manifest["files"]["checkpoint.safetensors"]["sha256"]


def test_what_machines_ask_every_few_seconds_is_told_at_debug_only(
    capsys: pytest.CaptureFixture[str], settings: Settings
) -> None:
    for level, lines in (("info", []), ("debug", [("DEBUG", "/health/live"), ("DEBUG", "/metrics")])):
        with TestClient(create_app(settings.model_copy(update={"log_level": level}))) as client:
            client.get("/health/live")
            client.get("/metrics")
        assert [(line["level"], line["path"]) for line in requests(capsys)] == lines


def test_a_line_that_finds_no_room_costs_no_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w", buffering=1) as no_room:  # closing it fails, too
        monkeypatch.setattr(sys, "stderr", no_room)
        with TestClient(create_app(settings)) as client:
            statuses = [client.post("/predict", content=grey(3), headers=PNG).status_code for _ in range(3)]
    assert statuses == [200, 200, 200]


@pytest.mark.parametrize(
    ("query", "content", "facts"),
    [
        ("", b"x", {"status": 400, "code": "not_an_image", "model": "greys", "version": "1", "images": 1}),
        ("?model=dogs", b"x", {"status": 404, "code": "model_not_found"}),
        ("?top_k=x", b"x", {"status": 422, "code": "invalid_parameter"}),
    ],
)
def test_the_line_of_a_failed_request_has_the_code_and_what_is_known(
    capsys: pytest.CaptureFixture[str], settings: Settings, query: str, content: bytes, facts: dict[str, object]
) -> None:
    with TestClient(create_app(settings)) as client:
        client.post(f"/predict{query}", content=content, headers=PNG)
    (line,) = requests(capsys)
    names = ("status", "code", "model", "version", "images")
    assert {name: line[name] for name in names if name in line} == facts


def test_a_client_that_leaves_during_its_upload_is_no_error_of_ours(
    capsys: pytest.CaptureFixture[str], settings: Settings
) -> None:
    statuses = []

    async def leave(app: FastAPI, method: str, path: str, content_type: bytes) -> None:
        messages: list[Message] = [
            {"type": "http.request", "body": b"--b\r\n", "more_body": True},
            {"type": "http.disconnect"},
        ]
        headers = [(b"content-type", content_type)]
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(scope | {"state": dict(state)}, receive, send)

    app = create_app(settings)
    with TestClient(app) as client:
        state = client.app_state
        for method, path, content_type in (
            ("POST", "/predict", b"image/png"),
            ("POST", "/predict", b"application/json"),
            ("POST", "/predict", b"multipart/form-data; boundary=b"),
            ("PUT", "/models/greys/active", b"application/json"),
        ):
            client.portal.call(leave, app, method, path, content_type)  # type: ignore[union-attr]
    assert statuses == [499] * 4
    lines = logged(capsys)
    assert [line["code"] for line in lines if line["event"] == "request"] == ["client_gone"] * 4
    assert not [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]


@contextmanager
def full(settings: Settings) -> Iterator[TestClient]:
    """An application whose queue is full for some moments."""
    make_bundle(settings.artifacts, module=Slow())
    app = create_app(settings.model_copy(update={"max_batch": 1, "queue_size": 200, "deadline_seconds": 60}))
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        before = pool.submit(client.post, "/predict", files=[("file", grey(1))] * 200)
        while 'safelight_pending_images{model="greys",version="2"} 200.0' not in client.get("/metrics").text:
            assert not before.done()
        yield client
        assert before.result().status_code == 200


def test_refusals_get_a_line_a_second_that_says_how_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    refusals, lines = Refusals(), []
    for now in (100.0, 100.1, 100.9, 101.0, 101.5, 103.0):
        facts: dict[str, object] = {}
        if refusals.is_told(facts):
            lines.append((now, facts))
    assert lines == [(100.0, {"refused": 1}), (101.0, {"refused": 3}), (103.0, {"refused": 2})]


def test_a_refusal_for_want_of_room_is_logged_with_its_model_and_all_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    def counted() -> float:
        labels = {"route": "/predict", "status": "429"}
        return REGISTRY.get_sample_value("safelight_requests_total", labels) or 0

    monkeypatch.setattr(middleware, "_refusals", defaultdict(Refusals))
    before = counted()
    with full(settings) as client:
        for _ in range(3):
            assert client.post("/predict", content=grey(1), headers=PNG).status_code == 429
    lines = [line for line in requests(capsys) if line.get("code") == "queue_full"]
    expected = {"status": 429, "path": "/predict", "model": "greys", "version": "2", "refused": 1}
    assert {name: lines[0][name] for name in expected} == expected
    assert counted() - before == 3


@pytest.mark.parametrize("path", ONE_PICTURE)
def test_who_finds_no_room_is_refused_before_the_body_is_read(settings: Settings, path: str) -> None:
    sent: list[Message] = []

    async def ask(app: FastAPI) -> None:
        async def receive() -> Message:
            raise AssertionError("the body was read")

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"content-type", b"image/png"), (b"x-request-id", b"r-1")]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
        await app(scope | {"state": dict(client.app_state)}, receive, send)

    with full(settings) as client:
        client.portal.call(ask, client.app)  # type: ignore[union-attr]
    assert sent[0]["status"] == 429
    assert int(dict(sent[0]["headers"])[b"retry-after"]) >= 1
    said = json.loads(sent[1]["body"])
    if path == OLDER:
        said = said["error"]
    assert said["code"] == "queue_full"
    told = said[{"/predict": "detail", INFER: "error", OLDER: "message"}[path]]
    assert "200 pictures are waiting and 1 more don't fit: the limit is 200" in told


def test_what_nobody_caught_is_a_plain_500_without_a_trace(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    app: FastAPI = create_app(settings)

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("secret")

    with TestClient(app) as client:
        response = client.get("/broken")
    assert response.headers["content-type"] == "application/problem+json"
    request_id = response.headers["x-request-id"]
    assert response.json() == {
        "type": "urn:safelight:problem:internal_error",
        "title": "Something went wrong here",
        "status": 500,
        "detail": f"the error is in the log under request id {request_id}",
        "code": "internal_error",
        "request_id": request_id,
    }
    assert "secret" in caplog.text


def test_wrong_paths_and_methods_are_problems_too(client: TestClient) -> None:
    missing, wrong = client.get("/nowhere"), client.get("/predict")
    assert (missing.status_code, missing.json()["code"], missing.json()["detail"]) == (
        404,
        "not_found",
        "GET /nowhere: Not Found",
    )
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["allow"]) == (405, "method_not_allowed", "POST")


def chunked(*chunks: bytes) -> list[Message]:
    last = len(chunks) - 1
    return [{"type": "http.request", "body": chunk, "more_body": index < last} for index, chunk in enumerate(chunks)]


def test_a_streamed_body_is_refused_at_the_first_byte_too_many() -> None:
    messages = chunked(b"a" * 60, b"b" * 60, b"c" * 60)
    read: list[int] = []

    async def app(scope: Scope, receive, send) -> None:  # noqa: ARG001
        while (message := await receive()).get("more_body"):
            read.append(len(message["body"]))

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        raise AssertionError(json.dumps(str(message)))

    limited = BodyLimit(app, Cap(100, "A_SETTING", "send less"))
    with pytest.raises(BodyTooLarge, match=r"the body has more than 100 bytes; the limit is 100"):
        asyncio.run(limited({"type": "http", "path": "/", "headers": []}, receive, send))
    assert read == [60]
    assert len(messages) == 1  # the third chunk was never asked for
