"""Fine-tuning by request: how good, how long from POST to `succeeded`, and what it costs the requests beside it.

    SAFELIGHT_DATA=../data python -m benchmarks.finetuning [--only NAME …] [--seeds N]

Each job is posted to a service of its own with the shipped models. Data sets are made of MNIST, CIFAR-10, and
finetune-sample.zip in SAFELIGHT_DATA, which has five classes that CIFAR-10 doesn't. A row's seeds choose its pictures,
where there is a choice, and go to the job; of several there are the median, the least and the greatest.
"""

import argparse
import io
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate

from benchmarks.serving import ROOT, active, bodies, wait_until_it_answers, wrk
from service.client import Client
from service.jobs.job import Job
from training import datasets
from training.bundle import store
from training.datasets import Dataset, Split

DATA = Path(os.environ["SAFELIGHT_DATA"]).resolve()
SAMPLE = DATA / "finetune-sample.zip"
LOAD_SECONDS = 8


@dataclass(frozen=True)
class Run:
    """A job that is over, and how long it took from POST."""

    job: Job
    seconds: float

    @property
    def figures(self) -> dict[str, float]:
        """What rows are made of; nothing where the job has failed."""
        if self.job.result is None:
            return {}
        found = {"seconds": self.seconds, "promoted": float(self.job.result["promoted"])}
        found |= {name: 100 * score["accuracy"] for name, score in self.job.result["comparisons"].items()}
        checks = {check["name"]: check["figures"] for check in self.job.result["gate"]["checks"]}
        return found | ({"lost": 100 * checks["guard"]["lost"]} if checks["guard"] else {})

    def describe(self) -> str:
        if self.job.result is None:
            return f"{self.job.status}: {self.job.error}"
        told = [check["sentence"] for check in self.job.result["gate"]["checks"] if check["name"] == "guard"]
        scores = [
            f"{name} {score['right']} of {score['n']}, {score['accuracy']:.2%}"
            for name, score in self.job.result["comparisons"].items()
        ]
        return f"{self.seconds:.1f} s; {', '.join(scores)}; {self.job.result['summary']} {' '.join(told)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[*CASES, "beside"], default=[*CASES, "beside"])
    parser.add_argument(
        "--seeds", type=int, help="runs of each row, seeds 0, 1, …; else one, and ten of shuffled labels"
    )
    options = parser.parse_args()
    for name in options.only:
        for line in beside() if name == "beside" else repeated(name, options.seeds or SEEDS.get(name, 1)):
            print(f"{name}: {line}", flush=True)


def repeated(name: str, seeds: int) -> Iterator[str]:
    """A line for each seed, and one for all of them."""
    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(CASES[name](Path(folder), seed))
        yield f"seed {seed}: {runs[-1].describe()}"
    figures = [run.figures for run in runs if run.figures]
    names = list(dict.fromkeys(name for found in figures for name in found))
    spreads = [f"{name} {spread([found[name] for found in figures if name in found])}" for name in names]
    yield f"n = {len(figures)} of {seeds}: {', '.join(spreads)}"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# --- rows -------------------------------------------------------------------------------------------------------------


def sample(folder: Path, seed: int) -> Run:
    return timed(folder, SAMPLE, model="cifar10", name="things", seed=seed)


def sample_20(folder: Path, seed: int) -> Run:
    """20 training pictures of each class, and the whole test part."""
    few = folder / "few.zip"
    with zipfile.ZipFile(SAMPLE) as archive, zipfile.ZipFile(few, "w") as target:
        names = [name for name in sorted(archive.namelist()) if not name.endswith("/")]
        taken: Counter[str] = Counter()
        for name in np.random.default_rng(seed).permutation(names):
            place = name.rpartition("/")[0]
            taken[place] += 1
            if taken[place] <= 20 or "test" in place.split("/"):
                target.writestr(str(name), archive.read(str(name)))
    return timed(folder, few, model="cifar10", name="things", seed=seed)


def rotated(folder: Path, seed: int) -> Run:
    """2,000 of MNIST's test pictures, turned by 40 degrees; the service has only the other 8,000 of that test."""
    dataset, chosen, rest = drawn("mnist", 2000, seed)
    write_mnist(folder / "data", dataset.train, dataset.test[rest])
    images = rotate(dataset.test.images[chosen], 40, InterpolationMode.BILINEAR)
    archive = folder / "rotated.zip"
    pack(archive, dataset.classes, {"": Split(images, dataset.test.labels[chosen])})
    return timed(folder, archive, data=folder / "data", model="mnist", seed=seed)


def compressed(folder: Path, seed: int) -> Run:
    """1,000 of CIFAR-10's test pictures, as JPEG of quality 20; the service has only the other 9,000 of that test."""
    dataset, chosen, rest = drawn("cifar10", 1000, seed)
    (folder / "data").mkdir()
    pack(folder / "data" / "cifar10.zip", dataset.classes, {"train": dataset.train, "test": dataset.test[rest]})
    load("cifar10", folder / "data")  # leaves the decoded pictures beside it, as they are for those who had them before
    archive = folder / "jpeg.zip"
    pack(archive, dataset.classes, {"": dataset.test[chosen]}, "JPEG", quality=20)
    return timed(folder, archive, data=folder / "data", model="cifar10", seed=seed)


def shuffled(folder: Path, seed: int) -> Run:
    """The sample's training pictures, their labels dealt out at random."""
    path = folder / "shuffled.zip"
    with zipfile.ZipFile(SAMPLE) as archive, zipfile.ZipFile(path, "w") as target:
        names = [name for name in sorted(archive.namelist()) if "train" in name.split("/") and not name.endswith("/")]
        labels = np.random.default_rng(seed).permutation([name.split("/")[-2] for name in names])
        for index, (label, name) in enumerate(zip(labels, names, strict=True)):
            target.writestr(f"{label}/{index}.png", archive.read(name))
    return timed(folder, path, model="cifar10", name="shuffled", seed=seed)


CASES: dict[str, Callable[[Path, int], Run]] = {
    "sample": sample,
    "sample-20": sample_20,
    "rotated": rotated,
    "jpeg": compressed,
    "shuffled": shuffled,
}
SEEDS = {"shuffled": 10}


# --- what a job costs those beside it ---------------------------------------------------------------------------------


def beside() -> Iterator[str]:
    """p99 of /predict at 16 connections, idle and beside a job, in turns."""
    found: dict[str, list[dict[str, float]]] = {"idle": [], "beside a job": []}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url:
        singles, _ = bodies(Path(folder), "cifar10")
        client, address = Client(url, timeout=60), f"{url}/predict?model=cifar10"
        wrk(address, singles, 16, 2)
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


# --- the parts of a row -----------------------------------------------------------------------------------------------


def timed(folder: Path, archive: Path, *, data: Path = DATA, **wanted: Any) -> Run:
    """Post a job to a service that has this data of the base's, and wait until it is over."""
    with serving(folder, data) as url:
        client, begun = Client(url, timeout=60), time.perf_counter()
        job = client.wait(client.train(archive, **wanted).id, timeout=3600)
        return Run(job, time.perf_counter() - begun)


def load(name: str, data: Path = DATA) -> Dataset:
    return datasets.load(name, store.read_manifest(ROOT / "artifacts", active(name)).input, data)


def drawn(name: str, count: int, seed: int) -> tuple[Dataset, Tensor, Tensor]:
    """A data set; so many of its test pictures, and the rest of them, by index."""
    dataset = load(name)
    order = torch.randperm(len(dataset.test), generator=torch.Generator().manual_seed(seed))
    return dataset, order[:count], order[count:]


def pack(path: Path, classes: tuple[str, ...], parts: dict[str, Split], form: str = "PNG", **how: Any) -> None:
    """A zip of class folders; `parts` are the folders above those, if any."""
    with zipfile.ZipFile(path, "w") as archive:
        for part, split in parts.items():
            for index, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
                content = io.BytesIO()
                Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(content, form, **how)
                name = PurePosixPath(part, classes[label], f"{index:05}.{form.lower()}")
                archive.writestr(str(name), content.getvalue())


def write_mnist(data: Path, train: Split, test: Split) -> None:
    """As torchvision lays it out."""
    raw = data / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, split in (("train", train), ("t10k", test)):
        images, labels = split.images.squeeze(1).numpy(), split.labels.numpy().astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.tobytes())


@contextmanager
def serving(folder: Path, data: Path = DATA) -> Iterator[str]:
    """A service on a copy of the shipped models; it is gone at the end."""
    shutil.copytree(ROOT / "artifacts", folder / "artifacts")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ |= {"SAFELIGHT_ARTIFACTS": str(folder / "artifacts"), "SAFELIGHT_STATE": str(folder / "state")}
    environ |= {"SAFELIGHT_DATA": str(data), "SAFELIGHT_PORT": str(port)}
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
