"""Whether the service lives, whether it wants requests, what it counts, what it is."""

import asyncio
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Response

from service import errors
from service.api import problems
from service.api.dependencies import JobsDep, LifecycleDep, RegistryDep, SettingsDep
from service.api.schemas import Health, Info
from service.telemetry import JOBS, exposition
from training import __version__

router = APIRouter()

RUNS_ON = ("torch", "openvino", "numpy", "pillow", "fastapi", "uvicorn")


@router.get("/health/live")
async def live() -> Health:
    """This process answers."""
    return Health(status="live")


@router.get("/health/ready", responses=problems.document(errors.NotReady))
async def ready(registry: RegistryDep, lifecycle: LifecycleDep) -> Health:
    """At least one model can answer, and the service isn't about to stop; else 503 and why."""
    if lifecycle.draining:
        raise errors.NotReady("the service is stopping; requests under way are finished")
    if not any(line.active for line in registry.lines.values()):
        found = [entry for line in registry.lines.values() for entry in line.entries.values()]
        reasons = [f"{entry.ref} was refused: {entry.reason}" for entry in found if entry.state == "refused"]
        reasons += [f"{model} can't be read: {reason}" for model, reason in registry.unreadable.items()]
        raise errors.NotReady(f"no model can answer: {'; '.join(reasons) or f'none in {registry.artifacts}'}")
    return Health(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(jobs: JobsDep) -> Response:
    """Prometheus metrics, of all workers."""
    with suppress(errors.DatabaseUnavailable):
        for status, count in (await asyncio.to_thread(jobs.counts)).items():
            JOBS.labels(status).set(count)
    return Response(exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/info")
async def info(registry: RegistryDep, settings: SettingsDep) -> Info:
    """Versions, device, limits, and for each loaded model the way it runs with the timings that chose it."""
    return Info(
        name="safelight",
        version=__version__,
        versions={"python": platform.python_version()} | {name: found for name in RUNS_ON if (found := _version(name))},
        device=str(registry.limits.device),
        threads=registry.limits.threads,
        workers=settings.workers,
        limits={
            "max_body_bytes": settings.max_body_bytes,
            "max_dataset_bytes": settings.max_dataset_bytes,
            "max_image_pixels": settings.max_image_pixels,
            "max_images": settings.max_images,
            "max_batch": registry.limits.max_batch,
            "queue_size": settings.queue_size,
            "cache_mb": settings.cache_mb,
            "deadline_seconds": settings.deadline_seconds,
        },
        engines=[
            {"model": ref.model, "version": ref.version} | predictor.engine.describe()
            for ref, predictor in registry.loaded.items()
        ],
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
