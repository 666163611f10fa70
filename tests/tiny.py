"""Small real things to test with: bundles built in milliseconds, a data set of squares, a server in its own process.

Nothing here imitates our own code: bundles are TorchScript with digests and golden samples, the server is the server.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from training.bundle import store
from training.bundle.golden import Golden, write_golden
from training.bundle.manifest import (
    CHECKPOINT,
    GOLDEN,
    MANIFEST,
    MODULE,
    Calibration,
    DatasetFacts,
    InputSpec,
    Manifest,
    Metrics,
    NetworkSpec,
    OutOfDistribution,
    RecipeSpec,
    TrainingFacts,
)
from training.bundle.store import BundleRef
from training.checkpoint import save_weights
from training.datasets import Dataset, Split
from training.recipes import Muon, Recipe

LEVELS = 16
GREYS = tuple(f"grey-{level}" for level in range(LEVELS))
SPEC = InputSpec(channels=1, height=8, width=8, fit="stretch")

POISON = 255  # a picture whose first pixel is this makes the Fragile module fail


class Greys(nn.Module):
    """Tells shades of grey apart by their mean: an answer shows which picture it belongs to."""

    def __init__(self, scale: float = 1.0, levels: int = LEVELS) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor([float(shade(level, levels)) for level in range(levels)]))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.step = 256.0 / levels

    def forward(self, pixels: Tensor) -> Tensor:
        return self.by_mean(pixels)

    def by_mean(self, pixels: Tensor) -> Tensor:
        mean = pixels.type_as(self.centres).mean((1, 2, 3)).unsqueeze(1)
        return (-(((mean - self.centres) / self.step) ** 2) * self.scale).float()


class Fragile(Greys):
    """Greys that can't bear a batch with a poisoned picture in it. Runs in TorchScript only: OpenVINO would leave the
    raise out, but has no eigenvalues."""

    def forward(self, pixels: Tensor) -> Tensor:
        if bool((pixels[:, 0, 0, 0] == 255).any()):
            raise RuntimeError("poisoned")
        return self.by_mean(pixels) + 0 * torch.linalg.eigvalsh(torch.ones(1, 1)).sum()


class Slow(Greys):
    """Greys that take some milliseconds a batch, for eigenvalues that nobody needs."""

    def __init__(self, rounds: int = 60) -> None:
        super().__init__()
        self.rounds = rounds

    def forward(self, pixels: Tensor) -> Tensor:
        waste = torch.zeros(())
        for i in range(self.rounds):  # another matrix each time, or TorchScript computes it only once
            waste = waste + torch.linalg.eigvalsh(torch.ones(60, 60) * (pixels[0, 0, 0, 0] + i)).sum()
        return self.by_mean(pixels) + 0 * waste


class Pair(Greys):
    """A module that returns what no engine expects."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.by_mean(pixels), self.by_mean(pixels)


def make_bundle(
    artifacts: Path,
    model: str = "greys",
    module: nn.Module | None = None,
    *,
    classes: Sequence[str] = GREYS,
    activate: bool = True,
) -> BundleRef:
    """Publish a bundle of a module that takes SPEC, as `training.export` would."""
    module = (module or Greys()).eval()
    images = np.random.default_rng(0).integers(0, 250, (256, *SPEC.shape), dtype=np.uint8)
    with store.staging(artifacts, model) as folder, torch.no_grad():
        torch.jit.script(module).save(folder / MODULE)
        save_weights(folder / CHECKPOINT, module)
        write_golden(folder / GOLDEN, Golden(images, module(torch.from_numpy(images)).numpy()))
        (folder / "report").mkdir()
        (folder / "report" / "metrics.json").write_text('{"metrics": {}}')
        ref = store.publish(folder, artifacts, model, lambda version: make_manifest(model, version, classes, folder))
    if activate:
        store.activate(artifacts, ref)
    return ref


def make_manifest(model: str, version: str, classes: Sequence[str], folder: Path) -> Manifest:
    facts = DatasetFacts(name="greys", sha256="0" * 64, train=16, holdout=1, test=16, skipped=0)
    return Manifest(
        model=model,
        version=version,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        classes=tuple(classes),
        input=SPEC,
        network=NetworkSpec(name="convnet", arguments={}, parameters=1, macs=64),
        recipe=RecipeSpec(name="tiny", settings={}, seed=0),
        training=TrainingFacts(dataset=facts, epochs=1, seconds=0, device="cpu", precision="float32", torch="2"),
        parent=None,
        metrics=Metrics(
            n=16,
            accuracy=1.0,
            accuracy_tta=None,
            macro_f1=1.0,
            per_class_recall=dict.fromkeys(classes, 1.0),
            nll=0.0,
            nll_uncalibrated=0.0,
            ece=0.0,
            ece_uncalibrated=0.0,
        ),
        calibration=Calibration(temperature=1.0),
        ood=OutOfDistribution(score="max_logit", threshold=-100.0, true_positive_rate=1.0),
        files=store.folder_facts(folder),
    )


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def reseal(folder: Path, **changes: object) -> None:
    """Let a bundle's manifest agree with its files again, after they were tampered with."""
    manifest = Manifest.parse((folder / MANIFEST).read_bytes())
    changed = manifest.model_copy(update={"files": store.folder_facts(folder), **changes})
    (folder / MANIFEST).write_text(changed.model_dump_json())


def shade(level: int, levels: int = LEVELS) -> int:
    step = 256 // levels
    return level * step + step // 2


def grey(
    level: int, form: str = "PNG", *, size: int = 8, levels: int = LEVELS, first_pixel: int | None = None
) -> bytes:
    """A picture that `Greys` of so many levels answers with `grey-<level>`."""
    pixels = np.full((size, size), shade(level, levels), np.uint8)
    if first_pixel is not None:
        pixels[0, 0] = first_pixel
    return encode(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# --- training ---

TINY = Recipe(
    name="tiny",
    summary="Two kinds of squares.",
    dataset="squares",
    input=InputSpec(channels=1, height=12, width=12, fit="stretch"),
    network="convnet",
    arguments={"widths": [16], "stem_width": 8, "stem_kernel": 3, "activation": "relu"},
    epochs=4,
    batch_size=16,
    optimizer=Muon(filter_lr=0.1, bias_lr=0.05, head_lr=1e-3),
    label_smoothing=0.1,
    shift=1,
    holdout=0.2,
)


def as_settings(recipe: Recipe) -> list[str]:
    """A recipe for the command line: whatever `safelight train` starts from becomes this one."""
    values = recipe.model_dump(mode="json")
    return [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def squares(count: int = 80, seed: int = 0) -> Dataset:
    """Filled and hollow squares, 12 x 12, at random places: a problem that a tiny network learns in seconds."""
    return Dataset("squares", ("filled", "hollow"), _squares(count, seed), _squares(count, seed + 1))


def _squares(count: int, seed: int) -> Split:
    random = np.random.default_rng(seed)
    images = random.integers(0, 40, (count, 1, 12, 12), dtype=np.uint8)
    labels = np.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        y, x = random.integers(0, 6, 2)
        image[0, y : y + 6, x : x + 6] = 220
        if label:
            image[0, y + 1 : y + 5, x + 1 : x + 5] = 20
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def write_class_folders(root: Path, dataset: Dataset) -> Path:
    """Save a data set as train/<class>/*.png and test/<class>/*.png."""
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            folder = root / name / dataset.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(folder / f"{index:04}.png")
    return root


# --- archives ---


def pictures(*labels: str, count: int = 10, seed: int = 0) -> dict[str, bytes]:
    """`<label>/<number>.png`: coarse coloured noise, 16 x 16, no two of them alike."""
    random = np.random.default_rng(seed)
    files = {}
    for label in labels:
        for index in range(count):
            noise = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            files[f"{label}/{index:02}.png"] = encode(noise.resize((16, 16), Image.Resampling.NEAREST))
    return files


def zipped(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(files: Mapping[str, bytes], packing: Literal["", "gz", "bz2", "xz"] = "") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{packing}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


# --- a server of its own ---


class Server:
    """`python -m service` as a child process on a free port."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def launch(artifacts: Path, tmp_path: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Start a server in a session of its own; its state and its log lie under tmp_path."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ |= {"SAFELIGHT_ARTIFACTS": str(artifacts), "SAFELIGHT_STATE": str(tmp_path / "state")}
    environ |= {"SAFELIGHT_PORT": "0", "SAFELIGHT_LOG_FORMAT": "json"}
    environ |= {f"SAFELIGHT_{name.upper()}": value for name, value in settings.items()}
    with (tmp_path / "server.log").open("w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )


@contextmanager
def serving(artifacts: Path, tmp_path: Path, *arguments: str, **settings: str) -> Iterator[Server]:
    """Start a server on artifacts and wait until it answers; it is gone at the end, whatever happens."""
    process, log = launch(artifacts, tmp_path, *arguments, **settings), tmp_path / "server.log"
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Safelight answers at "), log.read_text()
        url = line.split()[3].rstrip(",")
        _wait_until_ready(url, process, log)
        yield Server(process, url, log)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.communicate()


def _wait_until_ready(url: str, process: subprocess.Popen[str], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(f"{url}/health/live", timeout=5)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"no answer in {seconds} s:\n{log.read_text()}")


def until_all_are_verified(server: Server, seconds: float = 100) -> None:
    """It answers once the default model is; the others follow, and a request for one waits until its deadline."""
    end = time.monotonic() + seconds
    while any(found["state"] == "LOADING" for found in httpx.post(f"{server.url}/v2/repository/index").json()):
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.05)
