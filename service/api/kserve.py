"""KServe's older protocol, for its clients: instances in, predictions out; and the list of models, as OpenAI's too."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from service import errors
from service.api import problems, tensors
from service.api.connection import while_connected
from service.api.dependencies import RegistryDep, SettingsDep
from service.api.predictions import answer, prediction, provenance
from service.api.tensors import PICTURES, PIXELS, Input, Question
from service.inference.predictor import Picture
from training.bundle.manifest import InputSpec

router = APIRouter(prefix="/v1/models")


class Instances(BaseModel):
    """Each a picture: `{"b64": "<base64>"}`, or its pixels [C, H, W]; all of one kind."""

    instances: list[Any] = Field(min_length=1)


@router.get("")
async def list_models(registry: RegistryDep) -> dict[str, Any]:
    """The models that answer, in OpenAI's words (`data`) and in KServe's (`models`)."""
    created = {
        name: line.entries[line.active].manifest
        for name, line in sorted(registry.lines.items())
        if line.active in line.entries
    }
    data = [
        {"id": name, "object": "model", "created": round(manifest.created_at.timestamp()), "owned_by": "safelight"}
        for name, manifest in created.items()
        if manifest
    ]
    return {"object": "list", "data": data, "models": [model["id"] for model in data]}


@router.get("/{model}")
async def get_model(registry: RegistryDep, model: str) -> dict[str, Any]:
    """One model, for both; 404, 409 or 503 where it doesn't answer."""
    manifest = (await registry.predictor(await registry.asked(model, None))).manifest
    about = {"id": model, "object": "model", "created": round(manifest.created_at.timestamp()), "owned_by": "safelight"}
    return about | {"name": model, "ready": True}


@router.post("/{model}:predict", openapi_extra={"requestBody": {"content": {"application/json": {"schema": {}}}}})
async def predict(
    request: Request, response: Response, registry: RegistryDep, settings: SettingsDep, model: str
) -> dict[str, Any]:
    """Classify `instances`: one prediction each, as `/predict` has them."""
    clock = asyncio.get_running_loop().time
    entry = await registry.asked(model, None, clock() + settings.deadline_seconds)
    request.state.log |= {"model": entry.ref.model, "version": entry.ref.version}
    if entry.predictor:
        entry.predictor.check_room(clock() + settings.deadline_seconds)
    body = await request.body()
    deadline = clock() + settings.deadline_seconds
    manifest = (await registry.predictor(entry, deadline)).manifest
    pictures = await asyncio.to_thread(_read, body, manifest.input, settings.max_images)
    request.state.log["images"] = len(pictures)
    _, answered = await while_connected(request, answer(registry, entry, pictures, None, deadline))
    response.headers.update(provenance(request, manifest, answered.seconds))
    return {"predictions": [prediction(outcome, request.state.request_id) for outcome in answered.outcomes]}


@router.post("/{model}:explain", responses=problems.document(errors.NotImplementedHere))
async def explain(model: str) -> None:
    """Not spoken here: 501."""
    raise errors.NotImplementedHere(f"{model} explains nothing here; :predict has its probabilities")


def _read(body: bytes, spec: InputSpec, max_images: int) -> list[Picture]:
    """As an input of the newer protocol. Raises MalformedBody, TensorInvalid, TooManyImages."""
    try:
        instances = Instances.model_validate_json(body).instances
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise errors.MalformedBody(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from error
    if isinstance(instances[0], dict):
        texts = [instance.get("b64") if isinstance(instance, dict) else None for instance in instances]
        tensor = Input(name=PICTURES, datatype="BYTES", shape=[len(instances)], data=texts)
    else:
        tensor = Input(name=PIXELS, datatype="UINT8", shape=[len(instances), *spec.shape], data=instances)
    return tensors.pictures_of(Question(inputs=[tensor]), b"", spec, max_images)
