"""Export: a trained network becomes a bundle. Training's last act; it loads back what it wrote before anyone sees it.

One of the two places that know `torch.jit`.
"""

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from training import SafelightError, report
from training.bundle import store
from training.bundle.golden import Golden, GoldenMismatch, compare, read_golden, write_golden
from training.bundle.manifest import (
    CHECKPOINT,
    GOLDEN,
    MODULE,
    Calibration,
    DatasetFacts,
    Manifest,
    Metrics,
    NetworkSpec,
    OutOfDistribution,
    RecipeSpec,
    Score,
    TrainingFacts,
)
from training.bundle.store import BundleRef
from training.calibrate import fit_ood, fit_temperature
from training.checkpoint import load_network, save_weights
from training.datasets import Dataset
from training.drawings import golden_images
from training.evaluate import confusion, infer, metrics
from training.loop import Trained
from training.networks import ConvNet, macs, parameters
from training.recipes import Recipe

MAX_LOGIT_DIFFERENCE = 1e-4
OOD_SCORE: Score = "energy"


class ExportFailed(SafelightError):
    """The exported module disagrees with the network that it was made from; nothing was published."""


@dataclass(frozen=True)
class Measured:
    """What the hold-out and the test set say of a network."""

    calibration: Calibration
    ood: OutOfDistribution
    metrics: Metrics
    confusion: Tensor  # [K, K]


def measure(trained: Trained, dataset: Dataset, recipe: Recipe) -> Measured:
    """Calibrate on the hold-out, then read the test set: once, here, for the report."""
    held_logits = infer(trained.network, trained.held.images, trained.device)
    calibration = fit_temperature(held_logits, trained.held.labels)
    ood = fit_ood(held_logits, OOD_SCORE, calibration.temperature)
    logits = infer(trained.network, dataset.test.images, trained.device)
    logits_tta = (
        None if recipe.views == "none" else infer(trained.network, dataset.test.images, trained.device, recipe.views)
    )
    figures = metrics(logits, dataset.test.labels, dataset.classes, calibration.temperature, logits_tta)
    return Measured(calibration, ood, figures, confusion(logits, dataset.test.labels))


def export(
    trained: Trained, measured: Measured, dataset: Dataset, recipe: Recipe, *, seed: int, model: str, artifacts: Path
) -> BundleRef:
    """Write, load back, compare, publish. Raises ExportFailed where the comparison fails; then nothing is published."""
    network = trained.network.cpu().float().eval()

    def describe(version: str, folder: Path) -> Manifest:
        return Manifest(
            model=model,
            version=version,
            created_at=datetime.now(UTC),
            classes=dataset.classes,
            input=recipe.input,
            network=NetworkSpec(
                name=recipe.network,
                arguments=recipe.arguments | {"channels": recipe.input.channels, "classes": len(dataset.classes)},
                parameters=parameters(network),
                macs=macs(network, recipe.input.shape),
            ),
            recipe=RecipeSpec(name=recipe.name, settings=recipe.model_dump(mode="json"), seed=seed),
            training=_training_facts(trained, dataset, recipe),
            parent=None,
            metrics=measured.metrics,
            calibration=measured.calibration,
            ood=measured.ood,
            files=store.folder_facts(folder),
        )

    with store.staging(artifacts, model) as folder:
        write_module(folder / MODULE, network, recipe.input.shape)
        save_weights(folder / CHECKPOINT, network)
        images = golden_images(recipe.input)
        write_golden(
            folder / GOLDEN, Golden(images, infer(network, torch.from_numpy(images), torch.device("cpu")).numpy())
        )
        draft = describe("1", folder)  # the number is given at the end, by publish
        _check(folder, draft)
        report.write(folder / "report", draft, trained.history, measured.confusion)
        return store.publish(folder, artifacts, model, lambda version: describe(version, folder))


def _training_facts(trained: Trained, dataset: Dataset, recipe: Recipe) -> TrainingFacts:
    return TrainingFacts(
        dataset=DatasetFacts(
            name=dataset.name,
            sha256=dataset.sha256,
            train=len(trained.train),
            holdout=len(trained.held),
            test=len(dataset.test),
            skipped=len(dataset.skipped),
        ),
        epochs=recipe.epochs,
        seconds=round(trained.seconds, 1),
        **trained.arithmetic,
    )


def _check(folder: Path, manifest: Manifest) -> None:
    """Load back both forms of the weights and hold them against the golden logits."""
    golden = read_golden(folder / GOLDEN, manifest)
    images = torch.from_numpy(golden.images)
    for name, classifier in (
        (MODULE, read_module(folder / MODULE)),
        (CHECKPOINT, load_network(folder, manifest)),
    ):
        for size in (len(images), 1):  # any batch size must do
            try:
                logits = infer(classifier, images[:size], torch.device("cpu")).numpy()
                agreement = compare(golden.logits[:size], logits, 1.0)
            except GoldenMismatch as error:
                raise ExportFailed(f"{name}: {error}") from error
            if agreement.logit_difference > MAX_LOGIT_DIFFERENCE or agreement.argmax_differences:
                raise ExportFailed(
                    f"{name} differs from the network by {agreement.logit_difference:.1e} in a logit (allowed: "
                    f"{MAX_LOGIT_DIFFERENCE:.0e}) and in {agreement.argmax_differences} best classes (allowed: none)"
                )


# --- TorchScript ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """TorchScript is deprecated, and says so at each call. We know; see docs/decisions.md."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit.*", FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit.*", DeprecationWarning)
        yield


def write_module(path: Path, network: ConvNet, shape: tuple[int, int, int]) -> None:
    """Trace the folded network: uint8 [N, C, H, W] to float32 logits [N, K], for any N."""
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    with _quiet(), torch.no_grad():
        torch.jit.trace(_Exported(network), example).save(path)
    _drop_debug_records(path)


def _drop_debug_records(path: Path) -> None:
    """Write the archive anew without the stack of every operation: it tells where the source lay on this machine."""
    with zipfile.ZipFile(path) as archive:
        records = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in records:
            if not info.filename.endswith(".debug_pkl"):
                archive.writestr(zipfile.ZipInfo(info.filename), content, info.compress_type)


def read_module(path: Path) -> nn.Module:
    """Load a module. TorchScript is code: only from a bundle whose digests were checked."""
    with _quiet():
        module: nn.Module = torch.jit.load(path, map_location="cpu")
    return module.eval()


class _Exported(nn.Module):
    """The folded network with its logits in float32, whatever it computes in."""

    def __init__(self, network: ConvNet) -> None:
        super().__init__()
        self.network = network.folded()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).float()
