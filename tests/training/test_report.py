"""The report: figures as they were measured, pictures that open, and a card that a person can read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import make_bundle
from training import report
from training.bundle import store
from training.bundle.manifest import Manifest, Metrics, Parent
from training.gate import Evidence, judge

HISTORY = [
    {
        "epoch": epoch,
        "step": 4 * epoch,
        "train_loss": 1 / epoch,
        "train_accuracy": 1 - 0.5 / epoch,
        "holdout_loss": 1.2 / epoch,
        "holdout_accuracy": 1 - 0.6 / epoch,
        "seconds": 1.5 * epoch,
    }
    for epoch in (1, 2, 3)
]
COUNTS = torch.tensor([[8, 2], [0, 0]])  # a class without a picture has an empty row


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    ref = make_bundle(tmp_path / "artifacts")
    figures = Metrics(
        n=10,
        accuracy=0.8,
        accuracy_tta=0.9,
        macro_f1=0.4444,
        per_class_recall={"cat": 0.8, "dog": 0.0},
        nll=0.41,
        nll_uncalibrated=0.52,
        ece=0.013,
        ece_uncalibrated=0.14,
    )
    manifest = store.read_manifest(tmp_path / "artifacts", ref)
    return manifest.model_copy(update={"metrics": figures, "classes": ("cat", "dog")})


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_a_report_has_figures_pictures_and_a_card(tmp_path: Path, manifest: Manifest) -> None:
    report.write(tmp_path / "report", manifest, HISTORY, COUNTS)
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"metrics.json", "learning-curve.png", "confusion.png", "model-card.md"}
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == {
        "metrics": manifest.metrics.model_dump(),
        "confusion": COUNTS.tolist(),
        "history": HISTORY,
    }
    assert size(tmp_path / "report" / "learning-curve.png") == (900, 360)
    assert size(tmp_path / "report" / "confusion.png") == (400, 400)
    assert (tmp_path / "report" / report.CARD).read_text() == report.model_card(manifest)


def test_a_curve_of_one_epoch_can_be_drawn(tmp_path: Path) -> None:
    report.learning_curve(tmp_path / "curve.png", HISTORY[:1])
    assert size(tmp_path / "curve.png") == (900, 360)


@pytest.mark.parametrize("classes", [2, 26, 60])
def test_a_confusion_matrix_grows_with_its_classes(tmp_path: Path, classes: int) -> None:
    counts = torch.eye(classes, dtype=torch.long) * 7
    report.confusion_matrix(tmp_path / "confusion.png", counts, [f"class {index}" for index in range(classes)])
    width, height = size(tmp_path / "confusion.png")
    assert width == height == pytest.approx(max(400, 100 * (0.45 * classes + 2)), abs=1)


def test_the_card_tells_what_it_scores_and_where_not_to_trust_it(manifest: Manifest) -> None:
    card = report.model_card(manifest)
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))
    assert rows == {
        "figure": "value",
        "accuracy, single view": "80.00%",
        "accuracy, averaged over shifted views": "90.00%",
        "macro-F1": "0.4444",
        "NLL, calibrated (before)": "0.4100 (0.5200)",
        "ECE, calibrated (before)": "1.30% (14.00%)",
        "recall of": "value",
        "cat": "80.0%",
        "dog": "0.0%",
    }
    assert card.startswith("# greys\n\nTells 2 classes apart: cat, dog.\n")
    assert "## Scores, on 10 test images read once" in card
    assert "## Where not to trust it" in card


def answers(*right: bool) -> np.ndarray:
    """Shares of two classes, of which the pictures show one each in turn."""
    told = np.where(right, np.arange(len(right)) % 2, 1 - np.arange(len(right)) % 2)
    return np.where(np.arange(2) == told[:, None], 0.75, 0.25)


GATE = """
## What the gate found

fixed 20 of 40, broke 0; p = 1e-6; promoted

| right, of pictures that nothing was fitted to (95 % interval) | value |
|---|---|
| this version | 40 of 40, 100.0% (91.2% to 100.0%) |
| the active version | 20 of 40, 50.0% (35.2% to 64.8%) |
| always the commonest class | 20 of 40, 50.0% (35.2% to 64.8%) |

- `outputs`, passed: Its outputs are finite and differ from picture to picture.
"""


def test_the_card_of_a_fine_tuned_version_tells_its_parent_and_what_the_gate_found(manifest: Manifest) -> None:
    parent = Parent(model="cifar10", version="3", weights_sha256="c0ffee" * 10 + "0000")
    verdict = judge(Evidence(("cat", "dog"), np.arange(40) % 2, answers(*[True] * 40), answers(*[True, False] * 20)))
    card = report.model_card(manifest.model_copy(update={"parent": parent}), verdict)
    assert "\n## Made from\n\nFine-tuned from cifar10@3 (weights c0ffeec0ffee…).\nRecipe `tiny`, seed 0: " in card
    before, found, after = card.partition(GATE)
    assert found
    assert before.endswith("| dog | 0.0% |\n")
    told, _, _ = after.partition("\n## Where not to trust it\n")
    assert re.findall(r"^- `(\w+)`, (\w+): (.+)$", told, re.M) == [
        (check.name, "open" if check.name in ("guard", "latency", "size") else "passed", check.sentence)
        for check in verdict.checks[1:]
    ]


def test_a_candidate_that_was_compared_with_nothing_has_a_card(manifest: Manifest) -> None:
    same = judge(Evidence(("cat", "dog"), np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]])))
    card = report.model_card(manifest, same)
    assert (
        "\n## What the gate found\n\nrefused: it answers `cat` whatever the picture.\n\n"
        "- `outputs`, failed: it answers `cat` whatever the picture.\n\n## Where not to trust it\n"
    ) in card


def test_a_card_without_views_does_not_speak_of_them(manifest: Manifest) -> None:
    single = manifest.model_copy(update={"metrics": manifest.metrics.model_copy(update={"accuracy_tta": None})})
    assert "views" not in report.model_card(single)
