"""Golden samples: what they prove, and what they refuse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from training.bundle import store
from training.bundle.golden import SAMPLES, Agreement, Golden, GoldenMismatch, compare, read_golden, write_golden
from training.bundle.manifest import GOLDEN, Manifest
from training.bundle.store import BundleRef


@pytest.fixture
def manifest(artifacts: Path) -> Manifest:
    return store.read_manifest(artifacts, BundleRef("greys", "1"))


@pytest.fixture
def path(artifacts: Path) -> Path:
    return artifacts / "greys" / "1" / GOLDEN


def test_golden_samples_survive_being_written_and_read(tmp_path: Path, path: Path, manifest: Manifest) -> None:
    golden = read_golden(path, manifest)
    write_golden(tmp_path / GOLDEN, golden)
    again = read_golden(tmp_path / GOLDEN, manifest)
    assert len(again.images) == SAMPLES
    assert np.array_equal(again.images, golden.images)
    assert np.array_equal(again.logits, golden.logits)


IMAGES, LOGITS = np.zeros((4, 1, 8, 8), np.uint8), np.zeros((4, 16), np.float32)


@pytest.mark.parametrize(
    ("images", "logits", "what"),
    [
        (IMAGES.astype(np.float32), LOGITS, "golden images are float32"),
        (IMAGES[:, :, :7], LOGITS, r"\(4, 1, 7, 8\); the input is uint8 \(1, 8, 8\)"),
        (IMAGES[:0], LOGITS[:0], "golden images"),
        (IMAGES, LOGITS[:, :15], r"golden logits are float32 \(4, 15\); the manifest says float32 \(4, 16\)"),
        (IMAGES, LOGITS[:3], "golden logits"),
        (IMAGES, LOGITS.astype(np.float64), "golden logits are float64"),
        (IMAGES, np.full_like(LOGITS, np.nan), "golden logits are not all finite"),
    ],
    ids=["images' type", "images' size", "no images", "classes", "count", "logits' type", "not finite"],
)
def test_samples_of_another_model_are_refused(
    tmp_path: Path, manifest: Manifest, images: np.ndarray, logits: np.ndarray, what: str
) -> None:
    write_golden(tmp_path / GOLDEN, Golden(images.copy(), logits.copy()))
    with pytest.raises(GoldenMismatch, match=what):
        read_golden(tmp_path / GOLDEN, manifest)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\x80\x04K\x01."),
        lambda path: save_file({"images": IMAGES}, path),
    ],
    ids=["missing", "empty", "truncated", "pickle", "no logits"],
)
def test_a_file_that_can_not_be_read_says_so(path: Path, manifest: Manifest, damage: Callable[[Path], object]) -> None:
    damage(path)
    with pytest.raises(GoldenMismatch, match=rf"^{GOLDEN} can't be read: "):
        read_golden(path, manifest)


def test_equal_runs_agree() -> None:
    logits = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    assert compare(logits, logits.copy(), temperature=1.5) == Agreement(0.0, 0.0, 0)


def test_a_difference_is_measured_in_three_ways() -> None:
    reference = np.array([[0, 1], [2, 0], [0, 4]], np.float32)
    candidate = np.array([[0, 1], [0, 0.5], [0, 4]], np.float32)
    probability = 1 / (1 + np.exp(-1.0)) - 1 / (1 + np.exp(0.25))  # of the first class, at temperature 2
    assert compare(reference, candidate, temperature=2.0) == Agreement(2.0, pytest.approx(probability), 1)


def test_a_difference_of_large_logits_is_measured_by_their_size() -> None:
    reference = np.array([[0, 1000]], np.float32)
    assert compare(reference, reference + 1, temperature=1.0).logit_difference == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_run_with_nan_or_infinity_is_refused(bad: float) -> None:
    reference = np.zeros((2, 2), np.float32)
    candidate = reference.copy()
    candidate[1, 1] = bad
    with pytest.raises(GoldenMismatch, match="NaN or infinity"):
        compare(reference, candidate, 1.0)


def test_a_run_of_another_shape_is_refused() -> None:
    with pytest.raises(GoldenMismatch, match=r"with \(2, 3\), not \(2, 2\)"):
        compare(np.zeros((2, 2), np.float32), np.zeros((2, 3), np.float32), 1.0)
