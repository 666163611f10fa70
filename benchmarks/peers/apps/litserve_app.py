"""LitServe with dynamic batching; the multipart field is `request`."""

import os
from typing import Annotated

import litserve
import numpy as np
from fastapi import File
from workload import Classifier, decode


class Peer(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Annotated[bytes, File()]) -> np.ndarray:
        return decode(request)

    def batch(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        return list(inputs)

    def predict(self, images: list[np.ndarray]) -> list[dict]:
        return self.classifier.predict(images)

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output

    def encode_response(self, output: dict) -> dict:
        return output


if __name__ == "__main__":
    api = Peer(max_batch_size=int(os.environ["P_MAX_BATCH"]), batch_timeout=float(os.environ["P_WAIT_MS"]) / 1000)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=int(os.environ["P_WORKERS"]))
    server.run(
        host="127.0.0.1",
        port=int(os.environ["PEERS_PORT"]),
        log_level="warning",
        num_api_servers=1,
        generate_client_file=False,
        access_log=False,
    )
