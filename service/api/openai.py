"""OpenAI's way to upload files and to fine-tune, over the same data sets and jobs: what the `openai` SDK calls.

Their objects, and ours made into them, are in `openai_objects`; errors get their shape in `problems`.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse

from service import errors
from service.api import orders
from service.api.connection import while_connected
from service.api.dependencies import DatasetsDep, JobsDep, RegistryDep, RunnerDep, SettingsDep
from service.api.openai_objects import (
    FINE_TUNE,
    Checkpoint,
    CreateJob,
    File,
    FileDeleted,
    FileFields,
    FineTuningJob,
    JobEvent,
    Page,
    dataset_id,
    own_job_id,
)
from service.api.schemas import TrainRequest
from service.api.uploads import receive_form
from service.errors import DatasetNotFound
from service.jobs import history
from service.jobs.datasets import DatasetRecord, DatasetStore
from service.jobs.job import Job
from service.jobs.runner import Runner
from service.jobs.store import JobStore

router = APIRouter(prefix="/v1")

Value = TypeVar("Value", File, JobEvent, Checkpoint)
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(description="the last one's id of the page before")]

METADATA = re.compile(r"metadata\[(.*)\]")


# --- files ---


@router.post("/files")
async def create_file(request: Request, datasets: DatasetsDep) -> File:
    """Upload an archive of class folders: it is checked, and refused here if it can't be trained on."""
    async with datasets.uploading() as upload:
        text = await receive_form(request, upload, archive="file", labelled=False)
        if not upload.begun:
            raise _invalid("file", "a file is required")
        orders.checked(FileFields, dict(text))
        record = await while_connected(request, datasets.check(upload))
    request.state.log["dataset"] = record.id
    return File.of(record)


@router.get("/files")
async def list_files(
    datasets: DatasetsDep,
    purpose: str = FINE_TUNE,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: After = None,
) -> Page[File]:
    """The uploaded archives, newest first."""
    records = await datasets.list() if purpose == FINE_TUNE else []
    files = sorted(map(File.of, records), key=lambda file: (file.created_at, file.id), reverse=order == "desc")
    return _page(files, after, limit)


@router.get("/files/{file_id}")
async def get_file(file_id: str, datasets: DatasetsDep) -> File:
    """One uploaded archive."""
    return File.of(await _dataset(datasets, file_id, "file_id"))


@router.get("/files/{file_id}/content", response_class=FileResponse)
async def get_content(file_id: str, datasets: DatasetsDep) -> FileResponse:
    """The archive, with the pictures that were accepted."""
    record = await _dataset(datasets, file_id, "file_id")
    return FileResponse(datasets.path(record.id), media_type="application/zip")


@router.delete("/files/{file_id}")
async def delete_file(file_id: str, datasets: DatasetsDep) -> FileDeleted:
    """Delete an archive; refused while a job uses it."""
    record = await _dataset(datasets, file_id, "file_id")
    await datasets.delete(record.id)
    return FileDeleted(id=file_id)


# --- jobs ---


@router.post("/fine_tuning/jobs")
async def create_job(
    request: Request,
    body: CreateJob,
    registry: RegistryDep,
    settings: SettingsDep,
    datasets: DatasetsDep,
    jobs: JobsDep,
    runner: RunnerDep,
    idempotency_key: Annotated[str | None, Header(description="a repeated request gets the first answer")] = None,
) -> FineTuningJob:
    """Start a fine-tuning job."""
    key = orders.key_of(idempotency_key)
    model, version = body.base
    record = await _dataset(datasets, body.training_file, "training_file")
    wanted = TrainRequest(
        model=model,
        version=version,
        name=body.name,
        dataset=record.id,
        recipe=body.tuning,
        seed=body.seed or 0,
        promote=body.promote,
        metadata=body.metadata or {},
    )
    job = await orders.place(orders.Asked(wanted, wanted.dataset), key, registry, settings, datasets, jobs)
    runner.wake()
    request.state.log["job"] = job["id"]
    return FineTuningJob.of(Job.model_validate(job))


@router.get("/fine_tuning/jobs")
async def list_jobs(request: Request, jobs: JobsDep, limit: Limit = 20, after: After = None) -> Page[FineTuningJob]:
    """The jobs, newest first; with `metadata[key]=value`, those that carry it."""
    wanted = {match[1]: value for name, value in request.query_params.items() if (match := METADATA.fullmatch(name))}
    before = None if after is None else _own_id(after)
    found, more = await asyncio.to_thread(_jobs_with, jobs, wanted, before, limit)
    data = [FineTuningJob.of(job) for job in found]
    return Page(data=data, has_more=more)


def _jobs_with(jobs: JobStore, wanted: dict[str, str], after: str | None, limit: int) -> tuple[list[Job], bool]:
    """The next jobs whose metadata has all of this, and whether there are more."""
    found: list[Job] = []
    more = True
    while more and len(found) <= limit:
        page, more = jobs.page(limit=100 if wanted else limit + 1, after=after)
        found += [job for job in page if wanted.items() <= job.metadata.items()]
        after = page[-1].id if page else after
    return found[:limit], len(found) > limit


@router.get("/fine_tuning/jobs/{job_id}")
async def get_job(job_id: str, jobs: JobsDep) -> FineTuningJob:
    """One job; `result` is what the gate found."""
    return FineTuningJob.of(await asyncio.to_thread(jobs.get, _own_id(job_id)))


# The SDK sends these three without a body, and calls it JSON: no parameter of theirs may be one.


@router.post("/fine_tuning/jobs/{job_id}/cancel")
async def cancel(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """End a job for good."""
    job = await asyncio.to_thread(jobs.cancel, _own_id(job_id))
    runner.wake()
    return FineTuningJob.of(job)


@router.post("/fine_tuning/jobs/{job_id}/pause")
async def pause(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """Stop a job at its next step."""
    job = await asyncio.to_thread(jobs.pause, _own_id(job_id))
    runner.wake()
    return FineTuningJob.of(job)


@router.post("/fine_tuning/jobs/{job_id}/resume")
async def resume(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """Let a paused job go on."""
    job = await asyncio.to_thread(jobs.resume, _own_id(job_id))
    runner.wake()
    return FineTuningJob.of(job)


@router.get("/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str, jobs: JobsDep, runner: RunnerDep, limit: Limit = 20, after: After = None
) -> Page[JobEvent]:
    """What the run has told, newest first."""
    job, told = await asyncio.to_thread(_told, jobs, runner, job_id)
    return _page([JobEvent.of(job, number, event) for number, event in reversed(told)], after, limit)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, jobs: JobsDep, runner: RunnerDep, limit: Limit = 10, after: After = None
) -> Page[Checkpoint]:
    """The versions that the job has published."""
    job, told = await asyncio.to_thread(_told, jobs, runner, job_id)
    return _page(Checkpoint.all_of(job, [event for _, event in told])[::-1], after, limit)


def _told(jobs: JobStore, runner: Runner, job_id: str) -> tuple[Job, list[history.Numbered]]:
    job = jobs.get(_own_id(job_id))
    return job, history.numbered(runner.folder_of(job) / history.EVENTS)


# --- what all of them need ---


def _page(items: Sequence[Value], after: str | None, limit: int) -> Page[Value]:
    """Those behind `after`."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise _invalid("after", "nothing in the list has this id")
    begin = 0 if after is None else ids.index(after) + 1
    found = list(items[begin : begin + limit])
    ends = {"first_id": found[0].id, "last_id": found[-1].id} if found else {}
    return Page(data=found, has_more=len(items) > begin + limit, **ends)


async def _dataset(datasets: DatasetStore, file_id: str, param: str) -> DatasetRecord:
    """Raises DatasetNotFound in the client's words."""
    try:
        return await datasets.get(dataset_id(file_id) or "")
    except DatasetNotFound as error:
        message = f"there is no file {file_id[:80]!r}; GET /v1/files lists those that there are"
        raise DatasetNotFound(message, param=param) from error


def _own_id(job_id: str) -> str:
    if found := own_job_id(job_id):
        return found
    raise errors.JobNotFound(f"there is no job {job_id[:80]!r}; GET /v1/fine_tuning/jobs lists those that there are")


def _invalid(parameter: str, message: str) -> RequestValidationError:
    wrong: dict[str, Any] = {"loc": ("body", parameter), "msg": message, "type": "value_error"}
    return RequestValidationError([wrong])
