"""A request to fine-tune, from its body to an order: read, checked at the door, and settled in full."""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from service.api.bodies import media_type
from service.api.connection import while_connected
from service.api.schemas import TrainRequest, TrainSettings
from service.api.uploads import read_json, receive_form
from service.errors import DatasetNotFound, KeyInvalid, UnsupportedBody
from service.inference.registry import Registry
from service.jobs.datasets import DatasetStore, Upload
from service.jobs.job import Builtin, Job, Order, Pictures
from service.jobs.store import JobStore
from service.settings import Settings
from training.bundle import store
from training.bundle.classes import BUILT_IN, settled
from training.bundle.tuning import Tuning

Body = TypeVar("Body", bound=BaseModel)

KEY = re.compile(r'"?([\x21\x23-\x7e]{1,255})"?')  # with or without the quotes that the draft standard asks for
BESIDE_CHECKS = timedelta(minutes=1)  # what else there is to do takes milliseconds, on a machine that isn't swamped


@dataclass(frozen=True)
class Asked:
    """What a request says; a form may hold pictures in place of a data set that is here already."""

    settings: TrainSettings
    dataset: Pictures | Upload

    def fingerprint(self) -> str:
        """Equal for requests that ask for the same."""
        said = json.dumps(self.settings.model_dump(mode="json"), sort_keys=True)
        sent = self.dataset.sha256 if isinstance(self.dataset, Upload) else ""
        return hashlib.sha256(f"{said}\n{sent}".encode()).hexdigest()


@asynccontextmanager
async def read(request: Request, datasets: DatasetStore) -> AsyncIterator[Asked]:
    """A form's pictures are on disk as long as this lasts.

    Raises UnsupportedBody, MalformedBody, RequestValidationError, what DatasetStore.uploading raises, and BodyTooLarge
    while the body streams in.
    """
    kind = media_type(request)
    if kind == "application/json":
        asked = checked(TrainRequest, await read_json(request, "pictures come as the file `dataset` of a form"))
        yield Asked(asked, asked.dataset)
    elif kind == "multipart/form-data":
        async with datasets.uploading() as upload:
            yield _from_form(await receive_form(request, upload), upload)
    else:
        forms = "application/json, or multipart/form-data with the archive as its part `dataset`"
        raise UnsupportedBody(f"content type {kind or 'none'} isn't read here; send {forms}")


def _from_form(text: dict[str, str], upload: Upload) -> Asked:
    values: dict[str, object] = dict(text)
    if "recipe" in text:
        with suppress(ValueError):  # what isn't JSON isn't a dictionary either, and is refused as that
            values["recipe"] = json.loads(text["recipe"])
    if upload.begun:
        return Asked(checked(TrainSettings, values), upload)
    asked = checked(TrainRequest, values)
    return Asked(asked, asked.dataset)


def checked(kind: type[Body], content: bytes | dict[str, object]) -> Body:
    try:
        return kind.model_validate(content) if isinstance(content, dict) else kind.model_validate_json(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise RequestValidationError([item | {"loc": ("body", *item["loc"])} for item in found]) from error


def key_of(given: str | None) -> str | None:
    """An Idempotency-Key without its quotes. Raises KeyInvalid."""
    if given is None:
        return None
    if match := KEY.fullmatch(given):
        return match[1]
    raise KeyInvalid("an Idempotency-Key is 1 to 255 visible ASCII characters, in double quotes or not")


async def place(
    request: Request,
    asked: Asked,
    key: str | None,
    registry: Registry,
    settings: Settings,
    datasets: DatasetStore,
    jobs: JobStore,
) -> dict[str, Any]:
    """Queue a job: its JSON. A request that comes again with its key gets what it got first."""
    if key and (answered := await asyncio.to_thread(jobs.claim, key, asked.fingerprint(), _longest(settings))):
        return answered
    try:
        order = await settle(request, asked, registry, datasets, settings)
        job = await asyncio.to_thread(_queue, order, key, settings, datasets, jobs)
    except BaseException:
        if key:
            await asyncio.to_thread(jobs.release, key)
        raise
    return job.model_dump(mode="json")


def _queue(order: Order, key: str | None, settings: Settings, datasets: DatasetStore, jobs: JobStore) -> Job:
    """Its data set stays until the job that needs it is there. Raises DatasetNotFound, JobsFull."""
    with datasets.holding(order.dataset) if isinstance(order.dataset, str) else nullcontext():
        return jobs.create(order, queue_size=settings.queued_jobs, key=key)


def _longest(settings: Settings) -> timedelta:
    """That it may take to answer a request whose body is here: all the checks before its own, and its own."""
    rounds = math.ceil(settings.dataset_uploads / settings.dataset_checks)
    return timedelta(seconds=rounds * settings.dataset_seconds) + BESIDE_CHECKS


async def settle(
    request: Request, asked: Asked, registry: Registry, datasets: DatasetStore, settings: Settings
) -> Order:
    """Name the base's version, and take in the data. Raises what is wrong with any of it, the quick checks first, and
    ClientGone where nobody waits for the check of the pictures any more."""
    wanted = asked.settings
    base = await registry.asked(wanted.model, wanted.version)
    name = wanted.model if wanted.name is None else wanted.name
    store.check_model_name(name)
    store.check_writable(settings.artifacts, name)
    tuning = Tuning.parse(wanted.recipe)
    dataset, classes = await _data(request, asked.dataset, str(base.ref), datasets, settings)
    if base.manifest:
        namesakes = [
            manifest.classes for manifest in await asyncio.to_thread(store.namesakes, settings.artifacts, name)
        ]
        settled(name, base.manifest.classes, classes, keep=tuning.keep_classes, namesakes=namesakes)
    return Order(
        model=base.ref.model,
        version=base.ref.version,
        name=name,
        dataset=dataset,
        seed=wanted.seed,
        promote=wanted.promote,
        recipe=wanted.recipe,
        metadata=wanted.metadata,
    )


async def _data(
    request: Request, dataset: Pictures | Upload, base: str, datasets: DatasetStore, settings: Settings
) -> tuple[Pictures, Sequence[str]]:
    """The data set as a job names it, and its classes."""
    if isinstance(dataset, Builtin):
        if settings.data is None:
            name = dataset.builtin
            raise DatasetNotFound(f"{name} isn't on this machine; set SAFELIGHT_DATA to the folder that holds it")
        return dataset, BUILT_IN[dataset.builtin]
    if isinstance(dataset, Upload):
        record = await while_connected(request, datasets.check(dataset, model=base))
    else:
        record = await datasets.get(dataset)
    return record.id, record.classes
