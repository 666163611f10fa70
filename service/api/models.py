"""The models: list, describe, promote or roll back, delete."""

import json

import anyio
from fastapi import APIRouter, Response

from service import errors
from service.api import problems
from service.api.dependencies import RegistryDep
from service.api.schemas import Active, Model, Models, VersionDetail, VersionSummary
from service.inference.registry import Entry, Line, Registry
from training.bundle import store

router = APIRouter(prefix="/models")


@router.get("")
async def list_models(registry: RegistryDep) -> Models:
    """Every model, with every version that was found and its state."""
    models = [_model(registry, name, line) for name, line in sorted(registry.lines.items())]
    return Models(models=models, unreadable=registry.unreadable)


@router.get("/{model}", responses=problems.document(errors.ModelNotFound, store.NameInvalid))
async def get_model(model: str, registry: RegistryDep) -> Model:
    """One model; a version that can't be served has the reason."""
    await registry.look_for(model, None)
    return _model(registry, model, registry.line(model))


@router.get(
    "/{model}/versions/{version}",
    responses=problems.document(errors.ModelNotFound, errors.VersionNotFound, store.NameInvalid),
)
async def get_version(model: str, version: str, registry: RegistryDep) -> VersionDetail:
    """One version's manifest and report; also of one that was refused, as far as they can be read."""
    await registry.look_for(model, version)
    line = registry.line(model)
    entry = registry.found(model, version)
    path = anyio.Path(entry.ref.path(registry.artifacts)) / "report" / "metrics.json"
    try:
        report = json.loads(await path.read_bytes())
    except (OSError, ValueError):
        report = None  # a version without a readable report can still be looked at
    if not isinstance(report, dict):
        report = None
    return VersionDetail(**_summary(line, entry).model_dump(), manifest=entry.manifest, report=report)


@router.put(
    "/{model}/active",
    responses=problems.document(
        errors.ModelNotFound,
        errors.VersionNotFound,
        store.NameInvalid,
        errors.VersionRefused,
        store.ArtifactsUnwritable,
    ),
)
async def activate(model: str, body: Active, registry: RegistryDep) -> Model:
    """Promote a version, or roll back to one: it is loaded and verified first, and no request is lost."""
    await registry.activate(model, body.version)
    return _model(registry, model, registry.line(model))


@router.delete(
    "/{model}/versions/{version}",
    status_code=204,
    responses=problems.document(
        errors.ModelNotFound,
        errors.VersionNotFound,
        store.NameInvalid,
        errors.VersionActive,
        store.ArtifactsUnwritable,
    ),
)
async def delete_version(model: str, version: str, registry: RegistryDep) -> Response:
    """Delete a version for good; refused while it is active. Its number isn't given again."""
    await registry.delete(model, version)
    return Response(status_code=204)


def _model(registry: Registry, name: str, line: Line) -> Model:
    active = line.entries.get(line.active or "")
    return Model(
        name=name,
        active=line.active,
        default=name == registry.default_model,
        classes=list(active.manifest.classes) if active and active.manifest else [],
        versions=[_summary(line, entry) for entry in line.entries.values()],
    )


def _summary(line: Line, entry: Entry) -> VersionSummary:
    manifest = entry.manifest
    return VersionSummary(
        version=entry.ref.version,
        state=entry.state,
        reason=entry.reason,
        active=entry.ref.version == line.active,
        created_at=manifest.created_at if manifest else None,
        accuracy=manifest.metrics.accuracy if manifest else None,
        weights_sha256=manifest.weights_sha256 if manifest else None,
    )
