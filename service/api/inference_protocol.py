"""The Open Inference Protocol (/v2), as Triton's and KServe's clients speak it, on the same versions and queue.

Clients send no content type and take anything but 200 for an error: bodies are read by hand, and nothing answers 202 or
204.
"""

import asyncio
import gzip
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from service import errors
from service.api import health, problems, tensors
from service.api.asgi import header, read_body
from service.api.bodies import THREAD_FROM
from service.api.connection import while_connected
from service.api.dependencies import LifecycleDep, RegistryDep, SettingsDep
from service.api.predictions import provenance
from service.inference.registry import Entry, Line, Registry
from service.inference.sizes import size_within
from service.settings import Settings
from service.telemetry import figures
from training import __version__
from training.bundle.answers import Row
from training.bundle.manifest import Manifest

EXTENSIONS = ("binary_tensor_data", "classification", "statistics", "model_configuration", "model_repository")
HEAD_BYTES = "inference-header-content-length"
CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}
ENCODINGS = ("gzip", "deflate")
KEPT_HEADERS = 100  # most clients send the same Accept-Encoding again and again
COMPRESS_FROM = 500  # bytes of an answer
TENSORS_AT_ONCE = (
    1_000_000  # bytes that may be looked at on the event loop: a millisecond's work in FP32, none in UINT8
)
WRITTEN_AT_ONCE = 1_000  # values of an answer, pictures x classes, that may be written and packed on the event loop
GZIP_MEMBER, MOST_MEMBERS = b"\x1f\x8b\x08", 10_000  # how each begins; a million empty ones would take seconds
WEIGHT = re.compile(r"q=(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)")  # RFC 9110, 12.4.2

T = TypeVar("T", bound=BaseModel)

infer_router = APIRouter()
router = APIRouter()


# --- the server ---


@router.get("/v2")
@router.get("/v2/", include_in_schema=False)
async def server() -> dict[str, Any]:
    """Name, version, and the extensions of the protocol that are spoken here."""
    return {"name": "safelight", "version": __version__, "extensions": EXTENSIONS}


@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """This process answers."""
    return {"live": True}


@router.get("/v2/health/ready")
async def ready(registry: RegistryDep, lifecycle: LifecycleDep) -> dict[str, bool]:
    """At least one model can answer; else 503."""
    await health.ready(registry, lifecycle)
    return {"ready": True}


# --- the models ---


@router.get("/v2/models")
async def models(registry: RegistryDep) -> dict[str, list[str]]:
    """The names of all models."""
    return {"models": sorted(registry.lines)}


@router.get("/v2/models/stats")
async def all_statistics(registry: RegistryDep) -> dict[str, Any]:
    """What was counted of every version that ever answered."""
    entries = [entry for line in registry.lines.values() for entry in line.entries.values()]
    return {"model_stats": [_statistics(entry) for entry in entries if entry.manifest]}


@router.get("/v2/models/{model}/stats")
@router.get("/v2/models/{model}/versions/{version}/stats")
async def statistics(registry: RegistryDep, model: str, version: str | None = None) -> dict[str, Any]:
    """How many pictures, in how many batches, and where the time went, in nanoseconds; of all workers."""
    entries = registry.line(model).entries.values() if version is None else [registry.found(model, version)]
    return {"model_stats": [_statistics(entry) for entry in entries]}


@router.get("/v2/models/{model}")
@router.get("/v2/models/{model}/versions/{version}")
async def metadata(registry: RegistryDep, model: str, version: str | None = None) -> dict[str, Any]:
    """Versions, inputs and outputs. A request needs one of the two inputs."""
    manifest = await _manifest(registry, model, version)
    versions = [number for number, entry in registry.line(model).entries.items() if entry.state != "refused"]
    inputs, outputs = (
        [{"name": one.name, "datatype": one.datatype, "shape": [-1, *one.shape]} for one in described]
        for described in (tensors.inputs(manifest), tensors.outputs(manifest))
    )
    about = {"name": model, "versions": versions, "platform": "pytorch_torchscript"}
    return about | {"inputs": inputs, "outputs": outputs}


@router.get("/v2/models/{model}/config")
@router.get("/v2/models/{model}/versions/{version}/config")
async def config(
    registry: RegistryDep, settings: SettingsDep, model: str, version: str | None = None
) -> dict[str, Any]:
    """The model's configuration in Triton's words."""
    manifest = await _manifest(registry, model, version)
    inputs, outputs = (
        [{"name": one.name, "data_type": CONFIG_TYPES[one.datatype], "dims": one.shape} for one in described]
        for described in (tensors.inputs(manifest), tensors.outputs(manifest))
    )
    largest = size_within(registry.limits.max_batch)
    return {
        "name": model,
        "platform": "pytorch_torchscript",
        "backend": "pytorch",
        "max_batch_size": settings.max_images,
        "input": [one | {"optional": True} for one in inputs],
        "output": outputs,
        "dynamic_batching": {"preferred_batch_size": [largest], "max_queue_delay_microseconds": 0},
        "response_cache": {"enable": settings.cache_mb > 0},
    }


@router.get("/v2/models/{model}/ready")
@router.get("/v2/models/{model}/versions/{version}/ready")
async def model_ready(registry: RegistryDep, model: str, version: str | None = None) -> JSONResponse:
    """Whether a version would answer: 200, 503 with the reason, or 404."""
    try:
        entry = registry.entry(model, version)
        if entry.state == "unverified":
            raise errors.NotReady(f"{entry.ref} is still being verified; try again in a moment")
    except (errors.VersionRefused, errors.NothingActive, errors.NotReady, errors.ModelUnloaded) as error:
        return JSONResponse({"name": model, "ready": False, "error": str(error)}, 503)
    return JSONResponse({"name": model, "ready": True})


async def _manifest(registry: Registry, model: str, version: str | None) -> Manifest:
    entry = await registry.asked(model, version)
    return entry.manifest or (await registry.predictor(entry)).manifest


def _statistics(entry: Entry) -> dict[str, Any]:
    """From the metrics, so that there is one count of everything; what of it is counted where, as Triton has it.

    Refused tensors and a full queue are neither success nor failure. An answer from the cache has waited and succeeded,
    but not been computed; its share of what no stage took isn't told.
    """
    counted = figures(entry.ref.model, entry.ref.version)

    def duration(name: str, stage: str = "") -> dict[str, int]:
        count, seconds = (counted.get(f"safelight_{name}_{part}{stage}", 0.0) for part in ("count", "sum"))
        return {"count": int(count), "ns": round(seconds * 1e9)}

    stages = {stage: duration("stage_seconds", f":{stage}") for stage in ("total", "queue", "decode", "infer")}
    cache = {outcome: duration("cache_seconds", f":{outcome}") for outcome in ("hit", "miss")}
    parts = [stages["queue"], stages["decode"], stages["infer"], *cache.values()]
    rest = max(0, stages["total"]["ns"] - sum(part["ns"] for part in parts))
    succeeded, computed = stages["total"]["count"], stages["infer"]["count"]
    return {
        "name": entry.ref.model,
        "version": entry.ref.version,
        "last_inference": round(counted.get("safelight_last_batch_timestamp_seconds", 0.0) * 1000),
        "inference_count": int(counted.get("safelight_batch_size_sum", 0)),
        "execution_count": int(counted.get("safelight_batch_size_count", 0)),
        "inference_stats": {
            "success": stages["total"],
            "fail": duration("failed_seconds"),
            "queue": {"count": succeeded, "ns": stages["queue"]["ns"]},
            "compute_input": {"count": computed, "ns": stages["decode"]["ns"]},
            "compute_infer": stages["infer"],
            "compute_output": {"count": computed, "ns": rest * computed // max(1, succeeded)},
            "cache_hit": cache["hit"],
            "cache_miss": cache["miss"],
        },
        "batch_stats": [],
    }


# --- the repository ---


class _IndexRequest(BaseModel):
    ready: Annotated[tensors.Flag, tensors.null_is(False)] = False


class _RepositoryRequest(BaseModel):
    parameters: Annotated[dict[str, Any], tensors.null_is({})] = {}


@router.post("/v2/repository/index")
async def index(request: Request, registry: RegistryDep) -> list[dict[str, str]]:
    """Every version that was found and whether it can answer; with `{"ready": true}` only those that can."""
    asked = _read(_IndexRequest, await request.body())
    found = [_index_entry(line, entry) for _, line in sorted(registry.lines.items()) for entry in line.entries.values()]
    return [about for about in found if about["state"] == "READY" or not asked.ready]


@router.post("/v2/repository/models/{model}/load", responses=problems.document(errors.ModelNotFound))
async def load(request: Request, registry: RegistryDep, model: str) -> dict[str, str]:
    """Let a model answer that was unloaded, as its folder says; returns once it does."""
    asked = _read(_RepositoryRequest, await request.body())
    if asked.parameters:
        raise errors.NotImplementedHere(
            "a model's files and configuration can't be sent here: publish a version (safelight train, POST /train)"
        )
    await registry.load(model)
    return {}


@router.post("/v2/repository/models/{model}/unload", responses=problems.document(errors.ModelNotFound))
async def unload(request: Request, registry: RegistryDep, model: str) -> dict[str, str]:
    """Let a model answer no more and take no memory, until it is loaded again; what was admitted is answered."""
    _read(_RepositoryRequest, await request.body())
    await registry.unload(model)
    return {}


def _index_entry(line: Line, entry: Entry) -> dict[str, str]:
    state, reason = "READY", ""
    if line.unloaded:
        state, reason = "UNAVAILABLE", "unloaded"
    elif entry.state == "refused":
        state, reason = "UNAVAILABLE", entry.reason or ""
    elif entry.state == "unverified":
        state = "LOADING"
    return {"name": entry.ref.model, "version": entry.ref.version, "state": state, "reason": reason}


def _read(kind: type[T], body: bytes) -> T:
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise errors.MalformedBody(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from error


# --- inference ---

_INFER_BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": tensors.Question.model_json_schema(ref_template="#/components/schemas/{model}")},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


@infer_router.post("/v2/models/{model}/infer")
@infer_router.post("/v2/models/{model}/versions/{version}/infer")
async def infer(request: Request) -> Response:
    """Classify `pixels`, UINT8 [N, C, H, W], or `pictures`, BYTES [N]: in JSON, or as raw tensors behind it."""
    settings: Settings = request.state.settings
    registry: Registry = request.state.registry
    path = request.path_params
    deadline = asyncio.get_running_loop().time() + settings.deadline_seconds
    entry = await registry.asked(path["model"], path.get("version"), deadline)
    request.state.log |= {"model": entry.ref.model, "version": entry.ref.version}
    if entry.predictor:
        entry.predictor.check_room(deadline)
    body = await _body(request, settings.max_body_bytes)
    return await while_connected(request, _infer(request, registry, entry, body, settings))


async def _infer(request: Request, registry: Registry, entry: Entry, body: bytes, settings: Settings) -> Response:
    begun = asyncio.get_running_loop().time()
    predictor = await registry.predictor(entry, begun + settings.deadline_seconds)
    manifest = predictor.manifest
    head_bytes = _head_bytes(request)
    asked = body, head_bytes, manifest.input, settings.max_images
    is_long = (len(body) if head_bytes is None else head_bytes) > THREAD_FROM or len(body) > TENSORS_AT_ONCE
    question, pictures = await asyncio.to_thread(tensors.read, *asked) if is_long else tensors.read(*asked)
    request.state.log["images"] = len(pictures)
    seconds = min(settings.deadline_seconds, question.timeout_seconds or settings.deadline_seconds)
    computed = await predictor.compute(pictures, begun + seconds, whole=True)  # there is no place for one's own error
    encoding = accepted(header(request.scope, b"accept-encoding") or "")
    headers = provenance(request, manifest, computed.seconds)
    answered = question, manifest, computed.rows(), encoding, headers
    is_long = len(pictures) * len(manifest.classes) > WRITTEN_AT_ONCE
    return await asyncio.to_thread(_reply, *answered) if is_long else _reply(*answered)


def _head_bytes(request: Request) -> int | None:
    value = header(request.scope, HEAD_BYTES.encode())
    if value is None:
        return None
    if not (value.isascii() and value.isdigit()):
        raise errors.MalformedBody(f"Inference-Header-Content-Length must be a whole number, not {value[:40]!r}")
    return int(value[:20])


async def _body(request: Request, max_bytes: int) -> bytes:
    """The whole body, unpacked. Raises BodyTooLarge, MalformedBody, UnsupportedBody."""
    body = await read_body(request.receive)
    encoding = (header(request.scope, b"content-encoding") or "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ENCODINGS:
        raise errors.UnsupportedBody(f"content encoding {encoding[:40]} isn't read here; send gzip, deflate or none")
    return await asyncio.to_thread(_unpack, body, encoding, max_bytes)


def _unpack(body: bytes, encoding: str, max_bytes: int) -> bytes:
    try:
        content = _gunzip(body, max_bytes + 1) if encoding == "gzip" else _inflate(body, max_bytes + 1)
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise errors.MalformedBody(f"the body isn't {encoding}, or not all of it: {error}") from error
    if len(content) > max_bytes:
        raise errors.BodyTooLarge(
            f"the body has more than {max_bytes} bytes once it is unpacked; the limit is {max_bytes} "
            "(SAFELIGHT_MAX_BODY_BYTES): send fewer or smaller pictures",
            limit=max_bytes,
        )
    return content


def _gunzip(body: bytes, most: int) -> bytes:
    """The first bytes of all members, which may follow each other (RFC 1952)."""
    if body.count(GZIP_MEMBER) > MOST_MEMBERS:
        raise errors.MalformedBody(f"the gzip body has more than {MOST_MEMBERS} members; pack it as one")
    return gzip.GzipFile(fileobj=BytesIO(body)).read(most)


def _inflate(body: bytes, most: int) -> bytes:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(body, most)
    if len(content) < most and (not unpacker.eof or unpacker.unused_data):
        raise EOFError("it ends early, or something follows it")
    return content


@lru_cache(KEPT_HEADERS)
def accepted(offer: str) -> str | None:
    """Which of ours an Accept-Encoding prefers (RFC 9110, 12.5.3); None: neither."""
    weights = {}
    for offered in offer.lower().split(","):
        name, _, weight = (word.strip() for word in offered.partition(";"))
        weights[name] = _weight(weight)

    def weight_of(name: str) -> float:
        return weights.get(name, weights.get("*", 0.0))

    best = max(ENCODINGS, key=weight_of)
    return best if weight_of(best) > 0 and weight_of(best) >= weights.get("identity", 0.0) else None


def _weight(text: str) -> float:
    """One where nothing is said, none where it can't be read."""
    if not text:
        return 1.0
    found = WEIGHT.fullmatch(text)
    return float(found[1]) if found else 0.0


def _reply(
    question: tensors.Question, manifest: Manifest, rows: Sequence[Row], encoding: str | None, headers: dict[str, str]
) -> Response:
    message = tensors.write(question, manifest, rows)
    headers = headers | {"Vary": "Accept-Encoding"}
    body = message.body
    if encoding and len(body) >= COMPRESS_FROM:
        headers["Content-Encoding"] = encoding
        body = gzip.compress(body, 1, mtime=0) if encoding == "gzip" else zlib.compress(body, 1)
    if message.head_bytes is None:
        return Response(body, media_type="application/json", headers=headers)
    headers[HEAD_BYTES] = str(message.head_bytes)
    return Response(body, media_type="application/octet-stream", headers=headers)
