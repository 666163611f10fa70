"""The training loop. Read it downward: batches, then `train`: forward, loss, backward, schedule, step, evaluate, save.

What a batch looks like depends on the seed and the step alone, so a run that goes on from a checkpoint ends with the
weights of one that never stopped.
"""

import hashlib
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from training import augment, checkpoint, events
from training.checkpoint import State
from training.costs import held_out_cost
from training.datasets import Dataset, Split, holdout
from training.devices import device_name, training_precision
from training.drawings import drawn_images
from training.evaluate import accuracy, infer
from training.gradient import Batch, Gradient
from training.graph import Recorded, recorder
from training.hold import working_time
from training.lessons import Lessons
from training.networks import Network, build
from training.optimizers import (
    build_optimizers,
    clip_gradient,
    gradient_norms,
    place_learning_rates,
    set_learning_rate,
    step_all,
)
from training.ranks import ALONE, Ranks
from training.recipes import Muon, Recipe

if TYPE_CHECKING:
    from training.board import Board

CHECKPOINT = "checkpoint.pt"
STRANGERS = 4000  # are drawn, once; batches take theirs from them

Emit = Callable[[events.Event], None]


class Interrupted(Exception):
    """SIGINT or SIGTERM; a checkpoint was written at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class Diverged(Exception):
    """The loss or the weights stopped being finite at `step`; the last checkpoint holds the last good weights."""

    def __init__(self, step: int, good_step: int, lower: str = "the optimizer's learning rate") -> None:
        super().__init__(
            f"the loss is not finite at step {step}; the weights of step {good_step} are kept. Lower {lower}"
        )
        self.step = step


@dataclass(frozen=True)
class Trained:
    network: Network
    train: Split  # what the weights were fitted to
    held: Split  # what was kept back of the training split
    history: list[dict[str, float]]
    seconds: float
    arithmetic: dict[str, str]  # device, precision and torch that it was trained with
    device: torch.device  # where the network is now


def train(
    recipe: Recipe,
    dataset: Dataset,
    run: Path,
    *,
    seed: int,
    device: torch.device,
    resume: bool = False,
    lessons: Lessons | None = None,
    ranks: Ranks = ALONE,
    watched: bool = True,
    emit: Emit,
) -> Trained:
    """Train a network by a recipe, in the folder `run`; `lessons` are a teacher's, where the recipe has one.

    Where it is `watched`, curves and pictures are written while it goes on.

    Raises Interrupted, Diverged, CheckpointError.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where steps are recorded
    fitted, held = holdout(dataset.train, recipe.holdout)
    batches = Batches(fitted, recipe, seed, device, lessons, ranks)
    steps = batches.steps
    scale = batches.size if isinstance(recipe.optimizer, Muon) else 1  # Muon's rates are per example
    precision = torch.float32 if recipe.precision == "float32" else training_precision(device)

    network = new_network(recipe, dataset)
    network.initialize(fitted.images)
    network = network.to(device)
    optimizers = build_optimizers(network, recipe, batches.size)
    identity = {"recipe": recipe.model_dump(mode="json"), "seed": seed, "dataset": dataset.sha256, "steps": steps}
    identity |= {"teacher": lessons.teacher} if lessons else {}
    keeper = Keeper(run / CHECKPOINT, network, optimizers, ranks, emit)
    state = keeper.begin(State(identity, arithmetic_of(device, precision)), resume)
    place_learning_rates(optimizers, device)
    gradient = Gradient(network, recipe, scale, state.precision, device, recorder(device))
    take_step = Recorded(lambda: step_all(optimizers), recorder(device))

    emit(_started(recipe, dataset, seed, device, state, steps))
    with stop_signals() as stopped, _shown(run, state.step, watched and ranks.is_first) as shown:
        clock = Clock(batches.size, steps, state)
        while state.step < steps and not state.over:
            batch = batches.at(state.step)
            if state.step == 0:
                shown.begun(batch.images, batch.labels, dataset.classes)

            set_learning_rate(optimizers, recipe, state.step, steps)
            network.train()
            seed_dropout(seed_of(seed, "dropout", state.step), device)
            loss, right = gradient(batch)
            ranks.average_gradients(network, len(batch.labels) / batches.size)
            loss_sum, all_right = ranks.sum([loss.item() * len(batch.labels), right.item()], device)
            if not math.isfinite(loss_sum):
                raise Diverged(state.step, keeper.good_step)
            clip_gradient(network, recipe.clip_norm)
            take_step()

            state.count(loss_sum, int(all_right), batches.size, clock.seconds())
            emit(clock.progress(state.step / batches.per_epoch, loss_sum / batches.size, state.right / state.seen))
            if state.step % batches.per_epoch == 0 or state.step == steps:
                row = _end_epoch(state, recipe, network, held, device, batches.per_epoch)
                shown.epoch(row, state.gradients[-1])
                keeper.keep_best(state, recipe)
                emit(events.Epoch.model_validate(row))
                keeper.save(state)
            if any(ranks.sum([stopped()], device)):  # all of them, or the others would wait for this one
                keeper.save(state)
                emit(events.Interrupted(step=state.step))
                raise Interrupted(state.step)
        if state.best is not None:
            network.load_state_dict(state.best)
        shown.ended(network, fitted.images[0], state.gradients, state.step)
    return Trained(network.eval(), fitted, held, state.history, state.seconds, state.arithmetic, device)


def new_network(recipe: Recipe, dataset: Dataset) -> Network:
    arguments = recipe.arguments | {"channels": recipe.input.channels, "classes": len(dataset.classes)}
    return build(recipe.network, arguments)


class Batches:
    """Augmented batches, each a function of the seed and the step. Every epoch has its own order; the rest that doesn't
    fill a batch is left for another epoch's order to bring in."""

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        lessons: Lessons | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.images, self.labels = split.images.to(device), split.labels.to(device)  # [N, C, H, W] and [N], once
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.lessons = lessons
        self.ranks = ranks
        self.size = min(recipe.batch_size, len(split))
        self.strangers = _drawn(recipe, seed).to(device)  # [D, C, H, W]
        self.per_epoch = len(split) // self.size
        self.steps = max(1, round(recipe.epochs * self.per_epoch))
        self._mirrored_first = torch.rand(len(split), generator=generator(seed, "mirror")) < 0.5  # [N]
        self._order = self._epoch_order(0)

    def at(self, step: int) -> Batch:
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = self._epoch_order(epoch)
        index = self.ranks.share(self._order[1][place * self.size : (place + 1) * self.size])  # [B]
        random = generator(self.seed, "augment", step * self.ranks.count + self.ranks.rank)
        here = index.to(self.device)
        images, recipe = self.images[here], self.recipe
        if recipe.affine.moves:
            images = augment.random_affine(images, **recipe.affine.model_dump(), generator=random)
        down = right = torch.zeros(len(index), dtype=torch.long)
        if recipe.shift:
            down, right = augment.random_shifts(len(index), recipe.shift, recipe.shift_step, random)
            images = augment.move(images, down, right, recipe.shift)
        mirrored = torch.zeros(len(index), dtype=torch.bool)
        if recipe.flip:  # in any two epochs each image is seen both ways, which chance doesn't grant (Jordan, 2024)
            mirrored = self._mirrored_first[index] ^ (epoch % 2 == 1)
            images = augment.mirror(images, mirrored)
        if recipe.trivial:
            images = augment.trivial(images, recipe.trivial, random)
        if recipe.cutout:
            images = augment.cutout(images, recipe.cutout, random)
        if recipe.strangers:
            strange = torch.randint(len(self.strangers), (round(recipe.strangers * len(index)),), generator=random)
            images = torch.cat([images.float(), self.strangers[strange.to(self.device)].float()])
        if step < recipe.smaller.share * self.steps:
            images = augment.scaled(images, recipe.smaller.size(*images.shape[2:]))
        taught = None if self.lessons is None else self.lessons.of(index, mirrored, down, right).to(self.device)
        return Batch(images.to(memory_format=torch.channels_last), self.labels[here], taught)

    def _epoch_order(self, epoch: int) -> tuple[int, Tensor]:
        return epoch, torch.randperm(len(self.labels), generator=generator(self.seed, "order", epoch))


def _drawn(recipe: Recipe, seed: int) -> Tensor:
    if not recipe.strangers:
        return torch.empty(0)
    return torch.from_numpy(drawn_images(recipe.input, STRANGERS, f"strangers {seed}"))


def generator(*key: int | str) -> Generator:
    """Randomness by name: the same key gives the same numbers, on any machine and after any restart."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_dropout(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which also notes its caller's stack for each device that isn't there: as long as a step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def seed_of(*key: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big", signed=True)


# --- the parts that would clutter the loop ----------------------------------------------------------------------------


def _end_epoch(
    state: State, recipe: Recipe, network: Network, held: Split, device: torch.device, per_epoch: int
) -> dict[str, Any]:
    """Close the epoch's sums into a row of the history, with the hold-out's figures beside them."""
    logits = infer(network, held.images, device)
    row = {
        "epoch": math.ceil(state.step / per_epoch),
        "step": state.step,
        "train_loss": state.loss_sum / state.seen,
        "train_accuracy": state.right / state.seen,
        "holdout_loss": held_out_cost(recipe, logits, held.labels),
        "holdout_accuracy": accuracy(logits, held.labels),
        "seconds": state.seconds,
    }
    state.history.append(row)
    state.gradients.append(gradient_norms(network))
    state.loss_sum, state.right, state.seen = 0.0, 0, 0
    return row


@contextmanager
def _shown(run: Path, step: int, watched: bool) -> Iterator["Board | Unwatched"]:
    if not watched:
        yield Unwatched()
        return
    from training.board import Board  # half a second of tensorboard and matplotlib, which fine-tuning doesn't need

    with Board(run, step) as board:
        yield board


class Unwatched:
    """A board that nobody looks at."""

    def begun(self, *_: object) -> None: ...

    def epoch(self, *_: object) -> None: ...

    def ended(self, *_: object) -> None: ...


class Keeper:
    """Owns a run's checkpoint. Of several processes the first alone writes it, and all read it."""

    def __init__(
        self, path: Path, network: Network, optimizers: list[torch.optim.Optimizer], ranks: Ranks, emit: Emit
    ) -> None:
        self.path, self.network, self.optimizers, self.ranks, self.emit = path, network, optimizers, ranks, emit
        self.good_step = 0

    def begin(self, anew: State, resume: bool) -> State:
        """Where the run stands. Raises CheckpointError where it can't be gone on with."""
        if not resume:
            self._write(anew)
            return anew
        state = checkpoint.load(self.path, anew.identity, self.network, self.optimizers)
        self.good_step = state.step
        anew.arithmetic["precision"] = state.arithmetic["precision"]  # as it was begun, whatever is measured now
        if state.arithmetic != anew.arithmetic and state.step < state.identity["steps"]:
            words = f"begun with {state.arithmetic}, goes on with {anew.arithmetic}: not bit for bit"
            self.emit(events.Notice(message=words))
        return state

    def save(self, state: State) -> None:
        """Raises Diverged where the last step has ruined the weights; the last good checkpoint stays."""
        if not checkpoint.all_finite(self.network):
            raise Diverged(state.step, self.good_step)
        self._write(state)
        self.good_step = state.step
        self.emit(events.Checkpointed(step=state.step, path=str(self.path)))

    def _write(self, state: State) -> None:
        if self.ranks.is_first:
            checkpoint.save(self.path, state, self.network, self.optimizers)

    def keep_best(self, state: State, recipe: Recipe) -> None:
        """With patience, keep the weights of the epoch that did best on the hold-out; the run is over once that is long
        ago."""
        if recipe.patience is None:
            return
        found = [row["holdout_accuracy"] for row in state.history]
        since = len(found) - 1 - found.index(max(found))
        if since == 0:
            state.best = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        state.over = since >= recipe.patience


def arithmetic_of(device: torch.device, precision: torch.dtype) -> dict[str, str]:
    """What equal weights depend on beside the run's identity; a resumed run should have the same."""
    return {
        "device": device_name(device),  # with the number of threads
        "precision": str(precision).removeprefix("torch."),
        "torch": str(torch.__version__),  # a plain string: loading a checkpoint allows no other class
    }


def _started(
    recipe: Recipe, dataset: Dataset, seed: int, device: torch.device, state: State, steps: int
) -> events.Started:
    return events.Started(
        recipe=recipe.name,
        dataset=dataset.name,
        seed=seed,
        device=device.type,
        precision=state.arithmetic["precision"],
        steps=steps,
        step=state.step,
    )


class Clock:
    """Time spent, in this sitting and before it, and time left."""

    def __init__(self, batch: int, steps: int, state: State) -> None:
        self._batch, self._steps, self._step, self._first = batch, steps, state.step, state.step
        self._before = state.seconds
        self._start = self._last = working_time()

    def seconds(self) -> float:
        return self._before + working_time() - self._start

    def progress(self, epoch: float, loss: float, accuracy: float) -> events.Progress:
        """Count a step; what is given is passed on."""
        now, self._step = working_time(), self._step + 1
        rate, self._last = self._batch / (now - self._last), now
        pace = (now - self._start) / (self._step - self._first)
        return events.Progress(
            step=self._step,
            steps=self._steps,
            epoch=epoch,
            loss=loss,
            accuracy=accuracy,
            images_per_second=rate,
            seconds_left=pace * (self._steps - self._step),
        )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of dying of them; a second one has its usual effect."""
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        restore()
