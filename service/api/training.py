"""Fine-tuning jobs: start one, watch it, pause, resume or cancel it."""

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from service import errors
from service.api import orders, problems, server_sent
from service.api.dependencies import DatasetsDep, JobsDep, LifecycleDep, RegistryDep, RunnerDep, SettingsDep
from service.api.schemas import Events, Jobs, TrainRequest
from service.jobs import history
from service.jobs.child import LOG
from service.jobs.job import ID, TERMINAL, Job, Status
from service.jobs.runner import CURVE
from training.bundle import store
from training.bundle.classes import NameTaken
from training.bundle.tuning import TuningInvalid

router = APIRouter(prefix="/train")

LOOK_AGAIN_SECONDS = "1"

_JSON = TrainRequest.model_json_schema(ref_template="#/components/schemas/{model}")
del _JSON["$defs"]  # they stand among the components, for jobs have them too
_PARTS = {name: {"type": "string"} for name in TrainRequest.model_fields}
_FORM = {
    "type": "object",
    "required": ["dataset", "model"],
    "properties": _PARTS | {"dataset": {"type": "string", "format": "binary"}},
}
_BODY = {"application/json": {"schema": _JSON}, "multipart/form-data": {"schema": _FORM}}


@router.post(
    "",
    status_code=202,
    response_model=Job,
    openapi_extra={"requestBody": {"required": True, "content": _BODY}},
    responses=problems.document(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.VersionRefused,
        store.NameInvalid,
        store.ArtifactsUnwritable,
        NameTaken,
        TuningInvalid,
        errors.DatasetNotFound,
        errors.BodyTooLarge,
        errors.UnsupportedBody,
        errors.MalformedBody,
        errors.JobsFull,
        errors.KeyInvalid,
        errors.KeyReused,
        errors.KeyInUse,
        errors.NotReady,
        errors.DatabaseUnavailable,
    ),
)
async def train(
    request: Request,
    registry: RegistryDep,
    settings: SettingsDep,
    datasets: DatasetsDep,
    jobs: JobsDep,
    runner: RunnerDep,
    idempotency_key: Annotated[str | None, Header(description="a repeated request gets the first answer")] = None,
) -> Response:
    """Start a fine-tuning job: JSON that names a data set, or a form that holds the archive itself."""
    key = orders.key_of(idempotency_key)
    async with orders.read(request, datasets) as asked:
        job = await orders.place(request, asked, key, registry, settings, datasets, jobs)
    runner.wake()
    request.state.log["job"] = job["id"]
    return JSONResponse(job, 202, {"Location": f"/train/{job['id']}", "Retry-After": LOOK_AGAIN_SECONDS})


@router.get("", responses=problems.document(errors.DatabaseUnavailable))
async def list_jobs(
    jobs: JobsDep,
    status: Annotated[Status | None, Query(description="only those in this state")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=ID, description="only those that are older than this one")] = None,
) -> Jobs:
    """The jobs, newest first, page by page."""
    page, more = await asyncio.to_thread(jobs.page, limit=limit, after=after, status=status)
    return Jobs(jobs=page, has_more=more)


_ABOUT_ONE = problems.document(errors.JobNotFound, errors.DatabaseUnavailable)


@router.get("/{job_id}", responses=_ABOUT_ONE)
async def get_job(job_id: str, jobs: JobsDep) -> Job:
    """One job: its state, its progress, and what came of it."""
    return await asyncio.to_thread(jobs.get, job_id)


_ABOUT_FILES = problems.document(errors.JobNotFound, errors.JobFileNotFound, errors.DatabaseUnavailable)


@router.get(
    "/{job_id}/events",
    response_model=Events,
    responses=_ABOUT_FILES | {200: {"content": {server_sent.MEDIA_TYPE: {}}}},
)
async def get_events(
    request: Request,
    job_id: str,
    jobs: JobsDep,
    runner: RunnerDep,
    lifecycle: LifecycleDep,
    after: Annotated[int, Query(ge=0, description="only those that came after the one with this id")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="of JSON; a stream goes on to the job's end")] = 100,
    last_event_id: Annotated[int | None, Header(ge=0, description="the same as `after`, for streams")] = None,
) -> Response:
    """What the run has told, as JSON; with `Accept: text/event-stream`, as it comes."""
    job = await asyncio.to_thread(jobs.get, job_id)
    path = runner.folder_of(job) / history.EVENTS
    if server_sent.MEDIA_TYPE not in request.headers.get("accept", ""):
        found, more = await asyncio.to_thread(history.page, path, after=after, limit=limit)
        return JSONResponse({"events": found, "has_more": more})
    tail = history.Tail(path)
    await asyncio.to_thread(tail.read, after if last_event_id is None else last_event_id)
    if last_event_id is not None and job.status in TERMINAL and await asyncio.to_thread(tail.at_end):
        return Response(status_code=204)  # a browser that had it all asks again, until it is told so
    return StreamingResponse(
        server_sent.stream(jobs, job_id, tail, lifecycle),
        media_type=server_sent.MEDIA_TYPE,
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


@router.get("/{job_id}/log", response_class=PlainTextResponse, responses=_ABOUT_FILES)
async def get_log(job_id: str, jobs: JobsDep, runner: RunnerDep) -> Response:
    """What the job's processes have printed, as text."""
    job = await asyncio.to_thread(jobs.get, job_id)
    content = await asyncio.to_thread(_content, runner.folder_of(job) / LOG)
    return PlainTextResponse(content or b"")


@router.get("/{job_id}/curve.png", response_class=Response, responses=_ABOUT_FILES)
async def get_curve(job_id: str, jobs: JobsDep, runner: RunnerDep) -> Response:
    """The learning curve so far, as a picture."""
    job = await asyncio.to_thread(jobs.get, job_id)
    content = await asyncio.to_thread(_content, runner.folder_of(job) / CURVE)
    if content is None:
        until_now = ": only training beyond a head draws one" if job.status in TERMINAL else " yet"
        raise errors.JobFileNotFound(f"{job_id} is {job.status} and has no learning curve{until_now}")
    return Response(content, media_type="image/png")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


_ASKED = problems.document(errors.JobNotFound, errors.JobStateConflict, errors.DatabaseUnavailable)


@router.post("/{job_id}/cancel", responses=_ASKED)
async def cancel(job_id: str, jobs: JobsDep, runner: RunnerDep) -> Job:
    """End a job for good; one that runs ends at its next step."""
    job = await asyncio.to_thread(jobs.cancel, job_id)
    runner.wake()
    return job


@router.post("/{job_id}/pause", responses=_ASKED)
async def pause(job_id: str, jobs: JobsDep, runner: RunnerDep) -> Job:
    """Hold a job; one that runs waits where it is, and makes room for others."""
    job = await asyncio.to_thread(jobs.pause, job_id)
    runner.wake()
    return job


@router.post("/{job_id}/resume", responses=_ASKED)
async def resume(job_id: str, jobs: JobsDep, runner: RunnerDep) -> Job:
    """Put a paused job back into the queue; it goes on from where it was."""
    job = await asyncio.to_thread(jobs.resume, job_id)
    runner.wake()
    return job
