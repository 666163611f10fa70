"""POST /predict: body in, one call, answer out."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.types import Scope

from service import errors
from service.api import problems
from service.api.asgi import header
from service.api.bodies import read_pictures
from service.api.connection import while_connected
from service.api.schemas import Base64Images, Predictions
from service.inference.predictor import Answered, Picture
from service.inference.registry import Entry, Registry
from service.settings import Settings
from training import SafelightError
from training.bundle import images, store
from training.bundle.answers import Answer
from training.bundle.manifest import Manifest

router = APIRouter()

KEPT_QUESTIONS = 100  # most clients ask the same thing again and again of other pictures

_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {"file": {"type": "array", "items": _PICTURE["schema"]}},
            }
        },
        "image/*": _PICTURE,
        "application/octet-stream": _PICTURE,
        "application/json": {"schema": Base64Images.model_json_schema()},
    },
}


class Question(BaseModel, frozen=True):
    """What may be said beside the pictures."""

    model: str | None = Field(None, description="the default model if left out")
    version: str | None = Field(None, description="the active version if left out")
    top_k: int | None = Field(None, description="how many classes to name; 5 or all of them if left out")
    deadline_ms: int | None = Field(None, ge=1, description="answer within this time or not at all")

    def seconds(self, allowed: float) -> float:
        """Within which it wants its answer."""
        return min(allowed * 1000, self.deadline_ms) / 1000 if self.deadline_ms else allowed


_PLACES = {  # where each of them stands
    "model": ("query", "model"),
    "version": ("query", "version"),
    "top_k": ("query", "top_k"),
    "deadline_ms": ("header", "x-deadline-ms"),
}
_SCHEMAS = Question.model_json_schema()["properties"]
_PARAMETERS = [
    {"in": place, "name": name, "required": False, "description": schema.pop("description"), "schema": schema}
    for (place, name), schema in zip(_PLACES.values(), _SCHEMAS.values(), strict=True)
]


@router.post(
    "/predict",
    openapi_extra={"requestBody": _BODY, "parameters": _PARAMETERS},
    response_model=Predictions,
    responses=problems.document(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.VersionRefused,
        errors.NothingActive,
        store.NameInvalid,
        errors.TopKOutOfRange,
        errors.NoImages,
        errors.TooManyImages,
        errors.BodyTooLarge,
        errors.UnsupportedBody,
        errors.MalformedBody,
        errors.InvalidBase64,
        images.NotAnImage,
        images.ImageTooLarge,
        images.ImageCorrupt,
        errors.QueueFull,
        errors.DeadlineExceeded,
        errors.InferenceFailed,
        errors.NotReady,
    ),
)
async def predict(request: Request) -> Response:
    """Classify one picture or many: multipart `file` parts, a raw image body, or JSON with base64.

    In a request of many, a picture that fails has `error` in its place and the status is 200; a request whose only
    picture fails gets that problem's own status.
    """
    question = read_question(request.scope)
    state = request.state
    settings: Settings = state.settings
    registry: Registry = state.registry
    clock = asyncio.get_running_loop().time
    seconds = question.seconds(settings.deadline_seconds)
    entry = await registry.asked(question.model, question.version, clock() + seconds)
    state.log.update(model=entry.ref.model, version=entry.ref.version)
    if entry.predictor:
        entry.predictor.check_room(clock() + seconds)
    pictures = await read_pictures(request, settings.max_images)
    deadline = clock() + seconds
    state.log["images"] = len(pictures)
    manifest, answered = await while_connected(request, answer(registry, entry, pictures, question.top_k, deadline))
    return _reply(request, manifest, answered)


def read_question(scope: Scope) -> Question:
    """Raises RequestValidationError."""
    return _question(scope["query_string"], header(scope, b"x-deadline-ms"))


@lru_cache(KEPT_QUESTIONS)
def _question(query: bytes, deadline_ms: str | None) -> Question:
    """What FastAPI would read in ten times the time. Raises RequestValidationError."""
    asked = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    try:
        return Question.model_validate(asked | {"deadline_ms": deadline_ms})
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([item | {"loc": _PLACES[str(item["loc"][0])]} for item in found]) from error


async def answer(
    registry: Registry, entry: Entry, pictures: Sequence[Picture], top_k: int | None, deadline: float
) -> tuple[Manifest, Answered]:
    """The `top_k` best classes of each picture, or 5 where that is None. Raises what the two calls raise."""
    predictor = await registry.predictor(entry, deadline)
    manifest = predictor.manifest
    best = min(5, len(manifest.classes)) if top_k is None else top_k
    return manifest, await predictor.predict(pictures, best, deadline)


def _reply(request: Request, manifest: Manifest, answered: Answered) -> Response:
    """The answer in JSON."""
    outcomes = answered.outcomes
    headers = provenance(request, manifest, answered.seconds)
    if len(outcomes) == 1 and isinstance(outcomes[0], SafelightError):
        raise outcomes[0]
    content = {
        "model": manifest.model,
        "version": manifest.version,
        "predictions": [prediction(outcome, request.state.request_id) for outcome in outcomes],
    }
    return Response(to_json(content), media_type="application/json", headers=headers)


def provenance(request: Request, manifest: Manifest, seconds: dict[str, float]) -> dict[str, str]:
    """What the reply of every prediction says of it: how long each stage took, as its log line does, and which weights
    answered."""
    timing = ", ".join(f"{stage};dur={taken * 1000:.2f}" for stage, taken in seconds.items())
    request.state.log["timing"] = timing
    return {"Server-Timing": timing, "X-Weights-SHA256": manifest.weights_sha256}


def prediction(outcome: Answer | SafelightError, request_id: str) -> dict[str, Any]:
    """One picture's entry, as `Predictions` has it; not by way of it, for that takes longer than the picture."""
    if isinstance(outcome, SafelightError):
        return {"error": problems.of(outcome, request_id)}
    return outcome.best | {"scores": outcome.scores, "in_distribution": outcome.in_distribution}
