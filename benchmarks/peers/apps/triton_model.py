"""A model of Triton's python backend: pictures (BYTES [n, 1]) or pixels (UINT8 [n, C, H, W]) to probabilities."""

import os
import sys

# The stub's interpreter doesn't look at PYTHONPATH.
sys.path[:0] = os.environ["PEERS_SYS_PATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import triton_python_backend_utils as backend  # noqa: E402
from workload import CLASSES, Classifier, decode  # noqa: E402

LABELS = np.array([name.encode() for name in CLASSES], dtype=object)


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        self.classifier = Classifier()

    def execute(self, requests: list) -> list:
        groups = [self.images(request.inputs()[0].as_numpy()) for request in requests]
        chances = self.classifier.probabilities([image for group in groups for image in group])
        labels = LABELS[chances.argmax(1)].reshape(-1, 1)
        responses, start = [], 0
        for group in groups:
            rows = slice(start, start := start + len(group))
            tensors = [backend.Tensor("label", labels[rows]), backend.Tensor("probabilities", chances[rows])]
            responses.append(backend.InferenceResponse(output_tensors=tensors))
        return responses

    def images(self, tensor: np.ndarray) -> list[np.ndarray]:
        if os.environ["P_INPUT"] == "pixels":
            return list(tensor.transpose(0, 2, 3, 1))
        return [decode(content) for content in tensor.ravel()]
