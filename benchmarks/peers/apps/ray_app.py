"""Ray Serve: FastAPI and @serve.batch in one deployment; the body is the picture."""

import os
import signal
import threading

import numpy as np
import ray
from fastapi import FastAPI, Request
from ray import serve

app = FastAPI()
LOGGING = {"log_level": "WARNING", "enable_access_log": False}


@serve.deployment(
    num_replicas=int(os.environ["P_REPLICAS"]), max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.5}
)
@serve.ingress(app)
class Peer:
    def __init__(self) -> None:
        from workload import Classifier, decode  # in the replica: neither can be sent there

        self.classifier, self.decode = Classifier(), decode

    @app.post("/predict")
    async def predict(self, request: Request) -> dict:
        return await self.infer(self.decode(await request.body()))

    @serve.batch(
        max_batch_size=int(os.environ["P_MAX_BATCH"]), batch_wait_timeout_s=float(os.environ["P_WAIT_MS"]) / 1000
    )
    async def infer(self, images: list[np.ndarray]) -> list[dict]:
        return self.classifier.predict(images)


if __name__ == "__main__":
    ray.init(
        num_cpus=2,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _temp_dir=os.environ["PEERS_WORK"],
        logging_level="warning",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEERS_PORT"])}, logging_config=LOGGING)
    serve.run(Peer.bind(), logging_config=LOGGING)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    stopped.wait()
    serve.shutdown()
    ray.shutdown()
