"""What can be done with a published version and no server: verify it, measure it, ask it, take its module elsewhere."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from training import SafelightError, datasets
from training.bundle import store
from training.bundle.answers import Answer, Logits, answers, probabilities
from training.bundle.classes import BUILT_IN
from training.bundle.golden import Agreement, GoldenMismatch, compare, read_golden
from training.bundle.images import ImageRejected, decode
from training.bundle.int8 import INT8, MAX_DEVIATION, deviation, read_int8
from training.bundle.manifest import CHECKPOINT, GOLDEN, MODULE, Manifest, Metrics
from training.bundle.store import BundleRef, FileMalformed
from training.checkpoint import CheckpointError, load_network
from training.devices import choose_device
from training.evaluate import confusion, infer, metrics
from training.export import read_module, write_portable_module
from training.quantize import golden_logits

MAX_LOGIT_DIFFERENCE = 1e-3  # ten times what export allows: another processor adds in another order

# How far a module that is written for another server may stray from float32 on the golden samples. The service's engine
# asks for more, because it chooses by itself; here a person asks for a precision. `cifar10@3` in bfloat16 is off by
# none and 0.003: drawings, which it learned to tell as strangers, often get nearly the same chance for two classes.
MAX_ARGMAX_DIFFERENCES = 5
TIE = 0.01  # of a probability: a best class that was ahead by less may be another one
MAX_PROBABILITY_DIFFERENCE = 0.05

Precision = Literal["float32", "bfloat16"]
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModuleInaccurate(SafelightError):
    """A version's module in another precision is too far from its float32; nothing was written."""


@dataclass(frozen=True)
class Evaluation:
    ref: BundleRef
    metrics: Metrics
    confusion: list[list[int]]  # [K][K], true class by row
    note: str | None  # what was left out of the data


@dataclass(frozen=True)
class Prediction:
    path: Path
    answer: Answer | None
    error: str | None


def load(ref: BundleRef, artifacts: Path) -> tuple[Manifest, nn.Module]:
    """A version's manifest and module, after its digests were checked. Raises BundleError."""
    manifest = store.read_manifest(artifacts, ref)
    folder = ref.path(artifacts)
    store.check_files(folder, manifest)
    try:
        return manifest, read_module(folder / MODULE)
    except (RuntimeError, ValueError) as error:
        raise FileMalformed(f"{MODULE} isn't a TorchScript file: {_last_line(error)}") from error


def verify(ref: BundleRef, artifacts: Path) -> None:
    """Check digests, and run the golden samples through both forms of the weights. Raises BundleError."""
    manifest, module = load(ref, artifacts)
    folder = ref.path(artifacts)
    golden = read_golden(folder / GOLDEN, manifest)
    try:
        network = load_network(folder, manifest)
    except CheckpointError as error:
        raise GoldenMismatch(str(error)) from error
    for name, classifier in ((MODULE, module), (CHECKPOINT, network)):
        try:
            logits = infer(classifier, torch.from_numpy(golden.images), torch.device("cpu")).numpy()
        except RuntimeError as error:
            raise GoldenMismatch(f"{name} doesn't run: {_last_line(error)}") from error
        agreement = compare(golden.logits, logits, manifest.calibration.temperature)
        if agreement.logit_difference > MAX_LOGIT_DIFFERENCE:
            raise GoldenMismatch(f"{name} misses the golden logits by {agreement.logit_difference:.1e}")
    if (int8 := read_int8(folder / INT8)) is not None:
        images = torch.from_numpy(golden.images[: len(int8.logits)])
        try:
            found = deviation(int8.logits, golden_logits(network.folded(), int8.ranges, images))
        except ValueError as error:  # there are more layers or channels, or fewer
            raise GoldenMismatch(f"{INT8} is of another network: {error}") from error
        if found > MAX_DEVIATION:
            raise GoldenMismatch(f"{INT8} deviates from its golden logits by {found:.4f}")


def evaluate(
    ref: BundleRef,
    artifacts: Path,
    *,
    dataset: str | None,
    data: Path | None,
    device: str | None,
    tta: bool,
    strict: bool,
    download: bool,
) -> Evaluation:
    """Measure the exported module on the test split of the data that it was trained on, or of another data set."""
    manifest, module = load(ref, artifacts)
    place = choose_device(device)
    source = dataset or manifest.training.dataset.name
    if dataset is None and source not in BUILT_IN:
        raise SafelightError(f"{ref} was trained on {source!r}, a folder or zip; say where it is with --dataset")
    found = datasets.load(source, manifest.input, data, strict=strict, download=download)
    if found.classes != manifest.classes:
        raise SafelightError(
            f"{source} has the classes {', '.join(found.classes)}; {ref} has {', '.join(manifest.classes)}"
        )
    images, labels = found.test.images, found.test.labels
    module = module.to(place)
    views = manifest.recipe.settings.get("views", "none") if tta else "none"
    logits = infer(module, images, place)
    logits_tta = infer(module, images, place, views) if views != "none" else None
    figures = metrics(logits, labels, manifest.classes, manifest.calibration.temperature, logits_tta)
    note = datasets.describe_skipped(found) if found.skipped else None
    return Evaluation(ref, figures, confusion(logits, labels).tolist(), note)


def predict(ref: BundleRef, artifacts: Path, files: list[Path], *, top_k: int, device: str | None) -> list[Prediction]:
    """Answer for each file, or say why it can't be read."""
    manifest, module = load(ref, artifacts)
    place = choose_device(device)
    module = module.to(place)
    top_k = min(top_k, len(manifest.classes))
    results = []
    for path in files:
        try:
            pixels = decode(path.read_bytes(), manifest.input)
        except (ImageRejected, OSError) as error:
            results.append(Prediction(path, None, str(error)))
            continue
        logits = infer(module, torch.tensor(pixels).unsqueeze(0), place).numpy()
        results.append(Prediction(path, answers(logits, manifest, top_k)[0], None))
    return results


def write_module(ref: BundleRef, artifacts: Path, path: Path, precision: Precision) -> Agreement:
    """Write a version as a TorchScript file for another server: uint8 [N, C, H, W] to float32 logits [N, K], any N.

    It appears at `path` whole, after it was loaded back and held against the golden samples; says how far it is from
    them. Raises BundleError for a bad version, and ModuleInaccurate.
    """
    manifest, _ = load(ref, artifacts)
    folder = ref.path(artifacts)
    golden = read_golden(folder / GOLDEN, manifest)
    path = path.absolute()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as beside:
        written = Path(beside) / path.name
        write_portable_module(written, load_network(folder, manifest), manifest.input.shape, DTYPES[precision])
        logits = infer(read_module(written), torch.from_numpy(golden.images), torch.device("cpu")).numpy()
        agreement = compare(golden.logits, logits, manifest.calibration.temperature)
        others = _other_answers(golden.logits, logits, manifest.calibration.temperature)
        if others > MAX_ARGMAX_DIFFERENCES or agreement.probability_difference > MAX_PROBABILITY_DIFFERENCE:
            raise ModuleInaccurate(
                f"{ref} in {precision} differs from float32 in {others} of {len(logits)} best "
                f"classes (allowed: {MAX_ARGMAX_DIFFERENCES}) and by {agreement.probability_difference:.3f} in a "
                f"probability (allowed: {MAX_PROBABILITY_DIFFERENCE})"
            )
        os.replace(written, path)
    return agreement


def _other_answers(reference: Logits, logits: Logits, temperature: float) -> int:
    """How many best classes of `reference` [N, K] that weren't nearly tied are others in `logits`."""
    chances = np.sort(probabilities(reference, temperature), axis=1)
    ahead = chances[:, -1] - chances[:, -2]
    return int(((reference.argmax(1) != logits.argmax(1)) & (ahead > TIE)).sum())


def as_json(prediction: Prediction) -> dict[str, Any]:
    """The shape of an HTTP answer's prediction, with the file's name."""
    if prediction.answer is None:
        return {"file": str(prediction.path), "error": prediction.error}
    answer = prediction.answer
    return {"file": str(prediction.path), **answer.best} | {
        "scores": answer.scores,
        "in_distribution": answer.in_distribution,
    }


def as_row(prediction: Prediction) -> list[str]:
    if prediction.answer is None:
        return ["", "", prediction.error or "", ""]
    answer = prediction.answer
    rest = "  ".join(f"{score['label']} {score['probability']:.1%}" for score in answer.scores[1:])
    return [answer.best["label"], f"{answer.best['probability']:.1%}", rest, "yes" if answer.in_distribution else "no"]


def _last_line(error: Exception) -> str:
    """TorchScript's messages are a stack first; what went wrong comes last."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
