"""What a teacher says of every picture, in each of the views that a recipe shows: computed once, looked up ever after.

A student learns most from a teacher that sees just what it sees (Beyer et al., 2022), and a teacher is dear. So the
views are few: mirrored or not, and moved by multiples of `shift_step`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from training import augment, checkpoint, events
from training.checkpoint import CheckpointError
from training.datasets import Split
from training.devices import in_precision
from training.evaluate import infer
from training.networks import Network
from training.recipes import Recipe

BATCH = 500

View = tuple[bool, int, int]  # mirrored, moved down, moved to the right


@dataclass(frozen=True)
class Lessons:
    teacher: str  # the digest of its weights
    logits: Tensor  # [1 or 2, P, P, N, K] float16: mirrored, down, right, picture
    shift_step: int

    def of(self, index: Tensor, mirrored: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """Logits [B, K] of pictures [B], each in its view [B]."""
        centre = self.logits.shape[1] // 2
        down, right = (centre + moved // self.shift_step for moved in (down, right))
        return self.logits[mirrored.long(), down, right, index].float()


def take(
    teacher: Network,
    split: Split,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    precision: torch.dtype,
    emit: Callable[[events.Event], None],
) -> Lessons:
    """Have the teacher look at every view of every picture; what a folder already holds isn't computed again."""
    digest = checkpoint.weights_sha256(teacher)
    folder.mkdir(exist_ok=True)
    views = list(_views(recipe))
    folded = teacher.folded().to(device)
    found = []
    for done, view in enumerate(views):
        emit(events.Phase(phase="lessons", step=done, steps=len(views)))
        path = folder / f"{digest[:16]}-{done}.pt"
        if (logits := _taken(path)) is None:
            logits = _look(folded, split, view, recipe.shift, device, precision)
            checkpoint.write(path, {"logits": logits})
        found.append(logits)
    moves = 2 * (recipe.shift // recipe.shift_step) + 1
    return Lessons(digest, torch.stack(found).unflatten(0, (-1, moves, moves)), recipe.shift_step)


def _views(recipe: Recipe) -> Iterator[View]:
    reach = recipe.shift // recipe.shift_step
    moves = [recipe.shift_step * place for place in range(-reach, reach + 1)]
    return product((False, True) if recipe.flip else (False,), moves, moves)


def _look(
    teacher: Network, split: Split, view: View, shift: int, device: torch.device, precision: torch.dtype
) -> Tensor:
    """Logits [N, K] of all pictures in one view."""

    def classify(images: Tensor) -> Tensor:
        mirrored, down, right = (torch.full((len(images),), value) for value in view)
        seen = augment.mirror(augment.move(images.cpu(), down, right, shift), mirrored)
        return teacher(seen.to(device, memory_format=torch.channels_last))

    with in_precision(precision, device):
        return infer(classify, split.images, device, batch=BATCH).half()


def _taken(path: Path) -> Tensor | None:
    try:
        with checkpoint.reading(path) as content:
            return content["logits"]
    except CheckpointError:  # not there, or torn
        return None
