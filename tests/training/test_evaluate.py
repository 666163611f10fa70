"""Evaluation: figures worked out by hand."""

import pytest
import torch
from torch import Tensor, nn

from training.evaluate import SHIFTS, accuracy, confusion, infer, metrics

CPU = torch.device("cpu")

# Three classes, six pictures: cat, cat, cat, dog, dog, eel, answered as cat, cat, dog, dog, eel, eel.
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
ANSWERS = torch.tensor([0, 0, 1, 1, 2, 2])
LOGITS = torch.nn.functional.one_hot(ANSWERS, 3).float() * 2
COUNTS = [[2, 1, 0], [0, 1, 1], [0, 0, 1]]


def pixels(count: int = 7, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 4, 5), dtype=torch.uint8, generator=random)


def test_confusion_counts_true_classes_by_row() -> None:
    assert confusion(LOGITS, LABELS).tolist() == COUNTS


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy(LOGITS, LABELS) == pytest.approx(4 / 6)


def test_every_figure_is_the_one_worked_out_by_hand() -> None:
    right, wrong = torch.tensor([[2.0, 0, 0], [0, 2.0, 0]]).log_softmax(1)[:, 0].tolist()
    hot_right, hot_wrong = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).log_softmax(1)[:, 0].tolist()
    f1 = [2 * 2 / (3 + 2), 2 * 1 / (2 + 2), 2 * 1 / (1 + 2)]
    figures = metrics(LOGITS, LABELS, ("cat", "dog", "eel"), temperature=2.0, logits_tta=LOGITS.roll(1, dims=1))
    assert figures.model_dump() == {
        "n": 6,
        "accuracy": pytest.approx(4 / 6),
        "accuracy_tta": 0.0,
        "macro_f1": pytest.approx(sum(f1) / 3),
        "per_class_recall": {"cat": pytest.approx(2 / 3), "dog": 0.5, "eel": 1.0},
        "nll": pytest.approx(-(4 * hot_right + 2 * hot_wrong) / 6),
        "nll_uncalibrated": pytest.approx(-(4 * right + 2 * wrong) / 6),
        "ece": pytest.approx(abs(4 / 6 - torch.tensor(hot_right).exp().item())),
        "ece_uncalibrated": pytest.approx(abs(4 / 6 - torch.tensor(right).exp().item())),
    }


def test_a_class_without_a_test_picture_has_no_recall_and_no_f1() -> None:
    figures = metrics(LOGITS[:3], LABELS[:3], ("cat", "dog", "eel"), temperature=1.0)
    assert figures.per_class_recall == {"cat": pytest.approx(2 / 3), "dog": 0.0, "eel": 0.0}
    assert figures.accuracy_tta is None


class Brightness(nn.Module):
    """One logit a pixel, and a note of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[torch.dtype, int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append((images.dtype, len(images), self.training))
        return images.flatten(1).double()


def test_a_single_view_is_the_raw_picture_in_batches_in_evaluation_mode() -> None:
    network = Brightness()
    logits = infer(network, pixels(), CPU, batch=3)
    assert torch.equal(logits, pixels().flatten(1).float())
    assert network.given == [(torch.uint8, 3, False), (torch.uint8, 3, False), (torch.uint8, 1, False)]


@pytest.mark.parametrize("views", ["shifts", "mirrored shifts"])
def test_the_weights_of_all_views_sum_to_1(views: str) -> None:
    assert torch.equal(infer(lambda images: torch.ones(len(images), 3), pixels(), CPU, views), torch.ones(7, 3))


def test_views_are_the_picture_moved_by_a_pixel() -> None:
    padded = torch.nn.functional.pad(pixels().float(), (1, 1, 1, 1), mode="reflect")
    expected = sum(weight * padded[:, :, 1 + y : 5 + y, 1 + x : 6 + x] for y, x, weight in SHIFTS)
    shifted = infer(Brightness(), pixels(), CPU, "shifts")
    assert torch.allclose(shifted, expected.flatten(1))
    mirrored = infer(Brightness(), pixels(), CPU, "mirrored shifts").view(7, 1, 4, 5)
    assert torch.allclose(mirrored, (expected + expected.flip(3)) / 2)
