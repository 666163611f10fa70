"""/v2 over HTTP, byte by byte; what the real clients make of it is tests/e2e/test_inference_clients.py."""

import asyncio
import base64
import gzip
import json
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx2 import Response

from service.api import tensors
from service.app import create_app
from service.settings import Settings
from tests.tiny import GREYS, POISON, SPEC, Fragile, Greys, flip_a_bit, grey, make_bundle, shade
from training import __version__
from training.bundle.manifest import MODULE

ARTIFACTS = Path(__file__).parents[3] / "artifacts"
PNG = {"Content-Type": "image/png"}
INFER = "/v2/models/greys/infer"
HEAD = "Inference-Header-Content-Length"
PICTURES = {"name": "pictures", "datatype": "BYTES", "shape": [1]}


def pixels(*levels: int, kind: str = "<u1") -> bytes:
    """Pictures of one grey each, [N, 1, 8, 8], as they are in memory."""
    return np.stack([np.full(SPEC.shape, shade(level)) for level in levels]).astype(kind).tobytes()


def tensor(count: int, datatype: str = "UINT8", **others: object) -> dict[str, Any]:
    return {"name": "pixels", "datatype": datatype, "shape": [count, *SPEC.shape]} | others


def strings(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def packed(question: dict[str, Any], *behind: bytes) -> tuple[bytes, dict[str, str]]:
    """A body with tensors behind its JSON, and the header that says where they begin."""
    head = json.dumps(question).encode()
    return head + b"".join(behind), {HEAD: str(len(head))}


def asking(
    *levels: int, outputs: list[dict[str, Any]] | None = None, **parameters: object
) -> tuple[bytes, dict[str, str]]:
    """A question about greys, the tensor behind the JSON."""
    behind = pixels(*levels)
    question = {"inputs": [tensor(len(levels), parameters={"binary_data_size": len(behind)})], "parameters": parameters}
    return packed(question | ({"outputs": outputs} if outputs else {}), behind)


def binary(*pictures: bytes) -> tuple[bytes, dict[str, str]]:
    """A question about encoded pictures, behind the JSON."""
    behind = strings(*pictures)
    described = PICTURES | {"shape": [len(pictures)], "parameters": {"binary_data_size": len(behind)}}
    return packed({"inputs": [described]}, behind)


def unpacked(response: Response) -> dict[str, Any]:
    """The outputs of a reply by name, wherever they stood: arrays, and lists of strings."""
    assert response.status_code == 200, response.text
    size = int(response.headers.get(HEAD, len(response.content)))
    head, rest = json.loads(response.content[:size]), response.content[size:]
    found = {}
    for output in head["outputs"]:
        if "parameters" in output:
            cut = output["parameters"]["binary_data_size"]
            content, rest = rest[:cut], rest[cut:]
            values: Any = texts(content) if output["datatype"] == "BYTES" else np.frombuffer(content, "<f4")
        else:
            values = output["data"] if output["datatype"] == "BYTES" else np.array(output["data"], "<f4")
        found[output["name"]] = values if isinstance(values, list) else values.reshape(output["shape"])
    assert rest == b""
    return found


def texts(content: bytes) -> list[str]:
    found = []
    while content:
        size = int.from_bytes(content[:4], "little")
        found.append(content[4 : 4 + size].decode())
        content = content[4 + size :]
    return found


def refused(response: Response, status: int, error: str) -> None:
    """Refused with one sentence in the protocol's own shape."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert (response.status_code, body["error"]) == (status, error), body
    assert body.keys() == {"error", "code"}


@contextmanager
def application(settings: Settings, **changes: object) -> Iterator[TestClient]:
    """Whatever a test sends, the next good request succeeds."""
    with TestClient(create_app(settings.model_copy(update=changes)), raise_server_exceptions=False) as client:
        yield client
        body, headers = asking(3)
        assert unpacked(client.post(INFER, content=body, headers=headers))["label"] == ["grey-3"]


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with application(settings) as client:
        yield client


# --- the server and its models ---


def test_the_server_says_who_it_is_and_what_it_speaks(client: TestClient) -> None:
    extensions = ["binary_tensor_data", "classification", "statistics", "model_configuration", "model_repository"]
    for path in ("/v2", "/v2/"):
        reply = client.get(path, follow_redirects=False)
        assert reply.json() == {"name": "safelight", "version": __version__, "extensions": extensions}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models").json() == {"models": ["greys"]}


@pytest.mark.parametrize("path", ["/v2/models/greys", "/v2/models/greys/versions/1"])
def test_a_model_s_inputs_and_outputs_are_described(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {
        "name": "greys",
        "versions": ["1"],
        "platform": "pytorch_torchscript",
        "inputs": [
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 1, 8, 8]},
            {"name": "pictures", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 16]},
            {"name": "logits", "datatype": "FP32", "shape": [-1, 16]},
            {"name": "label", "datatype": "BYTES", "shape": [-1, 1]},
        ],
    }
    assert client.get(f"{path}/ready").json() == {"name": "greys", "ready": True}
    config = client.get(f"{path}/config").json()
    assert config == {
        "name": "greys",
        "platform": "pytorch_torchscript",
        "backend": "pytorch",
        "max_batch_size": 256,
        "input": [
            {"name": "pixels", "data_type": "TYPE_UINT8", "dims": [1, 8, 8], "optional": True},
            {"name": "pictures", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        ],
        "output": [
            {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [16]},
            {"name": "logits", "data_type": "TYPE_FP32", "dims": [16]},
            {"name": "label", "data_type": "TYPE_STRING", "dims": [1]},
        ],
        "dynamic_batching": {"preferred_batch_size": [32], "max_queue_delay_microseconds": 0},
        "response_cache": {"enable": False},
    }


def test_what_there_is_not_is_said_in_the_protocol_s_shape(client: TestClient) -> None:
    refused(client.get("/v2/models/pets"), 404, "there is no model 'pets'; there is greys")
    refused(client.get("/v2/models/pets/ready"), 404, "there is no model 'pets'; there is greys")
    refused(client.get("/v2/models/greys/versions/7/ready"), 404, "model greys has no version 7; it has 1")
    refused(client.get("/v2/nothing"), 404, "GET /v2/nothing: Not Found")
    refused(client.get(INFER), 405, f"GET {INFER}: Method Not Allowed")


def test_a_version_is_ready_once_it_is_verified(settings: Settings, artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)
    with application(settings, rescan_seconds=1000) as client:  # none but the active one is verified by itself
        unverified = client.get("/v2/models/greys/versions/2/ready")
        error = "greys@2 is still being verified; try again in a moment"
        assert (unverified.status_code, unverified.json()) == (503, {"name": "greys", "ready": False, "error": error})
        body, headers = asking(3)
        assert client.post("/v2/models/greys/versions/2/infer", content=body, headers=headers).status_code == 200
        verified = client.get("/v2/models/greys/versions/2/ready")
        assert (verified.status_code, verified.json()) == (200, {"name": "greys", "ready": True})


def test_a_version_that_fails_its_verification_is_never_ready(settings: Settings, artifacts: Path) -> None:
    flip_a_bit(make_bundle(artifacts, activate=False).path(artifacts) / MODULE)
    with application(settings, rescan_seconds=1000) as client:
        assert client.get("/v2/models/greys/versions/2/ready").status_code == 503
        body, headers = asking(3)
        assert client.post("/v2/models/greys/versions/2/infer", content=body, headers=headers).status_code == 409
        refused_now = client.get("/v2/models/greys/versions/2/ready")
        assert (refused_now.status_code, refused_now.json()["ready"]) == (503, False)
        assert refused_now.json()["error"].startswith("greys@2 was refused: ")


# --- inference ---


def test_every_way_to_send_the_same_pixels_gets_the_same_bytes(client: TestClient) -> None:
    levels = (3, 9, 15)
    behind, floats = pixels(*levels), pixels(*levels, kind="<f4")
    nested = np.frombuffer(behind, "u1").reshape(3, *SPEC.shape)
    encoded = [grey(level) for level in levels]
    size = {"binary_data_size": len(behind)}
    pictures = {"name": "pictures", "datatype": "BYTES", "shape": [3]}
    base64s = [base64.b64encode(picture).decode() for picture in encoded]
    bodies = [
        packed({"inputs": [tensor(3, parameters=size)]}, behind),
        packed({"inputs": [tensor(3, "FP32", parameters={"binary_data_size": len(floats)})]}, floats),
        (json.dumps({"inputs": [tensor(3, data=nested.tolist())]}).encode(), {}),
        (json.dumps({"inputs": [tensor(3, data=nested.ravel().tolist())]}).encode(), {}),
        (json.dumps({"inputs": [tensor(3, "FP32", data=nested.astype(float).tolist())]}).encode(), {}),
        packed(
            {"inputs": [pictures | {"parameters": {"binary_data_size": len(strings(*encoded))}}]}, strings(*encoded)
        ),
        (json.dumps({"inputs": [pictures | {"data": base64s}]}).encode(), {}),
        (json.dumps({"inputs": [pictures | {"shape": [3, 1], "data": [[text] for text in base64s]}]}).encode(), {}),
    ]
    replies = []
    for body, headers in bodies:
        for encoding, pack in {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}.items():
            as_sent = headers | {"Content-Encoding": encoding}
            replies.append(unpacked(client.post(INFER, content=pack(body), headers=as_sent)))
    for reply in replies:
        assert reply["label"] == ["grey-3", "grey-9", "grey-15"]
        assert reply["logits"].tobytes() == replies[0]["logits"].tobytes()
        assert reply["probabilities"].tobytes() == replies[0]["probabilities"].tobytes()
    assert np.allclose(replies[0]["probabilities"].sum(1), 1)


def test_the_answer_is_that_of_predict(client: TestClient) -> None:
    ranked = client.post("/predict?top_k=16", content=grey(9), headers=PNG).json()
    expected = {score["label"]: score["probability"] for score in ranked["predictions"][0]["scores"]}
    body, headers = asking(9)
    probabilities = unpacked(client.post(INFER, content=body, headers=headers))["probabilities"][0]
    assert dict(zip(GREYS, probabilities.tolist(), strict=True)) == pytest.approx(expected)


def test_one_encoded_picture_may_be_the_whole_body(client: TestClient) -> None:
    reply = client.post(INFER, content=grey(5), headers={HEAD: "0"})
    assert reply.headers["content-type"] == "application/octet-stream"
    assert unpacked(reply)["label"] == ["grey-5"]
    refused(
        client.post(INFER, content=b"", headers={HEAD: "0"}),
        400,
        "the body is empty; with Inference-Header-Content-Length: 0 it is one encoded picture",
    )


def test_the_reply_has_the_outputs_that_are_asked_for_in_the_form_that_is_asked_for(client: TestClient) -> None:
    wanted = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "logits"}]
    body, headers = asking(2, 4, outputs=wanted, binary_data_output=True)
    reply = client.post("/v2/models/greys/versions/1/infer", content=body, headers=headers)
    head = json.loads(reply.content[: int(reply.headers[HEAD])])
    assert head == {
        "model_name": "greys",
        "model_version": "1",
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["grey-2", "grey-4"]},
            {"name": "logits", "datatype": "FP32", "shape": [2, 16], "parameters": {"binary_data_size": 128}},
        ],
    }
    assert unpacked(reply)["logits"].argmax(1).tolist() == [2, 4]


@pytest.mark.parametrize("names", [["pixels", "pictures"], ["pictures", "pixels"]])
def test_of_both_inputs_the_pixels_are_read(client: TestClient, names: list[str]) -> None:
    contents = {"pixels": pixels(3), "pictures": strings(b"no picture at all")}
    described = {"pixels": tensor(1), "pictures": PICTURES}
    inputs = [described[name] | {"parameters": {"binary_data_size": len(contents[name])}} for name in names]
    body, headers = packed({"inputs": inputs}, *(contents[name] for name in names))
    assert unpacked(client.post(INFER, content=body, headers=headers))["label"] == ["grey-3"]
    sizes = " and ".join(f"{len(contents[name])} of {name!r}" for name in names)
    error = f"86 bytes follow the JSON; by binary_data_size there should be {sizes}"
    refused(client.post(INFER, content=body + b"!", headers=headers), 400, error)


def test_an_id_comes_back_and_no_id_stays_away(client: TestClient) -> None:
    question = {"inputs": [tensor(1, data=[40] * 64)]}
    assert client.post(INFER, json=question | {"id": "mine: 7"}).json()["id"] == "mine: 7"
    assert "id" not in client.post(INFER, json=question).json()


@pytest.mark.parametrize("count", [1, 3, 99])
def test_the_best_classes_may_be_named_in_place_of_a_tensor(client: TestClient, count: int) -> None:
    body, headers = asking(3, 7, outputs=[{"name": "probabilities", "parameters": {"classification": count}}])
    reply = client.post(INFER, content=body, headers=headers).json()
    (output,) = reply["outputs"]
    best = min(count, 16)
    assert (output["name"], output["datatype"], output["shape"]) == ("probabilities", "BYTES", [2, best])
    first, second = output["data"][0].split(":"), output["data"][best].split(":")
    assert (first[1:], second[1:]) == (["3", "grey-3"], ["7", "grey-7"])
    values = [float(text.split(":")[0]) for text in output["data"][:best]]
    assert values == sorted(values, reverse=True)


def test_a_long_answer_is_packed_for_those_who_accept_that(client: TestClient) -> None:
    body, headers = asking(*range(16))
    plain = client.post(INFER, content=body, headers=headers | {"Accept-Encoding": "identity"})
    for encoding in ("gzip", "deflate"):
        reply = client.post(INFER, content=body, headers=headers | {"Accept-Encoding": encoding})
        assert reply.headers["content-encoding"] == encoding
        assert int(reply.headers["content-length"]) < len(plain.content)
        assert reply.content == plain.content
    assert "content-encoding" not in plain.headers


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("GZip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0.000, deflate;q=0.0", None),
        ("gzip; q=0, deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.7", "deflate"),
        ("gzip;q=0.5, identity", None),
        ("gzip;q=0.5, identity;q=0.5", "gzip"),
        ("identity;q=0, deflate;q=0.001", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("gzip;q=0, *", "deflate"),
        ("br, zstd", None),
        ("gzip;q=much", None),
        ("gzip;q=2", None),
        ("gzip;q=-1, deflate;level=1", None),
        ("notgzip, deflated", None),
    ],
)
def test_an_answer_is_packed_as_its_client_prefers(client: TestClient, header: str, encoding: str | None) -> None:
    body, headers = asking(*range(16))
    with client.stream("POST", INFER, content=body, headers=headers | {"Accept-Encoding": header}) as reply:
        assert reply.status_code == 200
        assert (reply.headers.get("content-encoding"), reply.headers["vary"]) == (encoding, "Accept-Encoding")
        packed = b"".join(reply.iter_raw())
    unpack = {None: bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[encoding]
    assert len(json.loads(unpack(packed))["outputs"]) == 3


def test_a_long_answer_is_not_written_on_the_event_loop(settings: Settings, artifacts: Path) -> None:
    """Nobody else would be answered meanwhile: writing and packing takes many times what the loop has to do for it."""
    levels, count = 256, 256
    classes = [f"a class by the name of {level}" for level in range(levels)]
    make_bundle(artifacts, "many", Greys(levels=levels), classes=classes)
    content = np.arange(count, dtype=np.uint8).repeat(64).tobytes()
    question = {"inputs": [tensor(count, parameters={"binary_data_size": len(content)})]}
    body, headers = packed(question, content)

    async def main() -> tuple[float, bytes]:
        app = create_app(settings)
        async with app.router.lifespan_context(app) as state:
            await asgi(app, state, "/v2/models/many/infer", body, headers)
            begun = time.thread_time()
            reply = await asgi(app, state, "/v2/models/many/infer", body, headers | {"Accept-Encoding": "gzip"})
            return time.thread_time() - begun, reply

    on_the_loop, reply = asyncio.run(main())
    answer = json.loads(gzip.decompress(reply))
    assert answer["outputs"][2]["data"][7] == "a class by the name of 7"
    begun = time.thread_time()
    gzip.compress(json.dumps(answer).encode(), 1)
    assert on_the_loop < (time.thread_time() - begun) / 3


async def asgi(app: FastAPI, state: Any, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The body of a reply, without a client's work beside it."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": raw, "state": dict(state), "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}
    received = iter([{"type": "http.request", "body": body, "more_body": False}])
    gone = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> Any:
        message = next(received, None)
        if message is None:
            await gone.wait()
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    assert sent[0]["status"] == 200
    return b"".join(message["body"] for message in sent[1:])


def test_as_many_pictures_as_the_limit_and_not_one_more(settings: Settings) -> None:
    with application(settings, max_images=4) as client:
        for count in (1, 3, 4):
            body, headers = asking(*range(count))
            assert len(unpacked(client.post(INFER, content=body, headers=headers))["label"]) == count
        body, headers = asking(*range(5))
        reply = client.post(INFER, content=body, headers=headers)
        refused(reply, 413, "5 pictures in one request; the limit is 4: send several requests")


# --- what is wrong with a request ---

WRONG: dict[str, tuple[Any, int, str]] = {
    "a wrong shape": (
        {"inputs": [tensor(1, data=[1] * 64) | {"shape": [1, 8, 8, 1]}]},
        400,
        "input 'pixels' has the shape [1, 8, 8, 1]; the model takes [N, 1, 8, 8]",
    ),
    "no shape": (
        {"inputs": [tensor(1, data=[1] * 64) | {"shape": []}]},
        400,
        "the shape says that there is no picture in the request",
    ),
    "another type": (
        {"inputs": [tensor(1, "INT64", data=[1] * 64)]},
        400,
        "input 'pixels' is 'INT64'; the model takes UINT8, or FP32 of 0 to 255",
    ),
    "half precision in JSON": (
        {"inputs": [tensor(1, "FP16", data=[1] * 64)]},
        400,
        "input 'pixels' is 'FP16'; the model takes UINT8, or FP32 of 0 to 255",
    ),
    "an unknown input": (
        {"inputs": [tensor(1, data=[1] * 64) | {"name": "image"}]},
        400,
        "a request has one input, 'pixels' or 'pictures'; this one has ['image']",
    ),
    "an input twice": (
        {"inputs": [tensor(1, data=[1] * 64)] * 2},
        400,
        "a request has one input, 'pixels' or 'pictures'; this one has ['pixels', 'pixels']",
    ),
    "an unknown output": (
        {"inputs": [tensor(1, data=[1] * 64)], "outputs": [{"name": "box"}]},
        400,
        "there is no output 'box'; there is probabilities, logits, label",
    ),
    "an output twice": (
        {"inputs": [tensor(1, data=[1] * 64)], "outputs": [{"name": "label"}, {"name": "label"}]},
        400,
        "output 'label' is asked for twice",
    ),
    "classes of a label": (
        {"inputs": [tensor(1, data=[1] * 64)], "outputs": [{"name": "label", "parameters": {"classification": 2}}]},
        400,
        "`classification` is for the outputs probabilities and logits, not for label",
    ),
    "no pictures": (
        {"inputs": [tensor(0, data=[])]},
        400,
        "the shape says that there is no picture in the request",
    ),
    "a shape below zero": (
        {"inputs": [tensor(-1, data=[])]},
        400,
        "the shape says that there is no picture in the request",
    ),
    "too few values": (
        {"inputs": [tensor(1, data=[1] * 63)]},
        400,
        "`data` of input 'pixels' has the shape [63]; `shape` says [1, 1, 8, 8]: "
        "nest it like that, or send one flat list",
    ),
    "ragged values": (
        {"inputs": [tensor(1, data=[[1, 2], [3]])]},
        400,
        "`data` of input 'pixels' is ragged, or no tensor at all",
    ),
    "values that are no numbers": (
        {"inputs": [tensor(1, data=["1"] * 64)]},
        400,
        "`data` of input 'pixels' holds something that is no number",
    ),
    "a value beyond a byte": (
        {"inputs": [tensor(1, data=[256] + [1] * 63)]},
        400,
        "input 'pixels' holds other values than the whole numbers from 0 to 255",
    ),
    "a value between two": (
        {"inputs": [tensor(1, "FP32", data=[0.5] * 64)]},
        400,
        "input 'pixels' holds other values than the whole numbers from 0 to 255",
    ),
    "no data": ({"inputs": [tensor(1)]}, 400, "input 'pixels' has no data: neither `data` nor a binary_data_size"),
    "a size that is none": (
        {"inputs": [tensor(1, parameters={"binary_data_size": -5})]},
        400,
        "inputs.0.parameters.binary_data_size: Input should be greater than or equal to 0",
    ),
    "shared memory": (
        {"inputs": [tensor(1, parameters={"shared_memory_region": "mine"})]},
        400,
        "the parameter 'shared_memory_region' isn't supported here: send the tensors in the request",
    ),
    "a picture that is none": ({"inputs": [PICTURES | {"data": ["AAAA"]}]}, 400, None),
    "more pictures than said": (
        {"inputs": [PICTURES | {"data": ["AAAA", "AAAA"]}]},
        400,
        "input 'pictures' holds more than 1 pictures; its shape says 1",
    ),
    "pictures as numbers": (
        {"inputs": [PICTURES | {"data": [1]}]},
        400,
        "`data` of input 'pictures' must hold pictures as base64",
    ),
    "pictures of another type": (
        {"inputs": [PICTURES | {"datatype": "UINT8", "data": [1]}]},
        400,
        "input 'pictures' is 'UINT8'; it must be BYTES: encoded pictures",
    ),
    "no inputs": ({"inputs": []}, 400, "inputs: List should have at least 1 item after validation, not 0"),
    "no object": ([1], 400, None),
    "a null in an input's name": (
        {"inputs": [tensor(1, data=[1] * 64) | {"name": "pixels\0"}]},
        400,
        "a request has one input, 'pixels' or 'pictures'; this one has ['pixels\\x00']",
    ),
    "a null in an output's name": (
        {"inputs": [tensor(1, data=[1] * 64)], "outputs": [{"name": "\0logits"}]},
        400,
        "there is no output '\\x00logits'; there is probabilities, logits, label",
    ),
    "a null in a type": (
        {"inputs": [tensor(1, "UINT8\0", data=[1] * 64)]},
        400,
        "input 'pixels' is 'UINT8\\x00'; the model takes UINT8, or FP32 of 0 to 255",
    ),
    "a null in an id": (
        {"id": "7\0", "inputs": [tensor(1, data=[1] * 64)]},
        400,
        "`id` holds a null character; send one without",
    ),
    "a null in base64": (
        {"inputs": [PICTURES | {"data": ["AA\0AA"]}]},
        400,
        "the picture isn't base64: Only base64 data is allowed; send the file's bytes in base64 or as a data URI",
    ),
    "data in both places": (
        {"inputs": [tensor(1, data=[1] * 64, parameters={"binary_data_size": 0})]},
        400,
        "input 'pixels' has both `data` and a binary_data_size; send one of them",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_request_that_is_wrong_is_told_what_is_wrong(client: TestClient, name: str) -> None:
    question, status, error = WRONG[name]
    reply = client.post(INFER, json=question)
    refused(reply, status, reply.json()["error"] if error is None else error)


NO_WHOLE = "Input should be a valid integer"
NO_FLAG = "Input should be a valid boolean"
BELOW, ABOVE = "Input should be greater than or equal to", "Input should be less than or equal to 18446744073709551615"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("timeout", "soon", NO_WHOLE),
        ("timeout", True, NO_WHOLE),
        ("timeout", 5.0, NO_WHOLE),
        ("timeout", -1, f"{BELOW} 0"),
        ("timeout", 10**400, ABOVE),
        ("priority", "high", NO_WHOLE),
        ("priority", 2**64, ABOVE),
        ("binary_data_output", "no", NO_FLAG),
        ("binary_data_output", 0, NO_FLAG),
        ("outputs.binary_data", "no", NO_FLAG),
        ("outputs.classification", True, NO_WHOLE),
        ("outputs.classification", 0, f"{BELOW} 1"),
        ("outputs.classification", 2**64, ABOVE),
        ("inputs.binary_data_size", True, NO_WHOLE),
        ("inputs.binary_data_size", 10**400, ABOVE),
    ],
)
def test_a_parameter_of_another_type_or_out_of_bounds_is_refused(
    client: TestClient, name: str, value: object, error: str
) -> None:
    place, _, parameter = name.rpartition(".")
    question: dict[str, Any] = {"inputs": [tensor(1, data=[1] * 64)], "outputs": [{"name": "logits"}]}
    said = question[place][0] if place else question
    said["parameters"] = {parameter: value}
    where = f"{place}.0.parameters" if place else "parameters"
    refused(client.post(INFER, json=question), 400, f"{where}.{parameter}: {error}")


def test_the_largest_parameters_are_taken(client: TestClient) -> None:
    most = 2**64 - 1
    outputs = [{"name": "logits", "parameters": {"classification": most}}]
    body, headers = asking(3, outputs=outputs, timeout=most, priority=most)
    assert len(unpacked(client.post(INFER, content=body, headers=headers))["logits"]) == len(GREYS)


def test_null_is_as_good_as_nothing(client: TestClient) -> None:
    values = [int(value) for value in pixels(3)]
    plain = {"inputs": [tensor(1, data=values)]}
    nulls = {"id": None, "parameters": None, "inputs": [tensor(1, data=values, parameters=None)], "outputs": None}
    inner = plain | {
        "parameters": {"timeout": None, "binary_data_output": None},
        "outputs": [
            {"name": "probabilities", "parameters": None},
            {"name": "logits", "parameters": {"binary_data": None, "classification": None}},
            {"name": "label"},
        ],
    }
    expected = client.post(INFER, json=plain).json()
    assert [client.post(INFER, json=question).json() for question in (nulls, inner)] == [expected] * 2
    assert client.post("/v2/repository/models/greys/load", json={"parameters": None}).json() == {}
    assert len(client.post("/v2/repository/index", json={"ready": None}).json()) == 1


@pytest.mark.parametrize(
    ("body", "headers", "error"),
    [
        (b'{"inputs": ' + b"[" * 100_000, {}, "Invalid JSON: recursion limit exceeded"),
        (b'{"inputs": [\x00]}', {}, "Invalid JSON: expected value"),
        (b"\xff\xfe", {}, "Invalid JSON: expected value"),
        (b"", {}, "Invalid JSON: EOF while parsing"),
        (b"{}", {HEAD: "abc"}, "Inference-Header-Content-Length must be a whole number, not 'abc'"),
        (b"{}", {HEAD: "-1"}, "Inference-Header-Content-Length must be a whole number, not '-1'"),
        (b"{}", {HEAD: "9"}, "Inference-Header-Content-Length is 9; the body has only 2 bytes"),
        (
            gzip.compress(b"{}", mtime=0)[:-4],
            {"Content-Encoding": "gzip"},
            "the body isn't gzip, or not all of it: Compressed",
        ),
        (
            gzip.compress(b"{}", mtime=0)[:5],
            {"Content-Encoding": "gzip"},
            "the body isn't gzip, or not all of it: Compressed",
        ),
        (
            gzip.compress(b"{}", mtime=0) + gzip.compress(b" ", mtime=0)[:-4],
            {"Content-Encoding": "gzip"},
            "the body isn't gzip, or not",
        ),
        (
            gzip.compress(b"{}", mtime=0) + b"more",
            {"Content-Encoding": "gzip"},
            "the body isn't gzip, or not all of it: Not a",
        ),
        (
            gzip.compress(b"", mtime=0) * 10_001,
            {"Content-Encoding": "gzip"},
            "the gzip body has more than 10000 members",
        ),
        (b"{}", {"Content-Encoding": "gzip"}, "the body isn't gzip, or not all of it: Not a gzipped file"),
        (b"{}", {"Content-Encoding": "deflate"}, "the body isn't deflate, or not all of it: Error -3"),
        (
            zlib.compress(b"{}")[:-3],
            {"Content-Encoding": "deflate"},
            "the body isn't deflate, or not all of it: it ends",
        ),
        (
            zlib.compress(b"{}") + b"x",
            {"Content-Encoding": "deflate"},
            "the body isn't deflate, or not all of it: it en",
        ),
    ],
)
def test_a_body_that_can_not_be_read_is_refused(
    client: TestClient, body: bytes, headers: dict[str, str], error: str
) -> None:
    reply = client.post(INFER, content=body, headers=headers)
    assert error in reply.json()["error"]
    refused(reply, 400, reply.json()["error"])


def test_a_gzip_body_may_have_several_members(client: TestClient) -> None:
    body, headers = asking(3, 5)
    members = b"".join(gzip.compress(body[start : start + 50]) for start in range(0, len(body), 50))
    reply = client.post(INFER, content=members, headers=headers | {"Content-Encoding": "gzip"})
    assert unpacked(reply)["label"] == ["grey-3", "grey-5"]


def test_bytes_that_are_not_those_of_the_description_are_refused(client: TestClient) -> None:
    question = {"inputs": [tensor(1, parameters={"binary_data_size": 64})]}
    body, headers = packed(question, pixels(1) + b"more")
    error = "68 bytes follow the JSON; by binary_data_size there should be 64 of 'pixels'"
    refused(client.post(INFER, content=body, headers=headers), 400, error)
    question = {"inputs": [tensor(2, parameters={"binary_data_size": 64})]}
    body, headers = packed(question, pixels(1))
    error = "input 'pixels' of the shape [2, 1, 8, 8] takes 128 bytes, not 64"
    refused(client.post(INFER, content=body, headers=headers), 400, error)


def test_millions_of_empty_strings_are_refused_after_the_first(client: TestClient) -> None:
    behind = bytes(8_000_000)
    body, headers = packed({"inputs": [PICTURES | {"parameters": {"binary_data_size": len(behind)}}]}, behind)
    error = "input 'pictures' holds more than 1 pictures; its shape says 1"
    refused(client.post(INFER, content=body, headers=headers), 400, error)


@pytest.mark.parametrize("behind", [b"\0", strings(b"abc")[:-1], struct.pack("<I", 2**31) + b"abc"])
def test_strings_that_end_early_are_refused(client: TestClient, behind: bytes) -> None:
    question = {"inputs": [PICTURES | {"parameters": {"binary_data_size": len(behind)}}]}
    body, headers = packed(question, behind)
    error = "input 'pictures' ends within a picture: a length says more than there is"
    refused(client.post(INFER, content=body, headers=headers), 400, error)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 256.0, 1e30])
def test_pixels_that_no_picture_has_poison_no_batch(client: TestClient, value: float) -> None:
    behind = np.full((1, *SPEC.shape), value, "<f4").tobytes()
    body, headers = packed({"inputs": [tensor(1, "FP32", parameters={"binary_data_size": len(behind)})]}, behind)
    error = "input 'pixels' holds other values than the whole numbers from 0 to 255"
    refused(client.post(INFER, content=body, headers=headers), 400, error)


def test_a_bomb_is_not_unpacked(settings: Settings) -> None:
    with application(settings, max_body_bytes=100_000) as client:
        reply = client.post(INFER, content=gzip.compress(bytes(5_000_000)), headers={"Content-Encoding": "gzip"})
        error = (
            "the body has more than 100000 bytes once it is unpacked; the limit is 100000 (SAFELIGHT_MAX_BODY_BYTES): "
            "send fewer or smaller pictures"
        )
        refused(reply, 413, error)
        reply = client.post(INFER, content=b"{}", headers={"Content-Encoding": "br"})
        refused(reply, 415, "content encoding br isn't read here; send gzip, deflate or none")


@pytest.mark.parametrize("content", [b"\0", b"\0" + grey(3), grey(3).replace(b"IHDR", b"\0HDR")])
def test_a_null_in_a_picture_is_a_byte_like_any_other(client: TestClient, content: bytes) -> None:
    assert grey(3).count(b"\0") > 10
    body, headers = binary(content)
    error = "this is no image of a format that is read here; send one of PNG, JPEG, WEBP, GIF, BMP, TIFF"
    refused(client.post(INFER, content=body, headers=headers), 400, error)


def test_of_many_pictures_the_bad_one_is_named(client: TestClient) -> None:
    behind = strings(grey(1), b"no picture", grey(2))
    inputs = [PICTURES | {"shape": [3], "parameters": {"binary_data_size": len(behind)}}]
    body, headers = packed({"inputs": inputs}, behind)
    reply = client.post(INFER, content=body, headers=headers)
    assert reply.json()["error"].startswith("picture 1 of 3: ")
    refused(reply, 400, reply.json()["error"])


def test_a_model_that_fails_is_said_to_fail(settings: Settings, artifacts: Any) -> None:
    make_bundle(artifacts, "fragile", module=Fragile())
    with application(settings) as client:
        question = {"inputs": [tensor(1, data=[255] * 64)]}
        reply = client.post("/v2/models/fragile/infer", json=question)
        refused(reply, 500, "the model failed on this picture (Error)")


def test_a_time_that_is_too_short_is_kept_to(client: TestClient) -> None:
    body, headers = asking(1, timeout=1)
    reply = client.post(INFER, content=body, headers=headers)
    refused(reply, 504, "the deadline passed in the queue stage")


# --- statistics ---


def counted(client: TestClient, model: str = "greys") -> dict[str, Any]:
    """Everything that is counted of version 1, each figure under one name."""
    (found,) = client.get(f"/v2/models/{model}/versions/1/stats").json()["model_stats"]
    stages = found.pop("inference_stats")
    return found | {f"{name} {part}": value for name, parts in stages.items() for part, value in parts.items()}


def grown(client: TestClient, before: dict[str, Any], model: str = "greys") -> dict[str, int]:
    """What it grew by; what didn't is left out."""
    after = counted(client, model)
    numbers = (name for name, value in after.items() if isinstance(value, int))
    return {name: after[name] - before[name] for name in numbers if after[name] != before[name]}


STAGES = ("success", "queue", "compute_input", "compute_infer", "compute_output")


def test_the_same_json_before_other_tensors_is_another_question(client: TestClient) -> None:
    wanted: list[dict[str, Any]] = [{"name": "label"}]
    hits = tensors._asked_kept.cache_info().hits
    for levels in ((1, 2), (3, 4), (5, 6, 7), (1, 2)):
        body, headers = asking(*levels, outputs=wanted)
        found = unpacked(client.post(INFER, content=body, headers=headers))
        assert list(found) == ["label"]
        assert np.ravel(found["label"]).tolist() == [f"grey-{level}" for level in levels]
    assert tensors._asked_kept.cache_info().hits >= hits + 2
    kept = tensors._asked_kept.cache_info().currsize
    body, headers = packed({"inputs": [tensor(1, data=np.zeros((1, *SPEC.shape), int).tolist())]})
    assert client.post(INFER, content=body, headers=headers).status_code == 200
    assert tensors._asked_kept.cache_info().currsize == kept  # nobody's pictures stay in memory
    body, headers = asking(8, outputs=[{"name": "nothing"}])
    for _ in range(2):
        reply = client.post(INFER, content=body, headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (400, "tensor_invalid")


def test_statistics_count_pictures_batches_and_where_the_time_went(client: TestClient) -> None:
    before = counted(client)
    assert (before["name"], before["version"], before["batch_stats"]) == ("greys", "1", [])
    body, headers = asking(1, 2, 3)
    for _ in range(4):
        assert client.post(INFER, content=body, headers=headers).status_code == 200
    found = grown(client, before)
    assert found.pop("last_inference") > 0
    times = {name: found.pop(f"{name} ns") for name in STAGES}
    assert found == {"inference_count": 12, "execution_count": 4} | {f"{name} count": 4 for name in STAGES}
    assert min(times.values()) > 0
    assert sum(times[name] for name in STAGES[1:]) == pytest.approx(times["success"], rel=1e-6)
    assert client.get("/v2/models/greys/stats").json() == client.get("/v2/models/stats").json()


@pytest.mark.parametrize(
    ("question", "status", "computed"),
    [
        (asking(1, timeout=1), 504, 0),
        (binary(b"no picture"), 400, 0),
        (binary(grey(1), b"no picture", grey(2)), 400, 2),
        (binary(grey(1, first_pixel=POISON)), 500, 1),
        (binary(grey(1), grey(2, first_pixel=POISON)), 500, 2),
    ],
    ids=["late", "no picture", "one of three is no picture", "poisoned", "one of two is poisoned"],
)
def test_a_request_that_was_admitted_and_got_no_answer_is_a_failure_and_no_success(
    settings: Settings, artifacts: Path, question: tuple[bytes, dict[str, str]], status: int, computed: int
) -> None:
    make_bundle(artifacts, "fragile", module=Fragile())
    with application(settings) as client:
        client.get("/v1/models/fragile")  # once it is loaded
        before = counted(client, "fragile")
        body, headers = question
        assert client.post("/v2/models/fragile/infer", content=body, headers=headers).status_code == status
        found = grown(client, before, "fragile")
        assert found.pop("fail ns") > 0
        found.pop("last_inference", None)
        batch = {"inference_count": computed, "execution_count": 1} if computed else {}  # what the engine was given
        assert found == {"fail count": 1} | batch


def test_of_predict_s_pictures_one_answer_is_a_success(client: TestClient) -> None:
    before = counted(client)
    images = [("file", ("a.png", grey(1))), ("file", ("b.png", b"no picture"))]
    assert client.post("/predict", files=images).status_code == 200
    found = {name: count for name, count in grown(client, before).items() if name.endswith("count")}
    assert found == {"inference_count": 1, "execution_count": 1} | {f"{name} count": 1 for name in STAGES}
    before = counted(client)
    assert client.post("/predict", files=images[1:]).status_code == 400
    assert grown(client, before).keys() == {"fail count", "fail ns"}


@pytest.mark.parametrize("name", ["a wrong shape", "another type", "an unknown input", "an unknown output", "no data"])
def test_a_tensor_that_is_refused_is_neither_success_nor_failure(client: TestClient, name: str) -> None:
    """As with Triton, whose statistics begin with the queue."""
    before = counted(client)
    assert client.post(INFER, json=WRONG[name][0]).status_code == 400
    assert grown(client, before) == {}


def test_an_answer_from_the_cache_is_a_success_that_was_not_computed(settings: Settings) -> None:
    body, headers = asking(3, 5)
    with application(settings, cache_mb=1) as client:
        assert client.get("/v2/models/greys/config").json()["response_cache"] == {"enable": True}
        client.post(INFER, content=body, headers=headers)
        before = counted(client)
        assert client.post(INFER, content=body, headers=headers).status_code == 200
        found = {name: count for name, count in grown(client, before).items() if name.endswith("count")}
        assert found == {"success count": 1, "queue count": 1, "cache_hit count": 2}


# --- the repository ---


def test_a_model_that_is_unloaded_answers_nobody_until_it_is_loaded(settings: Settings) -> None:
    def index(**body: object) -> Any:
        return client.post("/v2/repository/index", content=json.dumps(body) if body else b"").json()

    with TestClient(create_app(settings)) as client:
        loaded = {"name": "greys", "version": "1", "state": "READY", "reason": ""}
        assert index() == [loaded]
        assert (
            client.post("/v2/repository/models/greys/unload", json={"parameters": {"unload_dependents": False}}).json()
            == {}
        )
        assert index() == [loaded | {"state": "UNAVAILABLE", "reason": "unloaded"}]
        assert index(ready=True) == []
        body, headers = asking(3)
        error = "model greys is unloaded; let it answer again: POST /v2/repository/models/greys/load"
        for path in (INFER, "/v2/models/greys/versions/1/infer"):
            refused(client.post(path, content=body, headers=headers), 404, error)
        assert client.post("/predict", content=grey(1), headers=PNG).json()["code"] == ("model_unloaded")
        ready = client.get("/v2/models/greys/ready")
        assert (ready.status_code, ready.json()) == (503, {"name": "greys", "ready": False, "error": error})
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/info").json()["engines"] == []
    with application(settings) as client:  # also after a restart, until it is loaded
        assert index() == [loaded | {"state": "UNAVAILABLE", "reason": "unloaded"}]
        assert client.post("/v2/repository/models/greys/load", content=b"{}").json() == {}
        assert index(ready=True) == [loaded]
        assert client.post("/v2/repository/models/greys/load").json() == {}


def test_what_is_loaded_comes_from_the_folder_and_not_from_the_request(client: TestClient) -> None:
    parameters = {"config": "{}", "file:1/model.pt": "AAAA"}
    reply = client.post("/v2/repository/models/greys/load", json={"parameters": parameters})
    error = "a model's files and configuration can't be sent here: publish a version (safelight train, POST /train)"
    refused(reply, 501, error)
    refused(client.post("/v2/repository/models/pets/load"), 404, "there is no model 'pets'; there is greys")
    refused(client.post("/v2/repository/models/pets/unload"), 404, "there is no model 'pets'; there is greys")
    assert client.post("/v2/repository/index", content=b"[]").status_code == 400
