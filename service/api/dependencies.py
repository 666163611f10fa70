"""What endpoints ask for, declared once and used as types."""

from typing import Annotated, cast

from fastapi import Depends, Request

from service.inference.registry import Registry
from service.jobs.datasets import DatasetStore
from service.lifecycle import Lifecycle
from service.settings import Settings


async def _registry(request: Request) -> Registry:
    return cast(Registry, request.state.registry)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.state.settings)


async def _datasets(request: Request) -> DatasetStore:
    return cast(DatasetStore, request.state.datasets)


async def _lifecycle(request: Request) -> Lifecycle:
    return cast(Lifecycle, request.state.lifecycle)


RegistryDep = Annotated[Registry, Depends(_registry)]
SettingsDep = Annotated[Settings, Depends(_settings)]
DatasetsDep = Annotated[DatasetStore, Depends(_datasets)]
LifecycleDep = Annotated[Lifecycle, Depends(_lifecycle)]
