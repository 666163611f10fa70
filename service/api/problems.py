"""Errors to replies: one table gives each a status, a stable code and a title.

One body for all, RFC 9457's; but under /v1, where OpenAI's clients ask, theirs, and under /v2 the Open Inference
Protocol's.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import Counter
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from service import errors
from service.telemetry import ERRORS
from training import SafelightError
from training.bundle import classes, images, store, tuning

MEDIA_TYPE = "application/problem+json"
OPENAI = "/v1/"
INFERENCE_PROTOCOL = "/v2"
OWN_ID = re.compile(r"\b(job|ds)-(?=[0-9a-f]{16})")
OPENAI_IDS = {"job": "ftjob-", "ds": "file-"}


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
    errors.ModelUnloaded: Kind(404, "model_unloaded", "The model is unloaded"),
    errors.NothingActive: Kind(409, "nothing_active", "No version is active"),
    errors.VersionActive: Kind(409, "version_active", "The version is active"),
    store.ArtifactsUnwritable: Kind(503, "artifacts_unwritable", "The artifacts folder can't be changed"),
    errors.TopKOutOfRange: Kind(422, "top_k_out_of_range", "top_k is out of range"),
    errors.NoImages: Kind(400, "no_images", "No picture in the request"),
    errors.TooManyImages: Kind(413, "too_many_images", "Too many pictures in one request"),
    errors.BodyTooLarge: Kind(413, "body_too_large", "The request body is too large"),
    errors.UnsupportedBody: Kind(415, "unsupported_media_type", "The content type isn't read here"),
    errors.MalformedBody: Kind(400, "malformed_body", "The body isn't what its content type says"),
    errors.TensorInvalid: Kind(400, "tensor_invalid", "Not a tensor that the model takes, or gives"),
    errors.NotImplementedHere: Kind(501, "not_implemented", "This part of the protocol isn't spoken here"),
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
    errors.JobNotFound: Kind(404, "job_not_found", "No such job"),
    errors.JobFileNotFound: Kind(404, "job_file_not_found", "The job has no such file here"),
    errors.JobStateConflict: Kind(409, "job_state_conflict", "Not possible in the state that the job is in"),
    errors.JobsFull: Kind(429, "jobs_full", "No more jobs may wait"),
    classes.NameTaken: Kind(409, "name_taken", "The name is that of a model with other classes"),
    errors.KeyInvalid: Kind(422, "idempotency_key_invalid", "Not a possible Idempotency-Key"),
    errors.KeyReused: Kind(422, "idempotency_key_reused", "The Idempotency-Key came with another request before"),
    errors.KeyInUse: Kind(409, "idempotency_key_in_use", "The first request with this key is still being answered"),
    errors.DatabaseUnavailable: Kind(503, "database_unavailable", "The database of jobs can't be reached"),
    tuning.TuningInvalid: Kind(422, "recipe_invalid", "Not a setting of fine-tuning, or out of its range"),
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


@cache  # to look for it takes as long as to write the reply
def _errors(code: str) -> Counter:
    return ERRORS.labels(code)


def body(kind: Kind, detail: str, request_id: str, /, **facts: object) -> dict[str, Any]:
    """The one shape of an error, for a whole reply or for one picture's place in `predictions`."""
    _errors(kind.code).inc()
    fixed = {"type": f"urn:safelight:problem:{kind.code}", "title": kind.title, "status": kind.status}
    return fixed | {"detail": detail, "code": kind.code, "request_id": request_id} | facts


def of(error: SafelightError, request_id: str) -> dict[str, Any]:
    return body(kind_of(error), str(error), request_id, **error.facts)


def reply(
    request: Request, kind: Kind, detail: str, headers: dict[str, str] | None = None, /, **facts: object
) -> Response:
    """A problem as the whole reply; its code goes into the request's log line."""
    request.state.log["code"] = kind.code
    path = request.scope["path"]
    if path.startswith(OPENAI):
        return _openai_reply(kind, detail, headers or {}, facts)
    if path.startswith(INFERENCE_PROTOCOL):
        _errors(kind.code).inc()
        return _json({"error": detail, "code": kind.code}, kind.status, headers)
    return _json(body(kind, detail, request.state.request_id, **facts), kind.status, headers, MEDIA_TYPE)


def _openai_reply(kind: Kind, detail: str, headers: dict[str, str], facts: dict[str, Any]) -> Response:
    """The same in OpenAI's shape; `param` is what was wrong, as far as it has a name."""
    _errors(kind.code).inc()
    if kind.status == 409 and "Retry-After" not in headers:
        headers = headers | {"X-Should-Retry": "false"}  # the client would try again twice, as with a lock
    named = [wrong["parameter"].partition(".")[2] for wrong in facts.get("errors", ())]
    param = named[0] if named else facts.get("param") or facts.get("setting")
    message = OWN_ID.sub(lambda match: OPENAI_IDS[match[1]], detail)
    error = {"message": message, "type": _openai_type(kind.status), "param": param or None, "code": kind.code}
    return _json({"error": error}, kind.status, headers)


def _json(
    content: object, status: int, headers: dict[str, str] | None, media_type: str = "application/json"
) -> Response:
    return Response(to_json(content), status, headers, media_type)


def _openai_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def refuse(request: Request, error: SafelightError) -> Response:
    """The reply to a request that ended with an error of ours."""
    headers = {}
    if isinstance(error, errors.QueueFull):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, errors.JobsFull | errors.KeyInUse | errors.DatabaseUnavailable):
        headers["Retry-After"] = "5"
    if isinstance(error, errors.BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not read
    return reply(request, kind_of(error), str(error), headers, **error.facts)


# --- handlers, for FastAPI to call ---


async def on_safelight_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SafelightError)
    return refuse(request, error)


async def on_invalid_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = [{"parameter": ".".join(map(str, item["loc"])), "detail": item["msg"]} for item in error.errors()]
    detail = "; ".join(f"{item['parameter']}: {item['detail']}" for item in found)
    return reply(request, INVALID_PARAMETER, detail, errors=found)


async def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, SafelightError):  # met while FastAPI itself read a body, which makes it a 400
        return refuse(request, error.__cause__)
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
