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

FOLDER = Path(os.environ["SAFELIGHT_ARTIFACTS"]) / "cifar10"
BUNDLE = FOLDER / (FOLDER / "active").read_text().strip()
CLASSES = json.loads((BUNDLE / "manifest.json").read_text())["classes"]

module = torch.jit.load(BUNDLE / "model.ts").eval()
app = FastAPI()


def pixels(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB").resize((32, 32))
    return np.asarray(image).transpose(2, 0, 1)


def answer(logits: torch.Tensor) -> dict[str, object]:
    chances = logits.softmax(0)
    best = int(chances.argmax())
    return {"label": CLASSES[best], "probability": float(chances[best]), "scores": chances.tolist()}


@app.post("/predict")
def predict(file: list[UploadFile]) -> list[dict[str, object]]:
    images = torch.from_numpy(np.stack([pixels(part.file.read()) for part in file]))
    with torch.inference_mode():
        return [answer(logits) for logits in module(images)]
