"""Stands in for the data sets until they are here."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from service.errors import DatasetNotFound


@dataclass(frozen=True)
class DatasetRecord:
    id: str
    classes: tuple[str, ...]


class DatasetStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, dataset_id: str) -> DatasetRecord:
        raise DatasetNotFound(f"there is no data set {dataset_id!r}")

    def path(self, dataset_id: str) -> Path:
        raise DatasetNotFound(f"there is no data set {dataset_id!r}")

    async def receive(self, chunks: AsyncIterator[bytes], *, model: str | None) -> DatasetRecord:
        raise DatasetNotFound("not yet")
