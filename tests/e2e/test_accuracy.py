"""What is answered over HTTP is what `safelight evaluate` measures: the whole test sets, image by image."""

from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import encode, serving
from training import datasets, published
from training.bundle import store
from training.bundle.int8 import MAX_DIFFERING, MAX_LOST
from training.bundle.store import BundleRef
from training.evaluate import infer

ROOT = Path(__file__).parents[2]
BATCH = 64  # images in a request

# Another way to add, or another precision, may break a tie differently: classes whose logits differ by less than this.
TIES = {"f32": 1e-3, "float32": 1e-3, "bf16": 0.25, "bfloat16": 0.25, "float16": 0.05}


def answers_over_http(url: str, model: str, images: Tensor) -> list[int]:
    indices = []
    with httpx.Client(base_url=url, timeout=60) as client:
        for chunk in images.split(BATCH):
            pictures = [Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in chunk]
            parts = [("file", ("x.png", encode(picture))) for picture in pictures]
            reply = client.post("/predict", params={"model": model, "top_k": 1}, files=parts)
            indices += [entry["index"] for entry in reply.json()["predictions"]]
    return indices


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("model", ["mnist", "cifar10"])
def test_http_answers_equal_the_evaluation_image_by_image(
    model: str, precision: str, data: Path, tmp_path: Path
) -> None:
    """In int8, but for as many as a bundle may say that it differs in."""
    artifacts = ROOT / "artifacts"
    ref = BundleRef(model, store.active(artifacts, model) or "")
    manifest, module = published.load(ref, artifacts)
    test = datasets.load(model, manifest.input, data).test
    logits = infer(module, test.images, torch.device("cpu")).numpy()

    with serving(artifacts, tmp_path, precision=precision) as server:
        served = np.array(answers_over_http(server.url, model, test.images))
        (engine,) = (
            one["engine"] for one in httpx.get(f"{server.url}/info").json()["engines"] if one["model"] == model
        )

    offline = logits.argmax(1)
    differ = np.flatnonzero(served != offline)
    gaps = logits[differ, offline[differ]] - logits[differ, served[differ]]
    kind = engine.split()[1]
    assert (len(differ) <= MAX_DIFFERING * len(served)) if kind == "int8" else (gaps < TIES[kind]).all(), (
        f"{len(differ)} answers of {engine} differ from the evaluation, by up to {gaps.max()} in the logit"
    )
    accuracy = float((served == test.labels.numpy()).mean())
    print(f"{model} over HTTP: {accuracy:.2%} of {len(served)}, {len(differ)} answers differ from the evaluation")  # noqa: T201 - the figure, for `pytest -s`
    assert abs(accuracy - manifest.metrics.accuracy) <= len(differ) / len(served)
    assert accuracy >= manifest.metrics.accuracy - MAX_LOST
