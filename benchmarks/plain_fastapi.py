"""What most people write: a FastAPI endpoint that decodes, runs the module on one picture, and answers. No batching.

SAFELIGHT_ARTIFACTS=artifacts uvicorn benchmarks.plain_fastapi:app
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from fastapi import FastAPI, UploadFile
from PIL import Image

ARTIFACTS = Path(os.environ["SAFELIGHT_ARTIFACTS"])
app = FastAPI()


def load(model: str) -> tuple[torch.nn.Module, list[str], str, tuple[int, int]]:
    bundle = ARTIFACTS / model / (ARTIFACTS / model / "active").read_text().strip()
    manifest = json.loads((bundle / "manifest.json").read_text())
    mode = "L" if manifest["input"]["channels"] == 1 else "RGB"
    size = manifest["input"]["width"], manifest["input"]["height"]
    return torch.jit.load(bundle / "model.ts").eval(), manifest["classes"], mode, size


MODELS = {model: load(model) for model in ("cifar10", "mnist")}


def pixels(content: bytes, mode: str, size: tuple[int, int]) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(content)).convert(mode).resize(size))
    return np.atleast_3d(image).transpose(2, 0, 1)  # [C, H, W]


def answer(logits: torch.Tensor, classes: list[str]) -> dict[str, object]:
    chances = logits.softmax(0)
    best = int(chances.argmax())
    return {"label": classes[best], "probability": float(chances[best]), "scores": chances.tolist()}


@app.post("/predict")
def predict(file: list[UploadFile], model: str) -> list[dict[str, object]]:
    module, classes, mode, size = MODELS[model]
    images = torch.from_numpy(np.stack([pixels(part.file.read(), mode, size) for part in file]))
    with torch.inference_mode():
        return [answer(logits, classes) for logits in module(images)]
