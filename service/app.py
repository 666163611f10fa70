"""All wiring, in running order: settings → registry → data sets → jobs → routers → middleware."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from typing import Any, TypedDict

import torch
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from service import telemetry
from service.api import datasets, health, inference_protocol, kserve, models, openai, predictions, problems, training
from service.api.direct import Direct
from service.api.middleware import BodyLimit, Cap, Observe
from service.inference.registry import Limits, Registry
from service.jobs.datasets import DatasetStore
from service.jobs.datasets import Limits as DatasetLimits
from service.jobs.runner import Keeping, Machine, Runner
from service.jobs.store import JobStore, open_store
from service.lifecycle import Lifecycle, drain_on_sigterm, seldom_collected
from service.settings import Settings
from training import SafelightError, __version__
from training.devices import choose_device, each_of
from training.ram import memory

GRACE_SECONDS = 10.0  # a training process ends within two at its next step; more on a busy machine


class State(TypedDict):
    settings: Settings
    registry: Registry
    lifecycle: Lifecycle
    datasets: DatasetStore
    jobs: JobStore
    runner: Runner


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; uvicorn calls this in each worker, with settings from the environment."""
    settings = settings or Settings.read()
    telemetry.configure_logging(settings.log_level, settings.log_format)
    app = FastAPIOffline(
        title="Safelight",
        version=__version__,
        summary="Post an image, get a calibrated answer.",
        lifespan=resources(settings),
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours is in telemetry.py
    )
    app.include_router(predictions.router, tags=["predict"])
    app.include_router(inference_protocol.infer_router, tags=["v2"])
    app.include_router(models.router, tags=["models"])
    app.include_router(datasets.router, tags=["datasets"])
    app.include_router(training.router, tags=["train"])
    app.include_router(openai.router, tags=["openai"])
    app.include_router(inference_protocol.router, tags=["v2"])
    app.include_router(kserve.router, tags=["v1"])
    app.include_router(health.router, tags=["health"])
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)

    app.add_exception_handler(SafelightError, problems.on_safelight_error)
    app.add_exception_handler(RequestValidationError, problems.on_invalid_parameter)
    app.add_exception_handler(HTTPException, problems.on_http_exception)
    app.add_middleware(Direct, routes=[*predictions.router.routes, *inference_protocol.infer_router.routes])
    app.add_middleware(BodyLimit, **body_caps(settings))
    app.add_middleware(Observe)  # the last one added is the first to see a request
    return app


def resources(settings: Settings) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """What lives as long as the application: models, data sets, jobs, and the readiness that SIGTERM ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        limits = engine_limits(settings)
        torch.set_num_threads(limits.threads)
        lifecycle = Lifecycle()
        async with Registry.open(settings.artifacts, limits, settings.default_model) as registry:
            with closing(open_store(settings.state, settings.database_url)) as jobs:
                async with dataset_store(settings, jobs).open() as datasets:
                    runner = new_runner(settings, jobs, datasets, registry)
                    async with runner.working():
                        with seldom_collected(), drain_on_sigterm(lifecycle, settings.drain_seconds):
                            yield State(
                                settings=settings,
                                registry=registry,
                                lifecycle=lifecycle,
                                datasets=datasets,
                                jobs=jobs,
                                runner=runner,
                            )

    return lifespan


def engine_limits(settings: Settings) -> Limits:
    """What one worker may use. Raises DeviceUnavailable."""
    device = choose_device(settings.device)
    return Limits(
        device=device,
        threads=settings.threads_each,
        max_batch=settings.max_batch or (32 if device.type == "cpu" else 64),
        queue_size=settings.queue_size,
        max_pixels=settings.max_image_pixels,
        loaded_versions=settings.loaded_versions,
        rescan_seconds=settings.rescan_seconds,
        cache_bytes=settings.cache_mb * 1_000_000,
        precision=settings.precision,
    )


def new_runner(settings: Settings, jobs: JobStore, datasets: DatasetStore, registry: Registry) -> Runner:
    async def published(_: str, __: str) -> None:
        await registry.follow()

    devices = each_of(settings.device)
    slots = len(devices) if settings.concurrent_jobs is None else settings.concurrent_jobs
    machine = Machine(
        command=[sys.executable, "-m", "training"],
        artifacts=settings.artifacts.resolve(),
        data=settings.data.resolve() if settings.data else None,
        devices=devices,
        memory_bytes=settings.job_memory_bytes or memory_share(settings.device, slots),
        job_seconds=settings.job_seconds,
        grace_seconds=GRACE_SECONDS,
        hold_seconds=settings.hold_seconds,
    )
    return Runner(
        jobs,
        settings.state.resolve() / "jobs",
        machine,
        slots=slots,
        keeping=Keeping(checkpoints=settings.keep_checkpoints, jobs=settings.keep_jobs),
        dataset_path=datasets.path,
        published=published,
    )


def memory_share(device: str, jobs: int) -> int:
    """Bytes that one of so many jobs may take, so that serving has the rest; 0, no limit, beside a GPU's drivers.

    Raises DeviceUnavailable.
    """
    return memory() * 3 // 4 // max(1, jobs) if choose_device(device).type == "cpu" else 0


def dataset_store(settings: Settings, jobs: JobStore) -> DatasetStore:
    limits = DatasetLimits(
        uploads=settings.dataset_uploads,
        checks=settings.dataset_checks,
        seconds=settings.dataset_seconds,
        memory_bytes=settings.dataset_memory_bytes,
    )
    return DatasetStore(settings.state / "datasets", settings.artifacts, limits, in_use=jobs.uses)


def body_caps(settings: Settings) -> dict[str, Any]:
    """The largest body, and those of the paths that stream theirs to disk."""
    pictures = Cap(settings.max_body_bytes, "SAFELIGHT_MAX_BODY_BYTES", "send fewer or smaller pictures")
    datasets = Cap(
        settings.max_dataset_bytes, "SAFELIGHT_MAX_DATASET_BYTES", "send a part of them, or smaller pictures"
    )
    return {"cap": pictures, "by_path": {"/datasets": datasets, "/train": datasets, "/v1/files": datasets}}
