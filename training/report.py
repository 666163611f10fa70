"""What a person looks at: learning curve, confusion matrix, the figures, and the model card."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from training.bundle.manifest import Manifest
from training.gate import Verdict
from training.trials import Trials

History = list[dict[str, Any]]

FIGURES = "metrics.json"
CARD = "model-card.md"

WHO = {  # the gate's comparisons
    "candidate": "this version",
    "active": "the active version",
    "nearest_mean": "the nearest class mean, which needs no training",
    "majority": "always the commonest class",
}
PASSED = {True: "passed", False: "failed", None: "open"}


def write(
    folder: Path,
    manifest: Manifest,
    history: History,
    counts: Tensor,
    *,
    verdict: Verdict | None = None,
    trials: Trials | None = None,
    pictures: Sequence[Path] = (),
) -> None:
    """Fill a bundle's report folder. `counts` is the confusion matrix [K, K], true class by row; `verdict`, the gate's
    on a fine-tuned candidate; `pictures` are put beside its own."""
    folder.mkdir()
    figures = {"metrics": manifest.metrics.model_dump(), "confusion": counts.tolist(), "history": history}
    if verdict is not None:
        figures["gate"] = verdict.model_dump(mode="json")
    if trials is not None:
        figures |= {"robustness": trials.robustness, "strangers": trials.strangers}
    for picture in pictures:
        shutil.copyfile(picture, folder / picture.name)
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    learning_curve(folder / "learning-curve.png", history)
    confusion_matrix(folder / "confusion.png", counts, manifest.classes)
    (folder / CARD).write_text(model_card(manifest, verdict, trials))


def read_verdict(folder: Path) -> Verdict:
    """The gate's, of a fine-tuned version's report folder."""
    return Verdict.model_validate(json.loads((folder / FIGURES).read_bytes())["gate"])


def learning_curve(path: Path, history: History) -> None:
    """Loss and accuracy over epochs, training set and hold-out, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in history]
    for place, name in enumerate(("loss", "accuracy"), start=1):
        axes = figure.add_subplot(1, 2, place)
        for part in ("train", "holdout"):
            axes.plot(epochs, [row[f"{part}_{name}"] for row in history], marker=".", label=part)
        axes.set(title=name, xlabel="epoch", ylabel="nats" if name == "loss" else "share right")
        axes.grid(alpha=0.3)
        axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    os.replace(temporary, path)  # it may be looked at while the run goes on


def confusion_matrix(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """True class by row, predicted class by column, as PNG; the shade is the share of the row."""
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(4.0, 0.45 * len(classes) + 2)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 25:
        for row, column in counts.nonzero().tolist():
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=7, color=shade)
    figure.savefig(path, dpi=100)


def model_card(manifest: Manifest, verdict: Verdict | None = None, trials: Trials | None = None) -> str:
    """What the model is for, what it was made from, what it scores, what the gate found where it was fine-tuned, and
    where not to trust it: Markdown."""
    metrics, training, size, network = manifest.metrics, manifest.training, manifest.input, manifest.network
    data, ood = training.dataset, manifest.ood
    scores = [
        ("accuracy, single view", f"{metrics.accuracy:.2%}"),
        ("macro-F1", f"{metrics.macro_f1:.4f}"),
        ("NLL, calibrated (before)", f"{metrics.nll:.4f} ({metrics.nll_uncalibrated:.4f})"),
        ("ECE, calibrated (before)", f"{metrics.ece:.2%} ({metrics.ece_uncalibrated:.2%})"),
    ]
    if metrics.accuracy_tta is not None:
        scores.insert(1, ("accuracy, averaged over shifted views", f"{metrics.accuracy_tta:.2%}"))
    recalls = [(name, f"{recall:.1%}") for name, recall in metrics.per_class_recall.items()]
    return f"""# {manifest.model}

Tells {len(manifest.classes)} classes apart: {", ".join(manifest.classes)}.

Takes pictures of {size.width} x {size.height} pixels with {size.channels} channel(s); any other picture is made to fit
(`{size.fit}`).

## Made from

{_parent(manifest)}Recipe `{manifest.recipe.name}`, seed {manifest.recipe.seed}: {training.epochs:g} epochs over
{data.train} images of {data.name} ({data.skipped} were left out), {training.seconds:.0f} s on {training.device} in
{training.precision} with torch {training.torch}. {data.holdout} more training images were held out for calibration.

Network `{network.name}`: {network.parameters:,} parameters, {network.macs / 1e6:.1f} million multiply-accumulates
for one picture.

## Scores, on {metrics.n} test images read once

{_table("figure", scores)}

{_table("recall of", recalls)}
{_gate(verdict) if verdict else ""}{_trials(trials) if trials else ""}
## Where not to trust it

Probabilities are calibrated (temperature {manifest.calibration.temperature:.3f}) for pictures like those it was
trained on. For others they mean little: read `in_distribution`, which is false where the `{ood.score}` score is below
{ood.threshold:.3f}, as it is for {1 - ood.true_positive_rate:.0%} of the held-out images. It knows no class beside
those named above.
"""


def _parent(manifest: Manifest) -> str:
    parent = manifest.parent
    return (
        f"Fine-tuned from {parent.model}@{parent.version} (weights {parent.weights_sha256[:12]}…).\n" if parent else ""
    )


def _gate(verdict: Verdict) -> str:
    """The verdict, what the version was compared with, and every question that was asked."""
    scores = [
        (WHO[name], f"{score.right} of {score.n}, {score.accuracy:.1%} ({score.low:.1%} to {score.high:.1%})")
        for name, score in verdict.comparisons.items()
    ]
    comparisons = "\n" + _table("right, of pictures that nothing was fitted to (95 % interval)", scores) + "\n"
    checks = "\n".join(f"- `{check.name}`, {PASSED[check.passed]}: {check.sentence}" for check in verdict.checks)
    return f"""
## What the gate found

{verdict.reason}
{comparisons if scores else ""}
{checks}
"""


def _trials(trials: Trials) -> str:
    """How it bears worse pictures, and whether it tells strangers."""
    accuracies = [(name, f"{share:.2%}") for name, share in trials.robustness.items()]
    areas = [(name, f"{area:.2%}") for name, area in trials.strangers.items()]
    strangers = "\n" + _table("strangers told from test images, area under ROC", areas) + "\n" if areas else ""
    return f"""
## On worse pictures

{_table("accuracy on test images with", accuracies)}
{strangers}"""


def _table(heading: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {heading} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
