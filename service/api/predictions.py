"""POST /predict: body in, one call, answer out."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from service import errors
from service.api import problems
from service.api.bodies import read_pictures
from service.api.connection import while_connected
from service.api.dependencies import RegistryDep, SettingsDep
from service.api.schemas import Base64Images, FailedPrediction, Prediction, Predictions, Problem
from service.inference.predictor import Answered, Picture
from service.inference.registry import Entry, Registry
from training import SafelightError
from training.bundle import images, store
from training.bundle.manifest import Manifest

router = APIRouter()

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


@router.post(
    "/predict",
    openapi_extra={"requestBody": _BODY},
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
async def predict(
    request: Request,
    registry: RegistryDep,
    settings: SettingsDep,
    model: Annotated[str | None, Query(description="the default model if left out")] = None,
    version: Annotated[str | None, Query(description="the active version if left out")] = None,
    top_k: Annotated[int | None, Query(description="how many classes to name; 5 or all of them if left out")] = None,
    x_deadline_ms: Annotated[int | None, Header(ge=1, description="answer within this time or not at all")] = None,
) -> Response:
    """Classify one picture or many: multipart `file` parts, a raw image body, or JSON with base64.

    In a request of many, a picture that fails has `error` in its place and the status is 200; a request whose only
    picture fails gets that problem's own status.
    """
    pictures = await read_pictures(request, settings.max_images)
    allowed = settings.deadline_seconds
    seconds = min(allowed, x_deadline_ms / 1000) if x_deadline_ms else allowed
    deadline = asyncio.get_running_loop().time() + seconds
    entry = registry.entry(model, version)
    request.state.log |= {"model": entry.ref.model, "version": entry.ref.version, "images": len(pictures)}
    manifest, answered = await while_connected(request, _answer(registry, entry, pictures, top_k, deadline))
    return _reply(request, manifest, answered)


async def _answer(
    registry: Registry, entry: Entry, pictures: Sequence[Picture], top_k: int | None, deadline: float
) -> tuple[Manifest, Answered]:
    try:
        async with asyncio.timeout_at(deadline):
            predictor = await registry.predictor(entry)
    except TimeoutError:
        raise errors.DeadlineExceeded("the deadline passed in the load stage", stage="load") from None
    manifest = predictor.manifest
    best = min(5, len(manifest.classes)) if top_k is None else top_k
    return manifest, await predictor.predict(pictures, best, deadline)


def _reply(request: Request, manifest: Manifest, answered: Answered) -> Response:
    """The answer in JSON, with its timings and the weights' digest beside it."""
    outcomes, request_id = answered.outcomes, request.state.request_id
    timing = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in answered.seconds.items())
    request.state.log["timing"] = timing
    if len(outcomes) == 1 and isinstance(outcomes[0], SafelightError):
        raise outcomes[0]
    content = Predictions(
        model=manifest.model,
        version=manifest.version,
        predictions=[
            FailedPrediction(error=Problem(**problems.of(outcome, request_id)))
            if isinstance(outcome, SafelightError)
            else Prediction.of(outcome)
            for outcome in outcomes
        ],
    )
    headers = {"Server-Timing": timing, "X-Weights-SHA256": manifest.weights_sha256}
    return Response(content.model_dump_json(), media_type="application/json", headers=headers)
