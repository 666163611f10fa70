"""A request's body to pictures, in its three forms: multipart, a raw image, JSON with base64."""

import asyncio
import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.api.schemas import Base64Images
from service.errors import InvalidBase64, MalformedBody, NoImages, ServiceError, TooManyImages, UnsupportedBody
from service.inference.predictor import Picture

THREAD_FROM = 100_000  # bytes of JSON; less is read faster than a thread is found for it

FORMS = "multipart/form-data with `file` parts, a raw image (image/* or application/octet-stream), or application/json"


async def read_pictures(request: Request, max_images: int) -> list[Picture]:
    """The pictures of a request, undecoded; base64 that isn't one stands as its error in its place.

    Raises NoImages, TooManyImages, MalformedBody, UnsupportedBody, and BodyTooLarge while the body streams in.
    """
    kind = media_type(request)
    if kind == "multipart/form-data":
        return await _from_multipart(request, max_images)
    if kind == "application/json":
        body = await request.body()
        if len(body) < THREAD_FROM:
            return _from_json(body, max_images)
        return await asyncio.to_thread(_from_json, body, max_images)
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        return [_not_empty(await request.body())]
    hint = " (with curl --data-binary, add -H 'Content-Type: image/png')" if "urlencoded" in kind else ""
    raise UnsupportedBody(f"content type {kind} isn't read here{hint}; send {FORMS}")


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _from_multipart(request: Request, max_images: int) -> list[Picture]:
    hint = "send each picture as a part named `file`"
    async with form(request, max_images, hint=hint, too_many=_too_many(max_images)) as parts:
        return [await upload.read() for upload in _uploads(parts)]


@asynccontextmanager
async def form(request: Request, max_files: int, *, hint: str, too_many: ServiceError) -> AsyncIterator[FormData]:
    """The parts of a multipart body, their files closed in the end. Raises MalformedBody, and `too_many` of them."""
    try:
        parts = await _MultiPart(request, max_files).parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many from error
        raise MalformedBody(f"the multipart body can't be read: {error.message}; {hint}") from error
    except UnicodeError as error:  # of a charset that no text is in, as `undefined`
        raise MalformedBody(f"the multipart body can't be read: its charset holds no text; {hint}") from error
    try:
        yield parts
    finally:
        await parts.close()


class _MultiPart(MultiPartParser):
    """Starlette's, which takes a body without its end for a whole one, and leaves out the part that was cut off."""

    def __init__(self, request: Request, max_files: int) -> None:
        super().__init__(request.headers, self._to_its_end(request), max_files=max_files, max_fields=100)
        self._ended = False

    def on_end(self) -> None:
        self._ended = True

    async def _to_its_end(self, request: Request) -> AsyncGenerator[bytes, None]:
        async for chunk in request.stream():
            yield chunk
        if not self._ended:
            raise MultiPartException("its closing boundary is missing")


def _uploads(form: FormData) -> list[UploadFile]:
    uploads = [part for part in form.getlist("file") if isinstance(part, UploadFile)]
    if not uploads:
        found = ", ".join(sorted({ascii(name) for name in form})) or "none"
        raise NoImages(f"no part named `file` holds a file (parts found: {found}); with curl: -F file=@picture.png")
    return uploads


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
    return [_from_base64(text) for text in texts]


def _from_base64(text: str) -> Picture:
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


def _too_many(limit: int) -> TooManyImages:
    detail = f"more than {limit} pictures in one request; the limit is {limit}: send several requests"
    return TooManyImages(detail, limit=limit)
