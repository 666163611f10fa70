import base64
import io
import re
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
from fastapi.testclient import TestClient
from httpx2 import Request, Response
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.api.bodies import _parts
from service.api.schemas import Predictions
from service.app import create_app
from service.errors import MalformedBody
from service.settings import Settings
from tests.tiny import GREYS, POISON, Fragile, Slow, encode, grey, make_bundle

PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}
SEND_BASE64 = "send the file's bytes in base64 or as a data URI"
FORMS = "multipart/form-data with `file` parts, a raw image (image/* or application/octet-stream), or application/json"


def prediction(level: int) -> dict[str, Any]:
    """What `greys` says of a grey picture, without the probabilities."""
    return {"label": f"grey-{level}", "index": level, "in_distribution": True}


def essence(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in ("label", "index", "in_distribution")}


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("file", (f"{index}.png", image, "image/png")) for index, image in enumerate(images)]


def problem(response: Response) -> dict[str, Any]:
    """A whole problem reply, checked for what all of them share; the id is taken out of it."""
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == response.status_code
    assert body["type"] == f"urn:safelight:problem:{body['code']}"
    assert body.pop("request_id") == response.headers["x-request-id"]
    del body["type"]
    return body


@contextmanager
def application(settings: Settings, **changes: object) -> Iterator[TestClient]:
    """The application with some settings changed; whatever a test sent it, the next good request succeeds."""
    with TestClient(create_app(settings.model_copy(update=changes)), raise_server_exceptions=False) as client:
        yield client
        assert client.get("/health/ready").json() == {"status": "ready"}
        response = client.post("/predict", content=grey(3), headers=PNG)
        assert (response.status_code, essence(response.json()["predictions"][0])) == (200, prediction(3))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with application(settings) as client:
        yield client


# --- the three forms --------------------------------------------------------------------------------------------------


def test_replies_are_what_the_documentation_says(client: TestClient) -> None:
    reply = client.post("/predict?top_k=2", files=files(grey(1), b"no picture", grey(3)))
    assert Predictions.model_validate(reply.json()).model_dump(mode="json") == reply.json()
    parameters = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["parameters"]
    assert [(one["in"], one["name"], one["required"]) for one in parameters] == [
        ("query", "model", False),
        ("query", "version", False),
        ("query", "top_k", False),
        ("header", "x-deadline-ms", False),
    ]
    assert all(one["description"] and one["schema"] for one in parameters)


def test_multipart_with_many_files_answers_each_in_order(client: TestClient) -> None:
    response = client.post("/predict?model=greys&version=1", files=files(grey(3), grey(9), grey(0)))
    body = response.json()
    assert (body["model"], body["version"]) == ("greys", "1")
    assert [essence(entry) for entry in body["predictions"]] == [prediction(3), prediction(9), prediction(0)]


def test_a_raw_body_is_one_picture(client: TestClient) -> None:
    for media_type in ("image/png", "image/anything", "application/octet-stream"):
        response = client.post("/predict", content=grey(5), headers={"Content-Type": media_type})
        assert [essence(entry) for entry in response.json()["predictions"]] == [prediction(5)]


def test_json_takes_base64_and_data_uris(client: TestClient) -> None:
    text = base64.b64encode(grey(7)).decode()
    response = client.post(
        "/predict", json={"images": [text, f"data:image/png;base64,{text}", f"{text[:9]}\n{text[9:]}"]}
    )
    assert [essence(entry) for entry in response.json()["predictions"]] == [prediction(7)] * 3


def test_the_whole_answer_of_one_picture(client: TestClient) -> None:
    response = client.post("/predict?top_k=2", content=grey(0), headers=PNG)
    best = {"label": "grey-0", "index": 0, "probability": pytest.approx(0.72133, abs=1e-4)}
    second = {"label": "grey-1", "index": 1, "probability": pytest.approx(0.26536, abs=1e-4)}
    assert response.json() == {
        "model": "greys",
        "version": "1",
        "predictions": [best | {"scores": [best, second], "in_distribution": True}],
    }


def test_an_answer_carries_its_id_its_timings_and_the_weights_digest(client: TestClient) -> None:
    response = client.post("/predict", content=grey(0), headers=PNG | {"X-Request-ID": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    stages = [part.partition(";dur=")[0] for part in response.headers["server-timing"].split(", ")]
    assert stages == ["decode", "queue", "infer"]
    manifest = client.get("/models/greys/versions/1").json()["manifest"]
    assert response.headers["x-weights-sha256"] == manifest["files"]["checkpoint.safetensors"]["sha256"]


def test_five_scores_are_given_unless_asked_and_all_classes_can_be(client: TestClient) -> None:
    for query, count in (("", 5), ("?top_k=1", 1), ("?top_k=16", 16)):
        (entry,) = client.post(f"/predict{query}", content=grey(2), headers=PNG).json()["predictions"]
        assert len(entry["scores"]) == count
        assert entry["scores"] == sorted(entry["scores"], key=lambda score: -score["probability"])
    assert sum(score["probability"] for score in entry["scores"]) == pytest.approx(1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read(client: TestClient, form: str) -> None:
    response = client.post("/predict", content=grey(4, form), headers=PNG)
    assert [essence(entry) for entry in response.json()["predictions"]] == [prediction(4)]


# --- pictures that fail -----------------------------------------------------------------------------------------------


def test_one_bad_picture_does_not_spoil_the_others(client: TestClient) -> None:
    response = client.post("/predict", files=files(grey(1), b"no picture", grey(2)))
    first, bad, last = response.json()["predictions"]
    assert (response.status_code, essence(first), essence(last)) == (200, prediction(1), prediction(2))
    assert "PNG, JPEG, WEBP, GIF, BMP, TIFF" in bad["error"].pop("detail")
    assert bad == {
        "error": {
            "type": "urn:safelight:problem:not_an_image",
            "title": "Not an image",
            "status": 400,
            "code": "not_an_image",
            "request_id": response.headers["x-request-id"],
        }
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to nothing in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """8,000 x 8,000 black pixels in a few kilobytes."""
    return encode(Image.new("1", (8000, 8000)), "PNG")


def noise_jpeg() -> bytes:
    return encode(Image.effect_noise((64, 64), 50).convert("L"), "JPEG")


@pytest.mark.parametrize(
    ("image", "status", "code", "title", "words", "facts"),
    [
        (b"x", 400, "not_an_image", "Not an image", ["PNG, JPEG, WEBP, GIF, BMP, TIFF"], {}),
        (grey(3, size=64)[:60], 400, "image_corrupt", "The image is damaged", ["PNG", "send the whole file"], {}),
        (noise_jpeg()[:400], 400, "image_corrupt", "The image is damaged", ["JPEG", "send the whole file"], {}),
        (
            png_header(30_000, 30_000),
            413,
            "image_too_large",
            "The image has too many pixels",
            ["30000 x 30000 = 900000000 pixels", "the limit is 50000000", "scale it down"],
            {"limit": 50_000_000},
        ),
        (
            bomb(),
            413,
            "image_too_large",
            "The image has too many pixels",
            ["8000 x 8000 = 64000000 pixels", "the limit is 50000000", "scale it down"],
            {"limit": 50_000_000},
        ),
    ],
    ids=["not an image", "truncated png", "truncated jpeg", "huge png", "bomb"],
)
def test_a_request_whose_only_picture_fails_gets_that_problem(
    client: TestClient, image: bytes, status: int, code: str, title: str, words: list[str], facts: dict[str, int]
) -> None:
    for response in (
        client.post("/predict", content=image, headers=PNG),
        client.post("/predict", files=files(image)),
        client.post("/predict", json={"images": [base64.b64encode(image).decode()]}),
    ):
        body = problem(response)
        detail = body.pop("detail")
        assert [word for word in words if word not in detail] == []
        assert body == {"title": title, "status": status, "code": code} | facts


def test_a_picture_that_breaks_the_model_fails_alone(settings: Settings) -> None:
    make_bundle(settings.artifacts, module=Fragile())
    with application(settings) as client:
        response = client.post("/predict", files=files(grey(1), grey(2, first_pixel=POISON), grey(3)))
        first, bad, last = response.json()["predictions"]
        assert (first["label"], last["label"]) == ("grey-1", "grey-3")
        assert bad["error"]["code"] == "inference_failed"
        assert bad["error"]["detail"] == "the model failed on this picture (Error)"
        alone = client.post("/predict", content=grey(2, first_pixel=POISON), headers=PNG)
        assert (alone.status_code, alone.json()["code"]) == (500, "inference_failed")


# --- requests that fail -----------------------------------------------------------------------------------------------


def test_an_empty_body(client: TestClient) -> None:
    for headers in (PNG, {}):
        assert problem(client.post("/predict", headers=headers)) == {
            "title": "No picture in the request",
            "status": 400,
            "detail": f"the body is empty; send {FORMS}",
            "code": "no_images",
        }


def test_an_empty_file(client: TestClient) -> None:
    body = problem(client.post("/predict", files=files(b"")))
    assert body.pop("detail").startswith("the image is empty (0 bytes)")
    assert body == {"title": "Not an image", "status": 400, "code": "not_an_image"}


def test_a_wrong_content_type(client: TestClient) -> None:
    response = client.post("/predict", content=grey(3), headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert problem(response) == {
        "title": "The content type isn't read here",
        "status": 415,
        "detail": "content type application/x-www-form-urlencoded isn't read here "
        f"(with curl --data-binary, add -H 'Content-Type: image/png'); send {FORMS}",
        "code": "unsupported_media_type",
    }
    text = client.post("/predict", content=b"hello", headers={"Content-Type": "text/plain; charset=utf-8"})
    assert problem(text)["detail"] == f"content type text/plain isn't read here; send {FORMS}"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"{", "the body: Invalid JSON: EOF while parsing an object at line 1 column 1"),
        (b"", "the body: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"[]", "the body: Input should be an object"),
        (b"{}", "images: Field required"),
        (b'{"images": "abc"}', "images: Input should be a valid array"),
        (b'{"images": [1]}', "images.0: Input should be a valid string"),
        (b'{"images": [], "top_k": 3}', "top_k: Extra inputs are not permitted"),
        (b'{"images": ["\xff"]}', "the body: Invalid JSON: invalid unicode code point at line 1 column 14"),
    ],
)
def test_json_that_is_not_what_is_asked_for(client: TestClient, body: bytes, detail: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert problem(response) == {
        "title": "The body isn't what its content type says",
        "status": 400,
        "detail": f'{detail}; send {{"images": ["<base64>", …]}}',
        "code": "malformed_body",
    }


def test_base64_that_is_none_is_an_error_in_its_place(client: TestClient) -> None:
    good = base64.b64encode(grey(6)).decode()
    response = client.post("/predict", json={"images": [good, "!!!!", "data:image/png,abc", "abc"]})
    first, *bad = response.json()["predictions"]
    assert (response.status_code, essence(first)) == (200, prediction(6))
    assert [(entry["error"]["code"], entry["error"]["detail"]) for entry in bad] == [
        ("invalid_base64", f"the picture isn't base64: Only base64 data is allowed; {SEND_BASE64}"),
        ("invalid_base64", "a data URI must read data:<type>;base64,<data>"),
        ("invalid_base64", f"the picture isn't base64: Incorrect padding; {SEND_BASE64}"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!!!", "Only base64 data is allowed"),
        ("abc", "Incorrect padding"),
        ("\u00e9", "'ascii' codec can't encode character '\\xe9' in position 0: ordinal not in range(128)"),
    ],
)
def test_bad_base64_as_the_only_picture(client: TestClient, text: str, reason: str) -> None:
    assert problem(client.post("/predict", json={"images": [text]})) == {
        "title": "The picture isn't base64",
        "status": 400,
        "detail": f"the picture isn't base64: {reason}; {SEND_BASE64}",
        "code": "invalid_base64",
    }


def test_a_large_json_body_is_answered_like_a_small_one(client: TestClient) -> None:
    large = encode(Image.effect_noise((400, 400), 90), "PNG")
    texts = [base64.b64encode(image).decode() for image in (grey(6), large, grey(7))]
    response = client.post("/predict", json={"images": [*texts, "!"]})
    first, _, third, bad = response.json()["predictions"]
    assert (essence(first), essence(third), bad["error"]["code"]) == (prediction(6), prediction(7), "invalid_base64")


def test_zero_files(client: TestClient) -> None:
    wrong_name = problem(client.post("/predict", files={"image": ("a.png", grey(1))}))
    assert wrong_name == {
        "title": "No picture in the request",
        "status": 400,
        "detail": "no part named `file` holds a file (parts found: 'image'); with curl: -F file=@picture.png",
        "code": "no_images",
    }
    assert problem(client.post("/predict", json={"images": []})) == {
        "title": "No picture in the request",
        "status": 400,
        "detail": "`images` is empty; name at least one picture",
        "code": "no_images",
    }


def test_ten_thousand_files(client: TestClient) -> None:
    for response in (
        client.post("/predict", files=files(*[b"x"] * 10_000)),
        client.post("/predict", json={"images": ["eA=="] * 10_000}),
        client.post("/predict", json={"images": [""] * 257}),
    ):
        assert problem(response) == {
            "title": "Too many pictures in one request",
            "status": 413,
            "detail": "more than 256 pictures in one request; the limit is 256: send several requests",
            "code": "too_many_images",
            "limit": 256,
        }
    at_the_limit = client.post("/predict", json={"images": [base64.b64encode(grey(1)).decode()] * 256})
    assert len(at_the_limit.json()["predictions"]) == 256


PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + grey(1) + b"\r\n"


@pytest.mark.parametrize(
    ("content_type", "content", "reason"),
    [
        ("multipart/form-data", PART + b"--b--\r\n", "its content type names no boundary"),
        ("multipart/form-data; boundary=b", b"--nonsense\r\n\r\nabc", "its closing boundary is missing"),
        ("multipart/form-data; boundary=b", b"", "its closing boundary is missing"),
        ("multipart/form-data; boundary=b", PART, "its closing boundary is missing"),
        ("multipart/form-data; boundary=b", PART + PART[:90], "its closing boundary is missing"),
        ("multipart/form-data; boundary=b", b"--b\r\nno header--b--", "its closing boundary is missing"),
        ("multipart/form-data; boundary=b", PART + b"--b\r\n\r\nx\r\n--b--", "a part of it has no name"),
        (
            "multipart/form-data; boundary=b",
            PART + b"--b\r\nContent-Disposition: form-data; filename=a\r\n\r\nx\r\n--b--",
            "a part of it has no name",
        ),
    ],
    ids=["no boundary", "another boundary", "nothing", "no end", "cut off", "no line", "no header", "no name"],
)
def test_multipart_that_is_none(client: TestClient, content_type: str, content: bytes, reason: str) -> None:
    assert problem(client.post("/predict", content=content, headers={"Content-Type": content_type})) == {
        "title": "The body isn't what its content type says",
        "status": 400,
        "detail": f"the multipart body can't be read: {reason}; send each picture as a part named `file`",
        "code": "malformed_body",
    }


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ('multipart/form-data; boundary="b"', PART + b"--b--"),
        ("multipart/form-data; charset=undefined; boundary=b", PART + b"--b--\r\n"),
        ("multipart/form-data;BOUNDARY=b; charset=utf-8", PART + b"--b--\r\n"),
        ("Multipart/Form-Data; boundary=b", b"To whom it may concern\r\n" + PART + b"--b--\r\nSincerely\r\n" + PART),
        (
            "multipart/form-data; boundary=b",
            PART.replace(b'name="file"; filename="a"', b"filename*=utf-8''a; name=file") + b"--b--",
        ),
        (
            "multipart/form-data; boundary=b",
            PART.replace(b"Content-Disposition", b"X: y\r\ncontent-disposition") + b"--b--",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n' + PART + b"--b--",
        ),
    ],
    ids=[
        "quoted",
        "charset",
        "capitals",
        "preamble and epilogue",
        "other order",
        "other headers",
        "a text of the same name",
    ],
)
def test_multipart_as_others_write_it(client: TestClient, content_type: str, content: bytes) -> None:
    reply = client.post("/predict", content=content, headers={"Content-Type": content_type})
    assert [one["label"] for one in reply.json()["predictions"]] == ["grey-1"]


@pytest.mark.parametrize("head", [b"Content-Disposition:", b";name", b"; ", b"\r\nContent-Disposition:", b"; filename"])
def test_a_part_s_head_is_read_in_one_go_however_it_is_made(head: bytes) -> None:
    body = b"--b\r\nContent-Disposition: form-data" + head * (4_000_000 // len(head)) + b"\r\n\r\nx\r\n--b--"
    begun = time.process_time()
    with pytest.raises(MalformedBody, match="a part of it has no name"):
        list(_parts(body, b"b", 1))
    assert time.process_time() - begun < 5  # one that starts over at each word takes hours


def test_more_parts_than_a_form_may_have_are_not_looked_at(client: TestClient) -> None:
    reply = client.post(
        "/predict", content=b"--b\r\n" * 100_000, headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert (reply.status_code, reply.json()["code"]) == (413, "too_many_images")


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.text("ab-", min_size=1, max_size=3))
def test_whatever_the_files_hold_they_come_apart_as_they_were_put_together(contents: list[bytes], letters: str) -> None:
    files = [("file", ("x.png", content)) for content in contents]
    boundary = f"{letters}{uuid4().hex}"
    request = Request(
        "POST", "http://x", files=files, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    parts = list(_parts(request.read(), boundary.encode(), 5))
    assert parts == [(b"file", True, content) for content in contents]


def test_an_unknown_model_and_version(client: TestClient) -> None:
    assert problem(client.post("/predict?model=dogs", content=grey(1), headers=PNG)) == {
        "title": "No such model",
        "status": 404,
        "detail": "there is no model 'dogs'; there is greys",
        "code": "model_not_found",
    }
    assert problem(client.post("/predict?version=7", content=grey(1), headers=PNG)) == {
        "title": "No such version",
        "status": 404,
        "detail": "model greys has no version 7; it has 1",
        "code": "version_not_found",
    }


@pytest.mark.parametrize("name", ["../greys", "..%2Fgreys", "/etc/passwd", "Greys", "", "a" * 64, "gre\x00ys", "%00"])
def test_a_model_name_that_cannot_be_one(client: TestClient, name: str) -> None:
    response = client.post("/predict", params={"model": name}, content=grey(1), headers=PNG)
    body = problem(response)
    assert body.pop("detail").endswith(
        "can't be a model's name: a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit"
    )
    assert body == {"title": "Not a possible name", "status": 422, "code": "invalid_name"}


def test_a_version_that_cannot_be_one(client: TestClient) -> None:
    for version in ("../1", "0", "-1", "1.0", "latest"):
        response = client.post("/predict", params={"version": version}, content=grey(1), headers=PNG)
        assert problem(response) == {
            "title": "Not a possible name",
            "status": 422,
            "detail": f"{version!r} can't be a version: versions are whole numbers from 1",
            "code": "invalid_name",
        }


@pytest.mark.parametrize("top_k", [0, -1, 17, 1000])
def test_top_k_out_of_range(client: TestClient, top_k: int) -> None:
    assert problem(client.post(f"/predict?top_k={top_k}", content=grey(1), headers=PNG)) == {
        "title": "top_k is out of range",
        "status": 422,
        "detail": f"top_k is {top_k}; greys has {len(GREYS)} classes, so it can be 1 to 16",
        "code": "top_k_out_of_range",
        "limit": 16,
    }


def test_parameters_of_the_wrong_type(client: TestClient) -> None:
    response = client.post("/predict?top_k=many", content=grey(1), headers=PNG | {"X-Deadline-Ms": "0"})
    body = problem(response)
    assert body.pop("detail") == (
        "query.top_k: Input should be a valid integer, unable to parse string as an integer; "
        "header.x-deadline-ms: Input should be greater than or equal to 1"
    )
    errors = body.pop("errors")
    assert [error["parameter"] for error in errors] == ["query.top_k", "header.x-deadline-ms"]
    assert body == {
        "title": "A parameter has a value that it can't have",
        "status": 422,
        "code": "invalid_parameter",
    }


def test_a_body_over_the_limit_is_refused_by_its_declared_length(settings: Settings) -> None:
    with application(settings, max_body_bytes=5000) as client:
        for response in (
            client.post("/predict", content=b"x" * 5001, headers=PNG),
            client.post("/predict", content=b"x" * 5001, headers=JSON),
            client.put("/models/greys/active", content=b"x" * 5001, headers=JSON),  # FastAPI's own reading
        ):
            assert response.headers["connection"] == "close"
            assert problem(response) == {
                "title": "The request body is too large",
                "status": 413,
                "detail": "the body has 5001 bytes; the limit is 5000 (SAFELIGHT_MAX_BODY_BYTES): "
                "send fewer or smaller pictures",
                "code": "body_too_large",
                "limit": 5000,
            }


def test_a_full_queue_says_when_to_come_back(settings: Settings) -> None:
    with application(settings, queue_size=4) as client:
        response = client.post("/predict", files=files(*[grey(1)] * 5))
        assert response.headers["retry-after"] == "1"
        assert problem(response) == {
            "title": "The queue is full",
            "status": 429,
            "detail": "0 pictures are waiting and 5 more don't fit: the limit is 4; try again in 1 s",
            "code": "queue_full",
            "limit": 4,
            "pending": 0,
        }


def test_a_deadline_of_the_clients_own_names_the_stage(client: TestClient) -> None:
    slow = encode(Image.effect_noise((4000, 4000), 90), "PNG")
    response = client.post("/predict", content=slow, headers=PNG | {"X-Deadline-Ms": "1"})
    assert problem(response) == {
        "title": "Not answered in time",
        "status": 504,
        "detail": "the deadline passed in the decode stage",
        "code": "deadline_exceeded",
        "stage": "decode",
    }


def test_a_deadline_that_passes_while_a_version_is_loaded_names_the_load(settings: Settings) -> None:
    make_bundle(settings.artifacts, activate=False)
    with application(settings, rescan_seconds=1000) as client:
        response = client.post("/predict?version=2", content=grey(5), headers=PNG | {"X-Deadline-Ms": "1"})
        assert problem(response) == {
            "title": "Not answered in time",
            "status": 504,
            "detail": "the deadline passed in the load stage",
            "code": "deadline_exceeded",
            "stage": "load",
        }
        patient = client.post("/predict?version=2", content=grey(5), headers=PNG)
        assert essence(patient.json()["predictions"][0]) == prediction(5)


def test_a_deadline_that_passes_at_the_engine_names_it(settings: Settings) -> None:
    make_bundle(settings.artifacts, module=Slow(rounds=500))  # 25 ms on a fast processor
    with application(settings, max_batch=1) as client:
        slow = files(*[grey(1)] * 200)  # decoded and begun with within a second, done in five
        response = client.post("/predict", files=slow, headers={"X-Deadline-Ms": "1000"})
        assert problem(response) == {
            "title": "Not answered in time",
            "status": 504,
            "detail": "the deadline passed in the infer stage",
            "code": "deadline_exceeded",
            "stage": "infer",
        }


@contextmanager
def engines_at_rest(client: TestClient) -> Iterator[None]:
    """Nothing is computed: what is asked waits."""
    engines = client.app_state["registry"]._engines
    at_rest, go_on = threading.Event(), threading.Event()

    def rest() -> bool:
        at_rest.set()
        assert go_on.wait(60)
        return False

    engines.join(rest)
    engines.wake()
    assert at_rest.wait(10)
    try:
        yield
    finally:
        engines.leave(rest)
        go_on.set()


def test_who_can_not_be_answered_by_the_deadline_is_told_so_at_once_and_when_to_come_back(settings: Settings) -> None:
    make_bundle(settings.artifacts, module=Slow())
    patient = {"queue_size": 512, "deadline_seconds": 60.0}
    with application(settings, max_batch=1, **patient) as client, ThreadPoolExecutor(2) as pool:
        with engines_at_rest(client):
            before = [pool.submit(client.post, "/predict", files=files(*[grey(1)] * 200)) for _ in range(2)]
            while 'safelight_pending_images{model="greys",version="2"} 400.0' not in client.get("/metrics").text:
                assert not any(one.done() for one in before)
            response = client.post("/predict", content=grey(5), headers=PNG | {"X-Deadline-Ms": "100"})
        assert [one.result().status_code for one in before] == [200, 200]
        found = problem(response)
        assert re.fullmatch(
            r"400 pictures are waiting and 1 more wouldn't be done in the 0\.1 s until their deadline; "
            rf"try again in {response.headers['Retry-After']} s",
            found.pop("detail"),
        )
        assert found == {
            "title": "The queue is full",
            "status": 429,
            "code": "queue_full",
            "limit": 512,
            "pending": 400,
        }


def test_a_text_that_unpacks_to_a_gigabyte_is_a_damaged_picture(client: TestClient) -> None:
    """A decompression bomb beside the pixels: 200 compressed comments of a megabyte each."""
    data, comment = grey(1), b"a\0\0" + zlib.compress(bytes(1_000_000))
    end = data.index(b"IEND") - 4
    body = problem(
        client.post("/predict", content=data[:end] + chunk(b"zTXt", comment) * 200 + data[end:], headers=PNG)
    )
    assert (body["status"], body["code"]) == (400, "image_corrupt")


def test_exif_rotation_is_undone(settings: Settings) -> None:
    file = io.BytesIO()
    picture = Image.new("L", (16, 8), 3 * 16 + 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(file, "JPEG", exif=exif, quality=100)
    with application(settings) as client:
        response = client.post("/predict", content=file.getvalue(), headers=PNG)
        assert essence(response.json()["predictions"][0]) == prediction(3)
