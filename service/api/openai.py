"""OpenAI's way to upload files and to fine-tune, over the same data sets and jobs: what the `openai` SDK calls.

Their objects, and ours made into them, are in `openai_objects`; errors get their shape in `problems`.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial
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
    event_line,
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
Answer = TypeVar("Answer")
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
    return _page(_behind(files, after), limit)


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
    asked = orders.Asked(wanted, wanted.dataset)
    job = await orders.place(request, asked, key, registry, settings, datasets, jobs)
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
    return FineTuningJob.of(await _ask(jobs.get, job_id))


# The SDK sends these three without a body, and calls it JSON: no parameter of theirs may be one.


@router.post("/fine_tuning/jobs/{job_id}/cancel")
async def cancel(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """End a job for good."""
    job = await _ask(jobs.cancel, job_id)
    runner.wake()
    return FineTuningJob.of(job)


@router.post("/fine_tuning/jobs/{job_id}/pause")
async def pause(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """Stop a job at its next step."""
    job = await _ask(jobs.pause, job_id)
    runner.wake()
    return FineTuningJob.of(job)


@router.post("/fine_tuning/jobs/{job_id}/resume")
async def resume(job_id: str, jobs: JobsDep, runner: RunnerDep) -> FineTuningJob:
    """Let a paused job go on."""
    job = await _ask(jobs.resume, job_id)
    runner.wake()
    return FineTuningJob.of(job)


@router.get("/fine_tuning/jobs/{job_id}/events")
async def list_events(
    job_id: str, jobs: JobsDep, runner: RunnerDep, limit: Limit = 20, after: After = None
) -> Page[JobEvent]:
    """What the run has told, newest first."""
    return await _ask(partial(_events, jobs, runner, after, limit), job_id)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: str, jobs: JobsDep, runner: RunnerDep, limit: Limit = 10, after: After = None
) -> Page[Checkpoint]:
    """The versions that the job has published."""
    return _page(_behind(await _ask(partial(_checkpoints, jobs, runner), job_id), after), limit)


def _events(jobs: JobStore, runner: Runner, after: str | None, limit: int, job_id: str) -> Page[JobEvent]:
    job = jobs.get(job_id)
    path = runner.folder_of(job) / history.EVENTS
    if after is None:
        told = history.newest(path, limit + 1)
    else:
        line = event_line(after, job.id)
        told = history.newest(path, limit + 2, line)
        if not told or told.pop(0)[0] != line:
            raise _not_there()
    return _page([JobEvent.of(job, number, event) for number, event in told], limit)


def _checkpoints(jobs: JobStore, runner: Runner, job_id: str) -> list[Checkpoint]:
    job = jobs.get(job_id)
    told = history.parse(history.Tail(runner.folder_of(job) / history.EVENTS).read())
    return Checkpoint.all_of(job, told)[::-1]


# --- what all of them need ---


def _page(items: Sequence[Value], limit: int) -> Page[Value]:
    """The first of them."""
    found = list(items[:limit])
    ends = {"first_id": found[0].id, "last_id": found[-1].id} if found else {}
    return Page(data=found, has_more=len(items) > limit, **ends)


def _behind(items: Sequence[Value], after: str | None) -> Sequence[Value]:
    """Those that follow the one with this id."""
    if after is None:
        return items
    ids = [item.id for item in items]
    if after not in ids:
        raise _not_there()
    return items[ids.index(after) + 1 :]


async def _dataset(datasets: DatasetStore, file_id: str, param: str) -> DatasetRecord:
    """Raises DatasetNotFound in the client's words."""
    try:
        return await datasets.get(dataset_id(file_id) or "")
    except DatasetNotFound as error:
        message = f"there is no file {file_id[:80]!r}; GET /v1/files lists those that there are"
        raise DatasetNotFound(message, param=param) from error


async def _ask(what: Callable[[str], Answer], job_id: str) -> Answer:
    """Ask something of a job, by its id here. Raises JobNotFound in the client's words."""
    try:
        return await asyncio.to_thread(what, _own_id(job_id))
    except errors.JobNotFound as error:
        raise _no_job(job_id) from error


def _own_id(job_id: str) -> str:
    if found := own_job_id(job_id):
        return found
    raise _no_job(job_id)


def _no_job(job_id: str) -> errors.JobNotFound:
    return errors.JobNotFound(f"there is no job {job_id[:80]!r}; GET /v1/fine_tuning/jobs lists those that there are")


def _not_there() -> RequestValidationError:
    return _invalid("after", "nothing in the list has this id")


def _invalid(parameter: str, message: str) -> RequestValidationError:
    wrong: dict[str, Any] = {"loc": ("body", parameter), "msg": message, "type": "value_error"}
    return RequestValidationError([wrong])
