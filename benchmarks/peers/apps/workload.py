"""The work that every peer does, so that only the server around it differs: PNG → pixels → the module → probabilities.

Runs in the peers' environments, which have torch, numpy and Pillow. PEERS_MODEL is a TorchScript file that takes uint8
[N, C, H, W] and normalises inside; PEERS_CLASSES are the classes' names, PEERS_THREADS torch's threads.
"""

import io
import os

import numpy as np
import torch
from PIL import Image

CLASSES = os.environ["PEERS_CLASSES"].split(",")
WARMED_BATCHES = (1, 2, 4, 8, 16, 32)


def decode(content: bytes) -> np.ndarray:
    """A picture of any kind to uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


class Classifier:
    """The module, warmed up: TorchScript is slow at the first runs of a shape; no server should pay for it later."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
        self.module = torch.jit.load(os.environ["PEERS_MODEL"], map_location="cpu").eval()
        for batch in WARMED_BATCHES:
            for _ in range(3):
                self.probabilities([np.zeros((32, 32, 3), np.uint8)] * batch)

    def probabilities(self, images: list[np.ndarray]) -> np.ndarray:
        """Pictures [H, W, 3] to float32 [N, K]."""
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # channels last: the same memory
            return self.module(pixels).softmax(1).numpy()

    def predict(self, images: list[np.ndarray]) -> list[dict]:
        return [answer(row) for row in self.probabilities(images)]


def answer(row: np.ndarray) -> dict:
    """Probabilities [K] as every peer's JSON has them."""
    return {"label": CLASSES[int(row.argmax())], "probabilities": dict(zip(CLASSES, map(float, row), strict=True))}
