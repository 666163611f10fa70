"""The Python client, sync and async: the HTTP API as methods.

    with Client() as safelight:
        for prediction in safelight.predict(Path("digit.png"), model="mnist").predictions:
            print(prediction.label, prediction.probability)

A method's calls are described once, below; the two clients only differ in how they send them.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Self, TypeVar

import httpx
from pydantic import BaseModel

from service.api.schemas import (
    Dataset,
    Datasets,
    DatasetSummary,
    Events,
    Health,
    Info,
    Jobs,
    Model,
    Models,
    Predictions,
    Problem,
    VersionDetail,
)
from service.jobs.job import TERMINAL, Job, Promote, Status

URL = "http://127.0.0.1:8000"
TIMEOUT = 30.0  # seconds; the service itself gives up after 10
UPLOAD_TIMEOUT = 600.0  # an archive is checked picture by picture before it is answered
POLL_SECONDS = 0.5  # between looks at a job that is waited for

CHECK_TIMEOUT = 660.0  # a data set's answer comes when every picture is checked; the service gives that 600

Picture = bytes | Path
Reply = TypeVar("Reply", bound=BaseModel)


class ProblemError(Exception):
    """The service refused or failed; `problem` is its reply, `retry_after` the seconds that it asks to wait."""

    def __init__(self, problem: Problem, retry_after: float | None) -> None:
        super().__init__(f"{problem.code}: {problem.detail}")
        self.problem = problem
        self.retry_after = retry_after


class _Nothing(BaseModel):
    """The reply to what only has to succeed."""


@dataclass(frozen=True)
class _Call(Generic[Reply]):
    reply: type[Reply]
    method: str
    path: str
    options: dict[str, Any] = field(default_factory=dict)


def _predict(
    pictures: Sequence[Picture], model: str | None, version: str | None, top_k: int | None
) -> _Call[Predictions]:
    parts = []
    for index, picture in enumerate(pictures):
        content = picture if isinstance(picture, bytes) else picture.read_bytes()
        parts.append(("file", (f"{index}", content, "application/octet-stream")))
    named = {"model": model, "version": version, "top_k": top_k}
    query = {key: value for key, value in named.items() if value is not None}
    return _Call(Predictions, "POST", "/predict", {"files": parts, "params": query})


def _models() -> _Call[Models]:
    return _Call(Models, "GET", "/models")


def _model(model: str) -> _Call[Model]:
    return _Call(Model, "GET", f"/models/{model}")


def _version(model: str, version: str) -> _Call[VersionDetail]:
    return _Call(VersionDetail, "GET", f"/models/{model}/versions/{version}")


def _activate(model: str, version: str) -> _Call[Model]:
    return _Call(Model, "PUT", f"/models/{model}/active", {"json": {"version": version}})


def _train(dataset: Picture | str | dict[str, Any], key: str | None, **wanted: Any) -> _Call[Job]:
    named = {name: value for name, value in wanted.items() if value is not None}
    options: dict[str, Any] = {"headers": {"Idempotency-Key": key} if key else {}}
    if isinstance(dataset, str | dict):
        return _Call(Job, "POST", "/train", options | {"json": named | {"dataset": dataset}})
    content = dataset if isinstance(dataset, bytes) else dataset.read_bytes()
    parts = {name: json.dumps(value) if name == "recipe" else str(value) for name, value in named.items()}
    files = {"dataset": ("dataset", content, "application/octet-stream")}
    return _Call(Job, "POST", "/train", options | {"data": parts, "files": files, "timeout": UPLOAD_TIMEOUT})


def _jobs(status: Status | None, limit: int, after: str | None) -> _Call[Jobs]:
    named = {"status": status, "limit": limit, "after": after}
    return _Call(Jobs, "GET", "/train", {"params": {key: value for key, value in named.items() if value is not None}})


def _job(job: str) -> _Call[Job]:
    return _Call(Job, "GET", f"/train/{job}")


def _events(job: str, after: int, limit: int) -> _Call[Events]:
    return _Call(Events, "GET", f"/train/{job}/events", {"params": {"after": after, "limit": limit}})


def _ask(job: str, what: str) -> _Call[Job]:
    return _Call(Job, "POST", f"/train/{job}/{what}")


def _add_dataset(archive: IO[bytes], model: str | None, version: str | None) -> _Call[Dataset]:
    query = {key: value for key, value in {"model": model, "version": version}.items() if value is not None}
    files = {"dataset": (Path(archive.name).name, archive, "application/octet-stream")}  # read as it is sent
    return _Call(Dataset, "POST", "/datasets", {"files": files, "params": query, "timeout": CHECK_TIMEOUT})


def _built_in_dataset(name: str, limit: int | None, model: str | None, version: str | None) -> _Call[Dataset]:
    body = {"builtin": name, "limit": limit, "model": model, "version": version}
    return _Call(Dataset, "POST", "/datasets", {"json": body, "timeout": CHECK_TIMEOUT})


def _datasets() -> _Call[Datasets]:
    return _Call(Datasets, "GET", "/datasets")


def _dataset(dataset: str) -> _Call[Dataset]:
    return _Call(Dataset, "GET", f"/datasets/{dataset}")


def _delete_dataset(dataset: str) -> _Call[_Nothing]:
    return _Call(_Nothing, "DELETE", f"/datasets/{dataset}")


def _info() -> _Call[Info]:
    return _Call(Info, "GET", "/info")


def _ready() -> _Call[Health]:
    return _Call(Health, "GET", "/health/ready")


def _read(call: _Call[Reply], response: httpx.Response) -> Reply:
    if response.is_success:
        return call.reply.model_validate_json(response.content or b"{}")
    if not response.headers.get("content-type", "").startswith("application/problem+json"):
        response.raise_for_status()  # not ours: a proxy's answer
    wait = response.headers.get("retry-after")
    raise ProblemError(Problem.model_validate_json(response.content), float(wait) if wait else None)


def _check_patience(job: Job, end: float | None) -> None:
    if end is not None and time.monotonic() > end:
        raise TimeoutError(f"{job.id} is still {job.status}")


class Client:
    """Raises ProblemError for what the service refuses, and httpx.HTTPError where it can't be reached."""

    def __init__(self, url: str = URL, *, timeout: float = TIMEOUT) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, call: _Call[Reply]) -> Reply:
        return _read(call, self._http.request(call.method, call.path, **call.options))

    def predict(
        self, *pictures: Picture, model: str | None = None, version: str | None = None, top_k: int | None = None
    ) -> Predictions:
        """Classify pictures, given as bytes or as paths; one entry each, in order."""
        return self._send(_predict(pictures, model, version, top_k))

    def models(self) -> list[Model]:
        return self._send(_models()).models

    def model(self, model: str) -> Model:
        return self._send(_model(model))

    def version(self, model: str, version: str) -> VersionDetail:
        return self._send(_version(model, version))

    def activate(self, model: str, version: str) -> Model:
        """Promote a version, or roll back to one."""
        return self._send(_activate(model, version))

    def train(
        self,
        dataset: Picture | str | dict[str, Any],
        *,
        model: str,
        version: str | None = None,
        name: str | None = None,
        recipe: dict[str, Any] | None = None,
        seed: int | None = None,
        promote: Promote | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Start a job, on an archive (bytes or a path), an uploaded set's id, or {"builtin": …, "limit": …}."""
        wanted = {"version": version, "name": name, "recipe": recipe, "seed": seed, "promote": promote}
        return self._send(_train(dataset, idempotency_key, model=model, **wanted))

    def jobs(self, *, status: Status | None = None, limit: int = 20, after: str | None = None) -> list[Job]:
        """Newest first; with `after` set to the last one's id, the next page."""
        return self._send(_jobs(status, limit, after)).jobs

    def job(self, job: str) -> Job:
        return self._send(_job(job))

    def events(self, job: str, *, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """What a run has told since the event with the id `after`."""
        return self._send(_events(job, after, limit)).events

    def cancel(self, job: str) -> Job:
        return self._send(_ask(job, "cancel"))

    def pause(self, job: str) -> Job:
        return self._send(_ask(job, "pause"))

    def resume(self, job: str) -> Job:
        return self._send(_ask(job, "resume"))

    def wait(self, job: str, *, timeout: float | None = None) -> Job:
        """Return once a job is over. Raises TimeoutError where that takes more than `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (found := self.job(job)).status not in TERMINAL:
            _check_patience(found, end)
            time.sleep(POLL_SECONDS)
        return found

    def add_dataset(self, archive: Path, *, model: str | None = None, version: str | None = None) -> Dataset:
        """Upload a zip or tar of class folders, meant for a model; the answer is what was found in it."""
        with archive.open("rb") as file:
            return self._send(_add_dataset(file, model, version))

    def add_built_in_dataset(
        self, name: str, *, limit: int | None = None, model: str | None = None, version: str | None = None
    ) -> Dataset:
        """Make a data set of mnist or cifar10, where the service has it."""
        return self._send(_built_in_dataset(name, limit, model, version))

    def datasets(self) -> list[DatasetSummary]:
        return self._send(_datasets()).datasets

    def dataset(self, dataset: str) -> Dataset:
        return self._send(_dataset(dataset))

    def delete_dataset(self, dataset: str) -> None:
        self._send(_delete_dataset(dataset))

    def info(self) -> Info:
        return self._send(_info())

    def ready(self) -> Health:
        return self._send(_ready())


class AsyncClient:
    """The same, to be awaited."""

    def __init__(self, url: str = URL, *, timeout: float = TIMEOUT) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, call: _Call[Reply]) -> Reply:
        return _read(call, await self._http.request(call.method, call.path, **call.options))

    async def predict(
        self, *pictures: Picture, model: str | None = None, version: str | None = None, top_k: int | None = None
    ) -> Predictions:
        """Classify pictures, given as bytes or as paths; one entry each, in order."""
        return await self._send(_predict(pictures, model, version, top_k))

    async def models(self) -> list[Model]:
        return (await self._send(_models())).models

    async def model(self, model: str) -> Model:
        return await self._send(_model(model))

    async def version(self, model: str, version: str) -> VersionDetail:
        return await self._send(_version(model, version))

    async def activate(self, model: str, version: str) -> Model:
        """Promote a version, or roll back to one."""
        return await self._send(_activate(model, version))

    async def train(
        self,
        dataset: Picture | str | dict[str, Any],
        *,
        model: str,
        version: str | None = None,
        name: str | None = None,
        recipe: dict[str, Any] | None = None,
        seed: int | None = None,
        promote: Promote | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Start a job, on an archive (bytes or a path), an uploaded set's id, or {"builtin": …, "limit": …}."""
        wanted = {"version": version, "name": name, "recipe": recipe, "seed": seed, "promote": promote}
        return await self._send(_train(dataset, idempotency_key, model=model, **wanted))

    async def jobs(self, *, status: Status | None = None, limit: int = 20, after: str | None = None) -> list[Job]:
        """Newest first; with `after` set to the last one's id, the next page."""
        return (await self._send(_jobs(status, limit, after))).jobs

    async def job(self, job: str) -> Job:
        return await self._send(_job(job))

    async def events(self, job: str, *, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """What a run has told since the event with the id `after`."""
        return (await self._send(_events(job, after, limit))).events

    async def cancel(self, job: str) -> Job:
        return await self._send(_ask(job, "cancel"))

    async def pause(self, job: str) -> Job:
        return await self._send(_ask(job, "pause"))

    async def resume(self, job: str) -> Job:
        return await self._send(_ask(job, "resume"))

    async def wait(self, job: str, *, timeout: float | None = None) -> Job:
        """Return once a job is over. Raises TimeoutError where that takes more than `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (found := await self.job(job)).status not in TERMINAL:
            _check_patience(found, end)
            await asyncio.sleep(POLL_SECONDS)
        return found

    async def add_dataset(self, archive: Path, *, model: str | None = None, version: str | None = None) -> Dataset:
        """Upload a zip or tar of class folders, meant for a model; the answer is what was found in it."""
        with archive.open("rb") as file:
            return await self._send(_add_dataset(file, model, version))

    async def add_built_in_dataset(
        self, name: str, *, limit: int | None = None, model: str | None = None, version: str | None = None
    ) -> Dataset:
        """Make a data set of mnist or cifar10, where the service has it."""
        return await self._send(_built_in_dataset(name, limit, model, version))

    async def datasets(self) -> list[DatasetSummary]:
        return (await self._send(_datasets())).datasets

    async def dataset(self, dataset: str) -> Dataset:
        return await self._send(_dataset(dataset))

    async def delete_dataset(self, dataset: str) -> None:
        await self._send(_delete_dataset(dataset))

    async def info(self) -> Info:
        return await self._send(_info())

    async def ready(self) -> Health:
        return await self._send(_ready())
