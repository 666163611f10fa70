"""Export: a trained network becomes a bundle. Training's last act; it loads back what it wrote before anyone sees it.

One of the two places that know `torch.jit`.
"""

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import SafelightError, report
from training.bundle import store
from training.bundle.golden import Golden, GoldenMismatch, compare, read_golden, write_golden
from training.bundle.int8 import INT8, Int8, write_int8
from training.bundle.manifest import (
    CHECKPOINT,
    GOLDEN,
    MODULE,
    Calibration,
    DatasetFacts,
    InputSpec,
    Manifest,
    Metrics,
    NetworkSpec,
    OutOfDistribution,
    Parent,
    RecipeSpec,
    Score,
    TrainingFacts,
)
from training.bundle.replay import REPLAY, Replay, write_replay
from training.bundle.store import BundleRef
from training.calibrate import fit_ood, fit_temperature
from training.checkpoint import load_network, save_weights
from training.datasets import Dataset
from training.drawings import golden_images
from training.evaluate import confusion, infer, metrics
from training.gate import Verdict
from training.loop import Trained
from training.networks import ConvNet, Network, macs, parameters
from training.recipes import Recipe
from training.report import History
from training.trials import Trials

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


@dataclass(frozen=True)
class Origin:
    """What a bundle is and where it comes from: what of the manifest isn't measured or counted."""

    model: str
    classes: tuple[str, ...]
    input: InputSpec
    network: str
    arguments: dict[str, Any]
    recipe: RecipeSpec
    training: TrainingFacts
    parent: Parent | None = None


def measure(trained: Trained, dataset: Dataset, recipe: Recipe) -> Measured:
    """Calibrate on the hold-out, then read the test set: once, here, for the report."""
    held_logits = infer(trained.network, trained.held.images, trained.device)
    logits = infer(trained.network, dataset.test.images, trained.device)
    logits_tta = (
        None if recipe.views == "none" else infer(trained.network, dataset.test.images, trained.device, recipe.views)
    )
    return assess(held_logits, trained.held.labels, logits, dataset.test.labels, dataset.classes, logits_tta)


def assess(
    held_logits: Tensor,
    held_labels: Tensor,
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    logits_tta: Tensor | None = None,
) -> Measured:
    """Figures from logits [N, K]: what is fitted comes from the hold-out, what is reported from the test set."""
    calibration = fit_temperature(held_logits, held_labels)
    ood = fit_ood(held_logits, OOD_SCORE, calibration.temperature)
    figures = metrics(logits, labels, classes, calibration.temperature, logits_tta)
    return Measured(calibration, ood, figures, confusion(logits, labels))


def origin(trained: Trained, dataset: Dataset, recipe: Recipe, *, seed: int, model: str) -> Origin:
    """Of a network that was trained from scratch by a recipe."""
    data = DatasetFacts(
        name=dataset.name,
        sha256=dataset.sha256,
        train=len(trained.train),
        holdout=len(trained.held),
        test=len(dataset.test),
        skipped=len(dataset.skipped),
    )
    return Origin(
        model=model,
        classes=dataset.classes,
        input=recipe.input,
        network=recipe.network,
        arguments=recipe.arguments | {"channels": recipe.input.channels, "classes": len(dataset.classes)},
        recipe=RecipeSpec(name=recipe.name, settings=recipe.model_dump(mode="json"), seed=seed),
        training=TrainingFacts(
            dataset=data, epochs=recipe.epochs, seconds=round(trained.seconds, 1), **trained.arithmetic
        ),
    )


def export(
    network: Network,
    origin: Origin,
    measured: Measured,
    history: History,
    artifacts: Path,
    *,
    replay: Replay | None = None,
    int8: Int8 | None = None,
    verdict: Verdict | None = None,
    trials: Trials | None = None,
    pictures: Sequence[Path] = (),
) -> BundleRef:
    """Write, load back, compare, publish. Raises ExportFailed where the comparison fails; then nothing is published."""
    network = network.cpu().float().eval()

    def describe(version: str, folder: Path) -> Manifest:
        return Manifest(
            model=origin.model,
            version=version,
            created_at=datetime.now(UTC),
            classes=origin.classes,
            input=origin.input,
            network=NetworkSpec(
                name=origin.network,
                arguments=origin.arguments,
                parameters=parameters(network),
                macs=macs(network, origin.input.shape),
            ),
            recipe=origin.recipe,
            training=origin.training,
            parent=origin.parent,
            metrics=measured.metrics,
            calibration=measured.calibration,
            ood=measured.ood,
            files=store.folder_facts(folder),
        )

    with store.staging(artifacts, origin.model) as folder:
        write_module(folder / MODULE, network, origin.input.shape)
        save_weights(folder / CHECKPOINT, network)
        images = golden_images(origin.input)
        write_golden(
            folder / GOLDEN, Golden(images, infer(network, torch.from_numpy(images), torch.device("cpu")).numpy())
        )
        if replay is not None:
            write_replay(folder / REPLAY, replay)
        if int8 is not None:
            write_int8(folder / INT8, int8)
        draft = describe("1", folder)  # the number is given at the end, by publish
        _check(folder, draft)
        report.write(
            folder / "report",
            draft,
            history,
            measured.confusion,
            verdict=verdict,
            trials=trials,
            pictures=pictures,
        )
        return store.publish(folder, artifacts, origin.model, lambda version: describe(version, folder))


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


def write_module(path: Path, network: Network, shape: tuple[int, int, int]) -> None:
    """Trace the folded network: uint8 [N, C, H, W] to float32 logits [N, K], for any N."""
    _trace(path, network.folded().to(memory_format=torch.contiguous_format), shape)


def write_portable_module(path: Path, network: Network, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """As `write_module`, for servers that run what they are given as it is: computed in `dtype`, weights channels last.

    On CPUs, convolutions take that order faster; a bundle doesn't need it, as its engine arranges the weights itself.
    Normalisation and a stem that whitens stay in float32, for they blow small differences up.
    """
    folded = network.folded()
    if isinstance(folded, ConvNet) and folded.whiten:
        folded.groups = nn.Sequential(_Cast(dtype), *folded.groups).to(dtype)
        folded.head.to(dtype)
    else:
        folded.to(dtype)
    _trace(path, folded, shape)


def _trace(path: Path, network: Network, shape: tuple[int, int, int]) -> None:
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(_Exported(network), example, check_trace=False)  # `_check` says more, in less time
        traced.save(path)
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


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class _Exported(nn.Module):
    """A folded network with its logits in float32, whatever it computes in."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).float()
