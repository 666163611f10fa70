"""The data sets: receive and check, list, describe, delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service import errors
from service.api import problems, uploads
from service.api.connection import while_connected
from service.api.dependencies import DatasetsDep, RegistryDep, SettingsDep
from service.api.schemas import BuiltInDataset, Dataset, Datasets, DatasetSummary
from service.inference.registry import Registry
from service.jobs.datasets import DatasetRecord
from training.bundle import store

router = APIRouter(prefix="/datasets")

_ARCHIVE = {"schema": {"type": "string", "format": "binary"}}
_BODY = {
    "required": True,
    "content": {
        "application/zip": _ARCHIVE,
        "application/x-tar": _ARCHIVE,
        "application/octet-stream": _ARCHIVE,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "dataset": _ARCHIVE["schema"],
                    "model": {"type": "string"},
                    "version": {"type": "string"},
                },
                "additionalProperties": {"type": "array", "items": _ARCHIVE["schema"]},
            }
        },
        "application/json": {"schema": BuiltInDataset.model_json_schema()},
    },
}


_KNOWN: dict[int | str, dict[str, Any]] = {200: {"model": Dataset, "description": "these pictures were there already"}}


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": _BODY},
    responses=_KNOWN
    | problems.document(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.VersionRefused,
        store.NameInvalid,
        errors.BodyTooLarge,
        errors.TooManyImages,
        errors.UnsupportedBody,
        errors.MalformedBody,
        errors.DatasetRefused,
        errors.QueueFull,
        errors.CheckFailed,
        errors.StateUnwritable,
        errors.DeadlineExceeded,
        errors.DiskFull,
    ),
)
async def add_dataset(
    request: Request,
    response: Response,
    registry: RegistryDep,
    datasets: DatasetsDep,
    settings: SettingsDep,
    model: Annotated[str | None, Query(description="the model that the pictures are meant for")] = None,
    version: Annotated[str | None, Query(description="the active version if left out")] = None,
    name: Annotated[str | None, Query(description="what to call it; the archive's name if left out")] = None,
) -> Dataset:
    """Receive a data set and check every picture: a zip or tar, a form with one or with labelled pictures, or JSON.

    The answer is what was found. 201 for a new data set, 200 where the same pictures are there already.
    """
    base = await _base(registry, model, version)  # before a gigabyte is read for a model that doesn't exist
    async with datasets.uploading() as upload:
        said = await uploads.receive(request, upload)
        if isinstance(said, BuiltInDataset):
            upload.name_built_in(said.builtin, said.limit, settings.data)
        base = await _base(registry, said.model, said.version) or base
        record = await while_connected(request, datasets.check(upload, model=base, name=name or said.name))
    request.state.log |= {"dataset": record.id, "images": record.report.images}
    response.status_code = 201 if record.is_new else 200
    response.headers["Location"] = f"/datasets/{record.id}"
    return _dataset(record)


@router.get("", responses=problems.document(errors.StateUnwritable))
async def list_datasets(datasets: DatasetsDep) -> Datasets:
    """Every data set, newest first."""
    return Datasets(datasets=[_summary(record) for record in await datasets.list()])


@router.get("/{dataset}", responses=problems.document(errors.DatasetNotFound))
async def get_dataset(dataset: str, datasets: DatasetsDep) -> Dataset:
    """One data set, with what was found in it."""
    return _dataset(await datasets.get(dataset))


@router.delete(
    "/{dataset}",
    status_code=204,
    responses=problems.document(errors.DatasetNotFound, errors.DatasetInUse, errors.StateUnwritable),
)
async def delete_dataset(dataset: str, datasets: DatasetsDep) -> Response:
    """Delete a data set for good; refused while a job uses it."""
    await datasets.delete(dataset)
    return Response(status_code=204)


async def _base(registry: Registry, model: str | None, version: str | None) -> str | None:
    return None if model is None and version is None else str((await registry.asked(model, version)).ref)


def _dataset(record: DatasetRecord) -> Dataset:
    return Dataset(**record.report.model_dump(), created_at=record.created_at)


def _summary(record: DatasetRecord) -> DatasetSummary:
    report = record.report
    return DatasetSummary(
        id=report.id,
        name=report.name,
        created_at=record.created_at,
        images=report.images,
        bytes=report.bytes,
        divided=report.divided,
        classes=[one.name for one in report.classes],
    )
