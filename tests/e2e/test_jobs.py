"""Fine-tuning by the real service, in real processes: from the request to the answer, through all interruptions."""

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.tiny import Server, serving

pytestmark = pytest.mark.slow

ROWS = {"model": "tiny", "dataset": {"builtin": "mnist", "limit": 400}, "name": "rows"}
LONG = {"depth": "full", "epochs": 200, "replay": False}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """In the place of MNIST: a bright row each, 28 x 28, whose height is the digit."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 600), ("t10k", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 90, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[3 + 2 * label : 5 + 2 * label] = 220
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return tmp_path / "data"


@pytest.fixture
def service(tiny: Path, data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Starts the service on tiny@1; again and again in the same folders, if a test wants."""
    return lambda *arguments, **settings: serving(
        tiny, tmp_path, *arguments, data=str(data), default_model="tiny", device="cpu", **settings
    )


def until(seen: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_one_request_makes_a_version_that_answers_as_soon_as_the_job_has_succeeded(service: Any) -> None:
    with service() as server:
        job = httpx.post(f"{server.url}/train", json=ROWS | {"promote": "always"}).json()
        assert json.loads(stream(server, job["id"])[-1].split("data: ")[1])["event"] == "decided"
        picture = np.zeros((28, 28), np.uint8)
        from PIL import Image

        from tests.tiny import encode

        picture[3 + 2 * 7 : 5 + 2 * 7] = 220
        answer = httpx.post(
            f"{server.url}/predict?model=rows",
            content=encode(Image.fromarray(picture)),
            headers={"Content-Type": "image/png"},
        )
        assert answer.status_code == 200


def stream(server: Server, job: str) -> list[str]:
    headers = {"Accept": "text/event-stream"}
    reply = httpx.get(f"{server.url}/train/{job}/events", headers=headers, timeout=120)
    return reply.text.strip().split("\n\n")
