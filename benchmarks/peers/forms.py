"""How a picture is sent to a server, and how its answer is read: the shapes of requests and answers."""

import base64
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

BOUNDARY = "safelight-benchmark"
V2_OUTPUT = "probabilities"
V2_HEAD = "Inference-Header-Content-Length"

Headers = dict[str, str]
Content = tuple[Headers, bytes]
Rows = list[list[float]]  # [N][K] probabilities in the classes' order
Work = Literal["pictures", "pixels"]


@dataclass(frozen=True)
class Form:
    """One way to ask a server."""

    path: str
    encode: Callable[[list[bytes]], Content]  # PNGs to headers and body
    decode: Callable[[Headers, bytes, list[str]], Rows]  # an answer's headers (in small letters) and body, the classes
    many: bool = False  # a request may hold many pictures
    many_path: str | None = None  # where that is another place, or another field
    encode_many: Callable[[list[bytes]], Content] | None = None
    work: Work = "pictures"  # pixels: the client has decoded them


def request(address: str, path: str, content: Content) -> bytes:
    """A whole HTTP/1.1 request, as the client sends it."""
    headers, body = content
    lines = [f"POST {path} HTTP/1.1", f"Host: {address}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


# --- requests ---------------------------------------------------------------------------------------------------------


def raw(pictures: list[bytes]) -> Content:
    """One picture is the body."""
    (picture,) = pictures
    return {"Content-Type": "image/png"}, picture


def multipart(field: str) -> Callable[[list[bytes]], Content]:
    """A form in which each picture is a part with this name."""

    def encode(pictures: list[bytes]) -> Content:
        head = f'Content-Disposition: form-data; name="{field}"; filename="x.png"\r\nContent-Type: image/png'
        parts = [f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + picture + b"\r\n" for picture in pictures]
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        return headers, b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()

    return encode


def v2_base64(pictures: list[bytes]) -> Content:
    """The V2 protocol in JSON: one tensor of base64."""
    tensor = {
        "name": "input",
        "shape": [len(pictures), 1],
        "datatype": "BYTES",
        "parameters": {"content_type": "base64"},
        "data": [base64.b64encode(picture).decode() for picture in pictures],
    }
    return {"Content-Type": "application/json"}, json.dumps({"inputs": [tensor]}).encode()


def v2_pictures(pictures: list[bytes]) -> Content:
    """The V2 protocol with a binary tensor of undecoded pictures."""
    data = b"".join(struct.pack("<I", len(picture)) + picture for picture in pictures)
    return _v2_binary("pictures", [len(pictures), 1], "BYTES", data)


def v2_pixels(pictures: list[bytes]) -> Content:
    """The V2 protocol with a binary tensor of pixels [N, C, H, W]: the client has decoded the pictures."""
    opened = [np.atleast_3d(np.asarray(Image.open(io.BytesIO(picture)))) for picture in pictures]  # grey or RGB
    images = [image.transpose(2, 0, 1) for image in opened]
    return _v2_binary("pixels", [len(images), *images[0].shape], "UINT8", np.stack(images).tobytes())


def _v2_binary(name: str, shape: list[int], datatype: str, data: bytes) -> Content:
    tensor = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
    asked = {"name": V2_OUTPUT, "parameters": {"binary_data": True}}
    head = json.dumps({"inputs": [tensor], "outputs": [asked]}).encode()
    return {"Content-Type": "application/octet-stream", V2_HEAD: str(len(head))}, head + data


# --- answers ----------------------------------------------------------------------------------------------------------


def from_peers_json(headers: Headers, body: bytes, classes: list[str]) -> Rows:  # noqa: ARG001
    """What `apps/workload.py` answers, for one picture or a list of them."""
    answer = json.loads(body)
    answers = answer if isinstance(answer, list) else [answer]
    return [[row["probabilities"][name] for name in classes] for row in answers]


def from_v2(headers: Headers, body: bytes, classes: list[str]) -> Rows:
    """The V2 protocol's output, in JSON or in binary behind it."""
    head = int(headers.get(V2_HEAD.lower(), len(body)))
    rest, values = body[head:], None
    for output in json.loads(body[:head])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if output["name"] == V2_OUTPUT:
            values = output["data"] if size is None else np.frombuffer(rest[:size], "<f4").tolist()
        rest = rest[size or 0 :]
    if values is None:
        raise ValueError(f"the answer has no output {V2_OUTPUT!r}")
    return np.reshape(values, (-1, len(classes))).tolist()


def from_safelight(headers: Headers, body: bytes, classes: list[str]) -> Rows:  # noqa: ARG001
    """`/predict` with as many classes named as there are."""
    predictions: list[dict[str, Any]] = json.loads(body)["predictions"]
    chances = ({score["label"]: score["probability"] for score in row["scores"]} for row in predictions)
    return [[row[name] for name in classes] for row in chances]
