"""A request's body to a data set on disk: an archive as it is, or a form with an archive or labelled pictures.

A form is taken apart as it comes in: its files go to where the data set will be, not to the system's temporary folder.
"""

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from fastapi import Request
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.api.schemas import BuiltInDataset
from service.errors import BodyTooLarge, MalformedBody, UnsupportedBody
from service.jobs.datasets import Upload

ARCHIVES = ("zip", "x-zip-compressed", "x-tar", "gzip", "x-gzip", "x-gtar", "x-bzip2", "x-xz", "octet-stream")
FORMS = (
    "a zip or tar as it is (application/zip, application/x-tar, application/octet-stream), multipart/form-data with a "
    "file `dataset` or with pictures named by their class, or application/json"
)
CURL = "with curl: -F dataset=@pets.zip, or -F cat=@1.png -F dog=@2.png"
DATASET = "dataset"  # the form's file that is an archive; any other is a picture of the class that it is named by
TEXT_BYTES = 65_536  # of a form's text and of one part's headers, and of JSON


class Fields(BaseModel, extra="forbid"):
    """What may stand beside the files of a form."""

    model: str | None = None
    version: str | None = None
    name: str | None = None


async def receive(request: Request, upload: Upload) -> BuiltInDataset | Fields:
    """Write a request's files into the upload; what else it says is returned.

    Raises MalformedBody, BodyTooLarge, UnsupportedBody, and what Upload raises.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    kind, _, subtype = media_type.partition("/")
    if media_type == "application/json":
        return _from_json(await read_json(request, "it only names a built-in data set"))
    if media_type == "multipart/form-data":
        text = await receive_form(request, upload)
        if not upload.begun:
            raise _malformed(f"no part of it is a file; {CURL}")
        return _fields(text)
    if media_type == "" or (kind == "application" and subtype in ARCHIVES):
        await upload.begin_archive()
        async for chunk in request.stream():
            await upload.write(chunk)
        return Fields()
    hint = " (with curl --data-binary, add -H 'Content-Type: application/zip')" if "urlencoded" in media_type else ""
    raise UnsupportedBody(f"content type {media_type} isn't read here{hint}; send {FORMS}")


async def read_json(request: Request, remedy: str) -> bytes:
    """A body of JSON, where archives as large as a disk may come too. Raises BodyTooLarge as soon as it is."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > TEXT_BYTES:
            raise BodyTooLarge(
                f"the JSON has more than {TEXT_BYTES} bytes; the limit is {TEXT_BYTES}: {remedy}", limit=TEXT_BYTES
            )
    return body


def _from_json(body: bytes) -> BuiltInDataset:
    try:
        return BuiltInDataset.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error, 'send {"builtin": "cifar10", "limit": 2000}') from error


async def receive_form(
    request: Request, upload: Upload, *, archive: str = DATASET, labelled: bool = True
) -> dict[str, str]:
    """Write a form's files into the upload, and return its text.

    The file of the name `archive` is one; any other is a picture of the class that it is named by, if such may come.
    Raises MalformedBody, and what Upload raises.
    """
    form = _Form(request.headers.get("content-type", ""), archive, labelled)
    async for chunk in request.stream():
        for event in form.feed(chunk):
            if event.kind == "data":
                await upload.write(event.data)
            elif event.kind == "end":
                await upload.end()
            elif event.name == archive:
                await upload.begin_archive(event.filename)
            else:
                await upload.begin_picture(event.name, event.filename)
    return form.finish()


def _fields(text: dict[str, str]) -> Fields:
    try:
        return Fields.model_validate(text)
    except ValidationError as error:
        raise _invalid(error, "beside its files a form has the fields model, version and name") from error


def _invalid(error: ValidationError, remedy: str) -> MalformedBody:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"])) or "the body"
    return MalformedBody(f"{where}: {first['msg']}; {remedy}")


@dataclass(frozen=True)
class _Event:
    """Of a file."""

    kind: Literal["begin", "data", "end"]
    name: str = ""
    filename: str = ""
    data: bytes = b""


class _Form:
    """Takes a form apart: its files become events, its text is kept."""

    def __init__(self, content_type: str, archive: str, labelled: bool) -> None:
        """Raises MalformedBody."""
        self._archive, self._labelled = archive, labelled
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise _malformed("its content type names no boundary")
        events = (
            "part_begin",
            "header_field",
            "header_value",
            "header_end",
            "headers_finished",
            "part_data",
            "part_end",
        )
        try:
            self._parser = MultipartParser(
                boundary,
                {f"on_{event}": getattr(self, f"_on_{event}") for event in (*events, "end")},  # type: ignore[arg-type]
            )
        except FormParserError as error:
            raise _malformed(str(error)) from error
        self._events: list[_Event] = []
        self._archives = self._pictures = 0
        self._text: dict[str, bytes] = {}
        self._field = self._value = b""  # of the header that is being read
        self._disposition = b""
        self._name = ""
        self._is_file = self._ended = False
        self._held = 0  # bytes of text and headers, which are kept in memory

    def feed(self, chunk: bytes) -> list[_Event]:
        """Raises MalformedBody."""
        self._events = []
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(str(error)) from error
        return self._events

    def finish(self) -> dict[str, str]:
        """The form's text. Raises MalformedBody."""
        if not self._ended:
            raise _malformed("its closing boundary is missing")
        return {name: value.decode(errors="replace") for name, value in self._text.items()}

    def _on_part_begin(self) -> None:
        self._disposition = self._field = self._value = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._hold(end - start)
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._hold(end - start)
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise _malformed("a part of it has no name")
        self._name = options[b"name"].decode(errors="replace")
        self._is_file = b"filename" in options
        if not self._is_file:
            self._hold(len(self._name))
            self._text[self._name] = b""
            return
        filename = PurePath(options[b"filename"].decode(errors="replace").replace("\\", "/")).name
        self._count()
        self._events.append(_Event("begin", self._name, filename))
        self._held = 0  # a file's headers are done with

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._events.append(_Event("data", data=data[start:end]))
        else:
            self._hold(end - start)
            self._text[self._name] += data[start:end]

    def _on_part_end(self) -> None:
        if self._is_file:
            self._events.append(_Event("end"))

    def _on_end(self) -> None:
        self._ended = True

    def _count(self) -> None:
        if self._name == self._archive:
            self._archives += 1
        elif not self._labelled:
            raise _malformed(f"its only file may be the archive, as a part named `{self._archive}`")
        else:
            self._pictures += 1
            if not self._name.strip() or self._name.startswith(".") or re.search(r"[/\\]", self._name):
                raise _malformed(f"a picture's part is named by its class, and {self._name[:100]!r} can't be one")
        if self._archives > 1 or (self._archives and self._pictures):
            raise _malformed("it has several archives, or pictures beside one; send them one by one")

    def _hold(self, count: int) -> None:
        self._held += count
        if self._held > TEXT_BYTES:
            raise _malformed(f"its text has more than {TEXT_BYTES} bytes")


def _malformed(reason: str) -> MalformedBody:
    return MalformedBody(f"the multipart body can't be read: {reason}")
