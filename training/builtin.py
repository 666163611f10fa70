"""MNIST and CIFAR-10 in the shape of an archive, so that a part of them can be a data set like any other."""

from collections.abc import Container, Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training import datasets
from training.bundle.manifest import InputSpec

AS_PUBLISHED = {
    "mnist": InputSpec(channels=1, height=28, width=28, fit="digit"),
    "cifar10": InputSpec(channels=3, height=32, width=32, fit="cover"),
}
SEED = 0


class BuiltIn:
    """All of a built-in data set; or `limit` pictures of its training split, equally many of each class, undivided."""

    def __init__(self, name: str, data: Path | None, limit: int | None) -> None:
        """Raises DatasetError where the data isn't there."""
        self._dataset = datasets.load(name, AS_PUBLISHED[name], data)
        self._limit = limit

    def files(self) -> list[PurePosixPath]:
        return [path for path, _ in self._pictures()]

    def contents(self, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
        for path, pixels in self._pictures():
            if path in wanted:
                file = BytesIO()
                Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(file, "PNG")
                yield path, file.getvalue()

    def _pictures(self) -> Iterator[tuple[PurePosixPath, NDArray[np.uint8]]]:
        parts = (
            {"train": self._dataset.train, "test": self._dataset.test} if self._limit is None else {"": self._part()}
        )
        for folder, split in parts.items():
            for index, (pixels, label) in enumerate(zip(split.images.numpy(), split.labels.tolist(), strict=True)):
                yield PurePosixPath(folder, self._dataset.classes[label], f"{index:05}.png"), pixels

    def _part(self) -> datasets.Split:
        labels, limit = self._dataset.train.labels, self._limit or 0
        order = np.random.default_rng(SEED).permutation(len(labels))
        ranks = np.zeros(len(labels), np.int64)  # of each picture within its class
        for label in range(len(self._dataset.classes)):
            members = order[labels.numpy()[order] == label]
            ranks[members] = np.arange(len(members))
        chosen = np.lexsort((labels.numpy(), ranks))[:limit]
        return self._dataset.train[np.sort(chosen).tolist()]
