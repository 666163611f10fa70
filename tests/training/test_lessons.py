"""Lessons: what the teacher says of a view is what the student is told of that view."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY, squares
from training import augment, checkpoint, events, lessons
from training.loop import Batches
from training.networks import Network, build
from training.recipes import Recipe

CPU = torch.device("cpu")
SHOWN = TINY.model_copy(update={"flip": True, "shift": 3, "shift_step": 2})


@pytest.fixture
def teacher() -> Network:
    torch.manual_seed(0)
    network = build("convnet", TINY.arguments | {"channels": 1, "classes": 2})
    network.initialize(squares().train.images)
    return network.eval()


def take(teacher: Network, recipe: Recipe, folder: Path, told: list[events.Event] | None = None) -> lessons.Lessons:
    emit = (lambda _: None) if told is None else told.append
    return lessons.take(teacher, squares().train, recipe, folder, CPU, torch.float32, emit)


def says(teacher: Network, images: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher(images)


@pytest.mark.parametrize("changes", [{}, {"flip": False}, {"shift": 0, "shift_step": 1}], ids=str)
def test_a_batch_comes_with_the_teachers_logits_of_its_very_views(
    teacher: Network, tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = SHOWN.model_copy(update=changes)
    batches = Batches(squares().train, recipe, 0, CPU, take(teacher, recipe, tmp_path))
    for step in range(10):  # two epochs, so that each picture is seen both ways
        batch = batches.at(step)
        assert batch.taught is not None
        assert torch.allclose(batch.taught, says(teacher, batch.images), atol=0.01)  # kept in half precision


def test_a_student_s_own_cutout_is_not_the_teachers(teacher: Network, tmp_path: Path) -> None:
    recipe = SHOWN.model_copy(update={"cutout": 6})
    batch = Batches(squares().train, recipe, 0, CPU, take(teacher, recipe, tmp_path)).at(0)
    assert batch.taught is not None
    assert not torch.allclose(batch.taught, says(teacher, batch.images), atol=0.05)


def test_every_view_is_looked_at_once_and_kept(teacher: Network, tmp_path: Path) -> None:
    told: list[events.Event] = []
    taken = take(teacher, SHOWN, tmp_path, told)
    assert taken.teacher == checkpoint.weights_sha256(teacher)
    assert taken.logits.shape == (2, 3, 3, 80, 2)
    assert [event.model_dump(include={"phase", "step", "steps"}) for event in told] == [
        {"phase": "lessons", "step": step, "steps": 18} for step in range(18)
    ]
    moved = augment.move(squares().train.images, torch.full((80,), -2), torch.full((80,), 2), 3)
    mirrored = augment.mirror(moved, torch.full((80,), True))
    assert torch.allclose(taken.logits[1, 0, 2].float(), says(teacher, mirrored), atol=0.01)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / sorted(before)[5]).write_bytes(b"torn")
    again = take(teacher, SHOWN, tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert torch.equal(again.logits, taken.logits)
    assert [name for name in after if after[name] != before[name]] == [sorted(before)[5]]


def test_another_teacher_is_asked_anew(teacher: Network, tmp_path: Path) -> None:
    first = take(teacher, SHOWN, tmp_path)
    with torch.no_grad():
        teacher.head.weight.mul_(2)
    second = take(teacher, SHOWN, tmp_path)
    assert second.teacher != first.teacher
    assert torch.allclose(second.logits.float(), 2 * first.logits.float(), atol=0.01)
