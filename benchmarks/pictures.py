"""The 64 pictures that every benchmark of serving sends: PNGs of a model's own size."""

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training import datasets
from training.builtin import AS_PUBLISHED
from training.bundle.images import fit
from training.bundle.manifest import InputSpec
from training.drawings import golden_images

COUNT = 64


def pictures(model: str, spec: InputSpec) -> list[bytes]:
    """Of the test set, evenly from all over, where SAFELIGHT_DATA has it; else our own drawings."""
    return [encode(image) for image in (_tested(model) if real() else _drawn(spec))]


def real() -> bool:
    return bool(os.environ.get("SAFELIGHT_DATA"))


def describe() -> str:
    kind = "of the test set, evenly from all over" if real() else "drawn (SAFELIGHT_DATA isn't set)"
    return f"{COUNT} PNGs of the model's own size, {kind}"


def encode(image: NDArray[np.uint8]) -> bytes:
    """Pixels [C, H, W] as a PNG."""
    content = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(content, "PNG")
    return content.getvalue()


def _tested(model: str) -> list[NDArray[np.uint8]]:
    images = datasets.load(model, AS_PUBLISHED[model], Path(os.environ["SAFELIGHT_DATA"])).test.images
    return list(images[:: len(images) // COUNT][:COUNT].numpy())


def _drawn(spec: InputSpec) -> list[NDArray[np.uint8]]:
    drawings = golden_images(spec)[:COUNT]  # [N, C, H, W]
    return [fit(Image.fromarray(drawn.transpose(1, 2, 0).squeeze()), spec) for drawn in drawings]  # digits as MNIST's
