"""Fine-tuning by request: how good, how long from POST to `succeeded`, and what it costs the requests beside it.

    SAFELIGHT_DATA=../data python -m benchmarks.finetuning [--only NAME …]

Each case is posted to a service of its own with the shipped models. Data sets are made of MNIST, CIFAR-10, and
finetune-sample.zip in SAFELIGHT_DATA, which has five classes that CIFAR-10 doesn't.
"""

import argparse
import io
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from benchmarks.serving import ROOT, bodies, wait_until_it_answers, wrk
from service.client import Client
from service.jobs.job import Job
from training import datasets
from training.bundle import store
from training.bundle.store import BundleRef

DATA = Path(os.environ["SAFELIGHT_DATA"]).resolve()
SAMPLE = DATA / "finetune-sample.zip"
SHUFFLES = 10
LOAD_SECONDS = 8

console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    for name in parser.parse_args().only:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url:
            for line in CASES[name](Path(folder), url):
                print(f"{name}: {line}", flush=True)


# --- cases ------------------------------------------------------------------------------------------------------------


def sample(_: Path, url: str) -> Iterator[str]:
    yield describe(*timed(url, SAMPLE, model="cifar10", name="things"))


def sample_20(folder: Path, url: str) -> Iterator[str]:
    """20 training pictures of each class, and the whole test part."""
    few = folder / "few.zip"
    with zipfile.ZipFile(SAMPLE) as archive, zipfile.ZipFile(few, "w") as target:
        taken: dict[str, int] = {}
        for name in sorted(archive.namelist()):
            place = name.rpartition("/")[0]
            taken[place] = taken.get(place, 0) + 1
            if not name.endswith("/") and (taken[place] <= 20 or "test" in place.split("/")):
                target.writestr(name, archive.read(name))
    yield describe(*timed(url, few, model="cifar10", name="things"))


def rotated(folder: Path, url: str) -> Iterator[str]:
    """2,000 of MNIST's test pictures, turned by 40 degrees; plain MNIST is the other 8,000."""
    dataset = mnist()
    chosen = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[:2000]
    images = rotate(dataset.test.images[chosen], 40, InterpolationMode.BILINEAR)
    archive = packed(folder / "rotated.zip", dataset.classes, images, dataset.test.labels[chosen])
    yield describe(*timed(url, archive, model="mnist"))


def compressed(folder: Path, url: str) -> Iterator[str]:
    """1,000 of CIFAR-10's test pictures, as JPEG of quality 20."""
    dataset = cifar10()
    chosen = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(0))[:1000]
    images, labels = dataset.test.images[chosen], dataset.test.labels[chosen]
    archive = packed(folder / "jpeg.zip", dataset.classes, images, labels, "JPEG", quality=20)
    yield describe(*timed(url, archive, model="cifar10"))


def shuffled(folder: Path, url: str) -> Iterator[str]:
    """The sample's training pictures, their labels dealt out at random, ten times."""
    with zipfile.ZipFile(SAMPLE) as archive:
        pictures = [
            (name.split("/")[-2], archive.read(name))
            for name in sorted(archive.namelist())
            if "train" in name.split("/") and not name.endswith("/")
        ]
    for seed in range(SHUFFLES):
        labels = np.random.default_rng(seed).permutation([label for label, _ in pictures])
        path = folder / f"shuffled-{seed}.zip"
        with zipfile.ZipFile(path, "w") as target:
            for index, (label, (_, content)) in enumerate(zip(labels, pictures, strict=True)):
                target.writestr(f"{label}/{index}.png", content)
        yield describe(*timed(url, path, model="cifar10", name=f"shuffled-{seed}", seed=seed))


def beside(folder: Path, url: str) -> Iterator[str]:
    """p99 of /predict at 16 connections, idle and beside a job, in turns."""
    singles, _ = bodies(folder, "cifar10")
    client, address = Client(url, timeout=60), f"{url}/predict?model=cifar10"
    wrk(address, singles, 16, 2)
    found: dict[str, list[dict[str, float]]] = {"idle": [], "beside a job": []}
    for turn in range(5):
        found["idle"].append(wrk(address, singles, 16, LOAD_SECONDS))
        job = client.train(SAMPLE, model="cifar10", name=f"things-{turn}", recipe={"epochs": 100}, seed=turn)
        while (seen := client.job(job.id)).progress is None or not seen.progress.step:
            time.sleep(0.2)
        found["beside a job"].append(wrk(address, singles, 16, LOAD_SECONDS))
        client.cancel(job.id)
        client.wait(job.id, timeout=60)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("rps", "p50_ms", "p99_ms")}
        for name, runs in found.items()
    }
    for name, figures in medians.items():
        yield f"{name}: {figures['rps']:.0f} requests/s, p50 {figures['p50_ms']:.0f} ms, p99 {figures['p99_ms']:.0f} ms"
    ratios = [busy["p99_ms"] / idle["p99_ms"] for idle, busy in zip(*found.values(), strict=True)]
    yield f"p99 {statistics.median(ratios):.2f} times that of idle ({min(ratios):.2f} to {max(ratios):.2f})"


CASES: dict[str, Callable[[Path, str], Iterator[str]]] = {
    "sample": sample,
    "sample-20": sample_20,
    "rotated": rotated,
    "jpeg": compressed,
    "shuffled": shuffled,
    "beside": beside,
}


# --- the parts of a case ----------------------------------------------------------------------------------------------


def timed(url: str, archive: Path, **wanted: Any) -> tuple[Job, float]:
    client, begun = Client(url, timeout=60), time.perf_counter()
    job = client.wait(client.train(archive, **wanted).id, timeout=1200)
    return job, time.perf_counter() - begun


def describe(job: Job, seconds: float) -> str:
    if job.result is None:
        return f"{job.status}: {job.error}"
    lost = [check["sentence"] for check in job.result["gate"]["checks"] if check["name"] == "guard"]
    accuracy = job.result["metrics"]["accuracy"]
    return f"{seconds:.1f} s, {accuracy:.2%}; {job.result['summary']} {' '.join(lost)}"


def packed(path: Path, classes: tuple[str, ...], images: Tensor, labels: Tensor, form: str = "PNG", **how: Any) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            content = io.BytesIO()
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(content, form, **how)
            archive.writestr(f"{classes[label]}/{index}.{form.lower()}", content.getvalue())
    return path


def mnist() -> datasets.Dataset:
    return datasets.load("mnist", store.read_manifest(ROOT / "artifacts", BundleRef("mnist", "1")).input, DATA)


def cifar10() -> datasets.Dataset:
    return datasets.load("cifar10", store.read_manifest(ROOT / "artifacts", BundleRef("cifar10", "1")).input, DATA)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A service on a copy of the shipped models; it is gone at the end."""
    shutil.copytree(ROOT / "artifacts", folder / "artifacts")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ |= {"SAFELIGHT_ARTIFACTS": str(folder / "artifacts"), "SAFELIGHT_STATE": str(folder / "state")}
    environ |= {"SAFELIGHT_DATA": str(DATA), "SAFELIGHT_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-m", "service"], cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/health/ready", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
