"""What endpoints ask for, declared once and used as types."""

from typing import Annotated, cast

from fastapi import Depends, Request

from service.inference.registry import Registry
from service.jobs.datasets import DatasetStore
from service.jobs.runner import Runner
from service.jobs.store import JobStore
from service.lifecycle import Lifecycle
from service.settings import Settings


async def _registry(request: Request) -> Registry:
    return cast(Registry, request.state.registry)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.state.settings)


async def _lifecycle(request: Request) -> Lifecycle:
    return cast(Lifecycle, request.state.lifecycle)


async def _jobs(request: Request) -> JobStore:
    return cast(JobStore, request.state.jobs)


async def _runner(request: Request) -> Runner:
    return cast(Runner, request.state.runner)


async def _datasets(request: Request) -> DatasetStore:
    return cast(DatasetStore, request.state.datasets)


RegistryDep = Annotated[Registry, Depends(_registry)]
SettingsDep = Annotated[Settings, Depends(_settings)]
LifecycleDep = Annotated[Lifecycle, Depends(_lifecycle)]
JobsDep = Annotated[JobStore, Depends(_jobs)]
RunnerDep = Annotated[Runner, Depends(_runner)]
DatasetsDep = Annotated[DatasetStore, Depends(_datasets)]
