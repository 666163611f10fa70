"""Errors to replies: one table gives each a status, a stable code and a title; one body for all, RFC 9457."""

import math
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service import errors
from service.telemetry import ERRORS
from training import SafelightError
from training.bundle import images, store

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class Kind:
    status: int
    code: str
    title: str


PROBLEMS: dict[type[SafelightError], Kind] = {
    store.NameInvalid: Kind(422, "invalid_name", "Not a possible name"),
    errors.ModelNotFound: Kind(404, "model_not_found", "No such model"),
    errors.VersionNotFound: Kind(404, "version_not_found", "No such version"),
    errors.VersionRefused: Kind(409, "version_refused", "The version failed its verification"),
    errors.VersionActive: Kind(409, "version_active", "The version is active"),
    errors.ArtifactsUnwritable: Kind(503, "artifacts_unwritable", "The artifacts folder can't be changed"),
    errors.TopKOutOfRange: Kind(422, "top_k_out_of_range", "top_k is out of range"),
    errors.NoImages: Kind(400, "no_images", "No picture in the request"),
    errors.TooManyImages: Kind(413, "too_many_images", "Too many pictures in one request"),
    errors.BodyTooLarge: Kind(413, "body_too_large", "The request body is too large"),
    errors.UnsupportedBody: Kind(415, "unsupported_media_type", "The content type isn't read here"),
    errors.MalformedBody: Kind(400, "malformed_body", "The body isn't what its content type says"),
    errors.InvalidBase64: Kind(400, "invalid_base64", "The picture isn't base64"),
    images.NotAnImage: Kind(400, "not_an_image", "Not an image"),
    images.ImageTooLarge: Kind(413, "image_too_large", "The image has too many pixels"),
    images.ImageCorrupt: Kind(400, "image_corrupt", "The image is damaged"),
    errors.QueueFull: Kind(429, "queue_full", "The queue is full"),
    errors.DeadlineExceeded: Kind(504, "deadline_exceeded", "Not answered in time"),
    errors.InferenceFailed: Kind(500, "inference_failed", "The model failed"),
    errors.ClientGone: Kind(499, "client_gone", "The client went away"),
    errors.NotReady: Kind(503, "not_ready", "Not ready"),
    errors.DatasetNotFound: Kind(404, "dataset_not_found", "No such data set"),
    errors.DatasetInUse: Kind(409, "dataset_in_use", "A job uses the data set"),
    errors.DatasetRefused: Kind(422, "dataset_refused", "The data set can't be used"),
    errors.CheckFailed: Kind(500, "check_failed", "The data set couldn't be checked"),
    errors.DiskFull: Kind(507, "disk_full", "The disk is full"),
    errors.StateUnwritable: Kind(503, "state_unwritable", "The state folder can't be written"),
}

INTERNAL = Kind(500, "internal_error", "Something went wrong here")
INVALID_PARAMETER = Kind(422, "invalid_parameter", "A parameter has a value that it can't have")
HTTP = {
    404: Kind(404, "not_found", "No such path"),
    405: Kind(405, "method_not_allowed", "The path doesn't take this method"),
}


def kind_of(error: SafelightError) -> Kind:
    """The nearest entry of the table, along the error's ancestry."""
    return next((PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS), INTERNAL)


def body(kind: Kind, detail: str, request_id: str, /, **facts: object) -> dict[str, Any]:
    """The one shape of an error, for a whole reply or for one picture's place in `predictions`."""
    ERRORS.labels(kind.code).inc()
    fixed = {"type": f"urn:safelight:problem:{kind.code}", "title": kind.title, "status": kind.status}
    return fixed | {"detail": detail, "code": kind.code, "request_id": request_id} | facts


def of(error: SafelightError, request_id: str) -> dict[str, Any]:
    return body(kind_of(error), str(error), request_id, **error.facts)


def reply(
    request: Request, kind: Kind, detail: str, headers: dict[str, str] | None = None, /, **facts: object
) -> JSONResponse:
    """A problem as the whole reply; its code goes into the request's log line."""
    request.state.log["code"] = kind.code
    return JSONResponse(body(kind, detail, request.state.request_id, **facts), kind.status, headers, MEDIA_TYPE)


# --- handlers, for FastAPI to call ---


async def on_safelight_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, SafelightError)
    headers = {}
    if isinstance(error, errors.QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, errors.BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not read
    return reply(request, kind_of(error), str(error), headers, **error.facts)


async def on_invalid_parameter(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [{"parameter": ".".join(map(str, item["loc"])), "detail": item["msg"]} for item in error.errors()]
    detail = "; ".join(f"{item['parameter']}: {item['detail']}" for item in found)
    return reply(request, INVALID_PARAMETER, detail, errors=found)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, SafelightError):  # met while FastAPI itself read a body, which makes it a 400
        return await on_safelight_error(request, error.__cause__)
    kind = HTTP.get(error.status_code, Kind(error.status_code, "http_error", "The request can't be answered"))
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return reply(request, kind, detail, dict(error.headers or {}))


# --- for the API's documentation ---


def document(*kinds: type[SafelightError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of an endpoint: the problems that it can answer with, by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for kind in (PROBLEMS[error] for error in kinds):
        codes = by_status.setdefault(kind.status, {"description": "", "content": {MEDIA_TYPE: {"schema": _SCHEMA}}})
        codes["description"] += f"{', ' if codes['description'] else ''}`{kind.code}`: {kind.title}"
    return by_status


_SCHEMA = {"$ref": "#/components/schemas/Problem"}
