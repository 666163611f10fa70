"""Good and bad requests of every form and protocol at once, from 64 connections: every caller gets its own answer."""

import asyncio
import base64
import gzip
import json
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.tiny import POISON, SPEC, Fragile, grey, make_bundle, serving, shade

CONNECTIONS = 64
LEAVING = 4  # clients beside them that never wait for their answer
SECONDS = 60
PLANNED = 3000  # different requests, drawn before the clock starts
LEVELS = 64  # pictures that can be told apart

STATUS = {
    "not_an_image": 400,
    "image_corrupt": 400,
    "malformed_body": 400,
    "no_images": 400,
    "tensor_invalid": 400,
    "model_not_found": 404,
    "version_not_found": 404,
    "body_too_large": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_name": 422,
    "invalid_parameter": 422,
    "top_k_out_of_range": 422,
    "inference_failed": 500,
}

# What can stand in a picture's place, and what must come back in its place: a label, or an error's code.
levels = st.integers(0, LEVELS - 1)
good = st.tuples(levels, st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])).map(
    lambda drawn: (grey(drawn[0], drawn[1], levels=LEVELS), f"grey-{drawn[0]}")
)
bad = st.one_of(
    st.binary(max_size=60).map(lambda data: (b"~" + data, "not_an_image")),
    st.just((b"", "not_an_image")),
    levels.map(lambda level: (grey(level, size=64, levels=LEVELS)[:70], "image_corrupt")),
    levels.map(lambda level: (grey(level, size=200, levels=LEVELS), "image_too_large")),
    levels.map(lambda level: (grey(level, levels=LEVELS, first_pixel=POISON), "inference_failed")),
)
pictures = st.lists(st.one_of(good, good, good, bad), min_size=1, max_size=6)
forms = st.sampled_from(["multipart", "json", "raw"])

INFER = "/v2/models/greys/infer"

# Requests that fail as a whole, with the code that says so.
refused = st.sampled_from(
    [
        ({"url": "/predict?model=dogs", "content": grey(1)}, "model_not_found"),
        ({"url": "/predict?model=../x", "content": grey(1)}, "invalid_name"),
        ({"url": "/predict?version=9", "content": grey(1)}, "version_not_found"),
        ({"url": "/predict?top_k=0", "content": grey(1)}, "top_k_out_of_range"),
        ({"url": "/predict?top_k=x", "content": grey(1)}, "invalid_parameter"),
        ({"url": "/predict", "content": b"{", "headers": {"Content-Type": "application/json"}}, "malformed_body"),
        ({"url": "/predict", "content": b"a=b", "headers": {"Content-Type": "text/plain"}}, "unsupported_media_type"),
        ({"url": "/predict", "files": {"image": b"x"}}, "no_images"),
        ({"url": "/predict", "content": b"x" * 300_000}, "body_too_large"),
        ({"url": "/v2/models/dogs/infer", "content": b"{}"}, "model_not_found"),
        ({"url": INFER, "content": b"{"}, "malformed_body"),
        ({"url": INFER, "json": {"inputs": [{"name": "box", "datatype": "UINT8", "shape": [1]}]}}, "tensor_invalid"),
    ]
)


@dataclass(frozen=True)
class Ask:
    """One request, and what its answer must say: a label or a code for each picture, or the code of the whole."""

    options: dict[str, object]
    expected: list[str] | str


def ask(form: str, asked: list[tuple[bytes, str]]) -> Ask:
    images, expected = [image for image, _ in asked], [answer for _, answer in asked]
    if form == "multipart":
        options: dict[str, object] = {"files": [("file", ("x", image)) for image in images]}
    elif form == "json":
        options = {"json": {"images": [base64.b64encode(image).decode() for image in images]}}
    else:
        options = {"content": images[0]}
        expected = expected[:1] if images[0] else ["no_images"]  # an empty raw body holds no picture at all
    alone = len(expected) == 1 and expected[0] in STATUS
    return Ask({"url": "/predict"} | options, expected[0] if alone else expected)


@dataclass(frozen=True)
class Back:
    """How the request is packed, and how its answer is to come."""

    packing: str
    binary: bool
    accepted: str


def ask_pixels(asked: list[int], poisoned: bool, is_binary: bool, back: Back) -> Ask:
    """The same of the Open Inference Protocol, where one bad picture fails the request."""
    pixels = np.stack([np.full(SPEC.shape, shade(level, LEVELS), np.uint8) for level in asked])  # [N, 1, 8, 8]
    if poisoned:
        pixels[-1, 0, 0, 0] = POISON
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape)}
    expected = "inference_failed" if poisoned else [f"grey-{level}" for level in asked]
    return ask_tensor(tensor, pixels.tobytes() if is_binary else pixels.tolist(), back, expected)


def ask_pictures(asked: list[tuple[bytes, str]], is_binary: bool, back: Back) -> Ask:
    """Pictures there: the first bad one's error is the request's, of many as a bad tensor, unless the model failed."""
    images, answers = [image for image, _ in asked], [answer for _, answer in asked]
    expected: list[str] | str = answers
    if bad := [answer for answer in answers if answer in STATUS]:
        expected = bad[0] if len(asked) == 1 or bad[0] == "inference_failed" else "tensor_invalid"
    tensor = {"name": "pictures", "datatype": "BYTES", "shape": [len(images)]}
    if is_binary:
        return ask_tensor(tensor, b"".join(struct.pack("<I", len(image)) + image for image in images), back, expected)
    return ask_tensor(tensor, [base64.b64encode(image).decode() for image in images], back, expected)


def ask_tensor(tensor: dict[str, object], content: bytes | list[object], back: Back, expected: list[str] | str) -> Ask:
    behind = content if isinstance(content, bytes) else b""
    said = {"parameters": {"binary_data_size": len(behind)}} if behind else {"data": content}
    output = {"name": "label", "parameters": {"binary_data": back.binary}}
    head = json.dumps({"inputs": [tensor | said], "outputs": [output, {"name": "logits"}]}).encode()
    headers = {"Accept-Encoding": back.accepted, "Content-Encoding": back.packing}
    headers |= {HEAD: str(len(head))} if behind else {}
    return Ask({"url": INFER, "content": PACK[back.packing](head + behind), "headers": headers}, expected)


HEAD = "Inference-Header-Content-Length"
PACK = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}
backs = st.builds(Back, st.sampled_from(list(PACK)), st.booleans(), st.sampled_from(list(PACK)))
rarely = st.sampled_from([False, False, False, True])
tensors = st.one_of(
    st.builds(ask_pixels, st.lists(levels, min_size=1, max_size=6), rarely, st.booleans(), backs),
    st.builds(ask_pictures, pictures, st.booleans(), backs),
)
whole = refused.map(lambda drawn: Ask(*drawn))
asks = st.one_of(*[st.builds(ask, forms, pictures)] * 2, *[tensors] * 2, whole)


def planned() -> list[Ask]:
    plan: list[Ask] = []

    @given(asked=asks)
    @hypothesis_settings(
        max_examples=PLANNED,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def draw(asked: Ask) -> None:
        plan.append(asked)

    draw()
    return plan


def check(asked: Ask, response: httpx.Response) -> None:
    head = int(response.headers.get(HEAD, len(response.content)))
    body = json.loads(response.content[:head])
    if isinstance(asked.expected, str):
        assert (response.status_code, body["code"]) == (STATUS[asked.expected], asked.expected)
        return
    if "outputs" in body:
        assert (response.status_code, body["model_name"], body["model_version"]) == (200, "greys", "1")
        output = body["outputs"][0]
        assert (strings(response.content[head:]) if "parameters" in output else output["data"]) == asked.expected
        return
    assert (response.status_code, body["model"], body["version"]) == (200, "greys", "1")
    answers = [entry["error"]["code"] if "error" in entry else entry["label"] for entry in body["predictions"]]
    assert answers == asked.expected
    for entry in body["predictions"]:
        assert "error" not in entry or entry["error"]["status"] == STATUS[entry["error"]["code"]]


def strings(content: bytes) -> list[str]:
    found = []
    while content:
        end = 4 + int.from_bytes(content[:4], "little")
        found.append(content[4:end].decode())
        content = content[end:]
    return found


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 240)
def test_every_caller_gets_its_own_answer(tmp_path: Path) -> None:
    classes = [f"grey-{level}" for level in range(LEVELS)]
    make_bundle(tmp_path / "artifacts", module=Fragile(levels=LEVELS), classes=classes)
    plan = planned()
    with serving(
        tmp_path / "artifacts",
        tmp_path,
        default_model="greys",
        max_image_pixels="20000",
        max_body_bytes="200000",
        log_level="error",
    ) as server:
        counts = asyncio.run(load(server.url, plan))
        assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ready"}
        last = httpx.post(f"{server.url}/predict", content=grey(3, levels=LEVELS)).json()
        assert last["predictions"][0]["label"] == "grey-3"
    assert min(counts[connection] for connection in range(CONNECTIONS)) > 10
    assert counts["left"] > 10


async def load(url: str, plan: list[Ask]) -> Counter[int | str]:
    """Keep all connections busy until the time is over, each with the plan in an order of its own."""
    end = time.monotonic() + SECONDS
    counts: Counter[int | str] = Counter()

    def endless(seed: int) -> Iterator[Ask]:
        order = random.Random(seed)
        while time.monotonic() < end:
            yield order.choice(plan)

    async def connection(number: int) -> None:
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=1), timeout=60) as client:
            for asked in endless(number):
                check(asked, await client.request("POST", **asked.options))  # type: ignore[arg-type]
                counts[number] += 1

    async def leaver(number: int) -> None:
        for asked in endless(-number):
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                asking = asyncio.create_task(client.request("POST", **asked.options))  # type: ignore[arg-type]
                await asyncio.sleep(random.Random(counts["left"]).uniform(0, 0.1))
                counts["left"] += not asking.done()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

    await asyncio.gather(*map(connection, range(CONNECTIONS)), *map(leaver, range(1, LEAVING + 1)))
    return counts
