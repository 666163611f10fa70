"""A request's body to pictures, in its three forms: multipart, a raw image, JSON with base64."""

import asyncio
import base64
import re
from collections.abc import Iterator

from fastapi import Request
from pydantic import ValidationError

from service.api.asgi import header, read_body
from service.api.schemas import Base64Images
from service.errors import InvalidBase64, MalformedBody, NoImages, TooManyImages, UnsupportedBody
from service.inference.predictor import Picture

THREAD_FROM = 100_000  # bytes of JSON; less is read faster than a thread is found for it

MOST_FIELDS = 100  # of a form, beside its files
BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"]*)"|([^;\s]*))', re.I)
# Each begins with a line and ends with it: a head, however long, is looked at once and not from each of its words.
NAME = re.compile(rb'\r\ncontent-disposition:[^\r\n]*?;[ \t]*name=(?:"([^"\r\n]*)"|([^;\s]*))', re.I)
FILENAME = re.compile(rb"\r\ncontent-disposition:[^\r\n]*;[ \t]*filename\*?=", re.I)

FORMS = "multipart/form-data with `file` parts, a raw image (image/* or application/octet-stream), or application/json"


async def read_pictures(request: Request, max_images: int) -> list[Picture]:
    """The pictures of a request, undecoded; base64 that isn't one stands as its error in its place.

    Raises NoImages, TooManyImages, MalformedBody, UnsupportedBody, and BodyTooLarge while the body streams in.
    """
    kind = media_type(request)
    if kind == "multipart/form-data":
        return await _from_multipart(request, max_images)
    if kind == "application/json":
        body = await read_body(request.receive)
        if len(body) < THREAD_FROM:
            return _from_json(body, max_images)
        return await asyncio.to_thread(_from_json, body, max_images)
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        return [_not_empty(await read_body(request.receive))]
    hint = " (with curl --data-binary, add -H 'Content-Type: image/png')" if "urlencoded" in kind else ""
    raise UnsupportedBody(f"content type {kind} isn't read here{hint}; send {FORMS}")


def media_type(request: Request) -> str:
    return _content_type(request).partition(";")[0].strip().lower()


def _content_type(request: Request) -> str:
    return header(request.scope, b"content-type") or ""


async def _from_multipart(request: Request, max_images: int) -> list[Picture]:
    named = BOUNDARY.search(_content_type(request))
    boundary = named[named.lastindex or 0].encode("latin-1") if named else b""
    if not boundary:
        raise _malformed("its content type names no boundary")
    pictures: list[Picture] = []
    others = set()
    for name, is_file, content in _parts(await read_body(request.receive), boundary, max_images):
        if name != b"file" or not is_file:
            others.add(name)
            continue
        if len(pictures) == max_images:
            raise _too_many(max_images)
        pictures.append(content)
    if not pictures:
        found = ", ".join(sorted(ascii(name[:40].decode(errors="replace")) for name in others)[:10]) or "none"
        raise NoImages(f"no part named `file` holds a file (parts found: {found}); with curl: -F file=@picture.png")
    return pictures


def _parts(body: bytes, boundary: bytes, max_images: int) -> Iterator[tuple[bytes, bool, bytes]]:
    """The parts of a whole multipart body (RFC 2046, 5.1): name, whether it is a file, content.

    Raises MalformedBody, and TooManyImages where there are more parts than pictures and fields may be.
    One `split`, for a body that is in memory anyway; the incremental parsers of libraries take ten times as long.
    """
    delimiter = b"--" + boundary
    most = max_images + MOST_FIELDS
    start = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2  # what is before counts for nothing
    parts = body[start + len(delimiter) :].split(b"\r\n" + delimiter, most)
    if len(parts) > most:
        raise _too_many(max_images)
    end = next((place for place, part in enumerate(parts) if part.startswith(b"--")), None)
    if end is None:
        raise _malformed("its closing boundary is missing")
    for part in parts[:end]:
        head, blank, content = part.partition(b"\r\n\r\n")
        name = NAME.search(head)
        if not blank or name is None:
            raise _malformed("a part of it has no name")
        yield name[name.lastindex or 0], FILENAME.search(head) is not None, content


def _from_json(body: bytes, max_images: int) -> list[Picture]:
    if body.count(b'"') > 2 * (max_images + 1):  # two for each string; millions of them would take long to parse
        raise _too_many(max_images)
    try:
        texts = Base64Images.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise MalformedBody(f'{where}: {first["msg"]}; send {{"images": ["<base64>", …]}}') from error
    if not texts:
        raise NoImages("`images` is empty; name at least one picture")
    return [from_base64(text) for text in texts]


def from_base64(text: str) -> bytes | InvalidBase64:
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            return InvalidBase64("a data URI must read data:<type>;base64,<data>")
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except ValueError as error:
        return InvalidBase64(f"the picture isn't base64: {error}; send the file's bytes in base64 or as a data URI")


def _not_empty(body: bytes) -> bytes:
    if not body:
        raise NoImages(f"the body is empty; send {FORMS}")
    return body


def _malformed(reason: str) -> MalformedBody:
    return MalformedBody(f"the multipart body can't be read: {reason}; send each picture as a part named `file`")


def _too_many(limit: int) -> TooManyImages:
    detail = f"more than {limit} pictures in one request; the limit is {limit}: send several requests"
    return TooManyImages(detail, limit=limit)
