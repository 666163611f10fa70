"""BentoML with adaptive batching: a batchable API takes a list of pictures."""

import os

import bentoml
import numpy as np
from PIL.Image import Image
from workload import Classifier


@bentoml.service(
    name="peer",
    workers=int(os.environ["P_WORKERS"]),
    threads=1,
    traffic={"timeout": 60},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Peer:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(
        batchable=True,
        max_batch_size=int(os.environ["P_MAX_BATCH"]),
        max_latency_ms=60_000,  # a limit beyond which requests are shed, no wait
    )
    def predict(self, images: list[Image]) -> list[dict]:
        rgb = (image if image.mode == "RGB" else image.convert("RGB") for image in images)
        return self.classifier.predict([np.asarray(image) for image in rgb])
