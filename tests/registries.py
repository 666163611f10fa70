"""Async tests on a registry of their own."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from service.inference.predictor import Predictor
from service.inference.registry import Limits, Registry

LIMITS = {
    "device": torch.device("cpu"),
    "threads": 2,
    "max_batch": 8,
    "queue_size": 256,
    "max_pixels": 10_000_000,
    "loaded_versions": 8,
    "rescan_seconds": 1000,  # it scans only when told
}


def run(artifacts: Path, test: Callable[[Registry], Awaitable[None]], **changes: Any) -> None:
    """Run an async test on a registry whose default model is `greys`; `changes` are limits that are to be others."""

    async def main() -> None:
        async with Registry.open(artifacts, Limits(**LIMITS | changes), "greys") as registry:
            await test(registry)

    asyncio.run(main())


def run_predictor(artifacts: Path, test: Callable[[Predictor], Awaitable[None]]) -> None:
    """Run an async test on the active version of `greys`."""

    async def with_predictor(registry: Registry) -> None:
        await test(await registry.predictor(registry.entry(None, None)))

    run(artifacts, with_predictor)
