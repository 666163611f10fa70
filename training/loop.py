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
import torch.nn.functional as F
from torch import Generator, Tensor

from training import augment, checkpoint, events
from training.checkpoint import State
from training.datasets import Dataset, Split, holdout
from training.devices import device_name, training_precision
from training.evaluate import accuracy, infer
from training.hold import working_time
from training.networks import ConvNet, build
from training.optimizers import build_optimizers, set_learning_rate
from training.recipes import Recipe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"

Emit = Callable[[events.Event], None]


class Interrupted(Exception):
    """SIGINT or SIGTERM; a checkpoint was written at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


class Diverged(Exception):
    """The loss or the weights stopped being finite at `step`; the last checkpoint holds the last good weights."""

    def __init__(self, step: int, good_step: int, lower: str = "filter_lr, bias_lr or head_lr") -> None:
        super().__init__(
            f"the loss is not finite at step {step}; the weights of step {good_step} are kept. Lower {lower}"
        )
        self.step = step


@dataclass(frozen=True)
class Trained:
    network: ConvNet
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
    emit: Emit,
) -> Trained:
    """Train a network by a recipe, in the folder `run`. Raises Interrupted, Diverged, CheckpointError."""
    from torch.utils.tensorboard import SummaryWriter  # a quarter of a second; fine-tuning, which imports us, has none

    torch.manual_seed(seed)
    fitted, held = holdout(dataset.train, recipe.holdout)
    batches = Batches(fitted, recipe, seed, device)
    steps = max(1, round(recipe.epochs * batches.per_epoch))
    precision = training_precision(device)

    network = new_network(recipe, dataset)
    network.initialize(fitted.images)
    network = network.to(device)
    optimizers = build_optimizers(network, recipe, batches.size)
    identity = {"recipe": recipe.model_dump(mode="json"), "seed": seed, "dataset": dataset.sha256, "steps": steps}
    arithmetic = arithmetic_of(device, precision)
    path = run / CHECKPOINT
    if resume:
        state = checkpoint.load(path, identity, network, optimizers)
        if state.arithmetic != arithmetic and state.step < steps:
            emit(events.Notice(message=f"begun with {state.arithmetic}, goes on with {arithmetic}: not bit for bit"))
    else:
        state = State(identity, arithmetic)
        checkpoint.save(path, state, network, optimizers)
    good_step = state.step

    emit(_started(recipe, dataset, seed, device, precision, state.step, steps))
    with stop_signals() as stopped, SummaryWriter(run / "tensorboard", purge_step=state.step + 1) as board:
        clock = Clock(batches.size, steps, state)
        while state.step < steps:
            images, labels = batches.at(state.step)

            set_learning_rate(optimizers, progress=state.step / steps)
            network.train()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing, reduction="sum")
            if not math.isfinite(loss_sum := loss.item()):
                raise Diverged(state.step, good_step)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            state.step += 1
            state.loss_sum += loss_sum
            state.right += int((logits.argmax(1) == labels).sum())
            state.seen += len(labels)
            state.seconds = clock.seconds()
            emit(clock.progress(state.step / batches.per_epoch, loss_sum / len(labels), state.right / state.seen))

            if state.step % batches.per_epoch == 0 or state.step == steps:
                row = _end_epoch(state, network, held, device, batches.per_epoch)
                _log(board, row)
                emit(events.Epoch.model_validate(row))
                good_step = _save(path, state, network, optimizers, good_step)
                emit(events.Checkpointed(step=state.step, path=str(path)))
            if stopped():
                _save(path, state, network, optimizers, good_step)
                emit(events.Checkpointed(step=state.step, path=str(path)))
                emit(events.Interrupted(step=state.step))
                raise Interrupted(state.step)
    return Trained(network.eval(), fitted, held, state.history, state.seconds, state.arithmetic, device)


def new_network(recipe: Recipe, dataset: Dataset) -> ConvNet:
    arguments = recipe.arguments | {"channels": recipe.input.channels, "classes": len(dataset.classes)}
    return build(recipe.network, arguments)


class Batches:
    """Augmented batches, each a function of the seed and the step. Every epoch has its own order; the rest that doesn't
    fill a batch is left for another epoch's order to bring in."""

    def __init__(self, split: Split, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.split = split
        self.recipe = recipe
        self.seed = seed
        self.device = device
        self.size = min(recipe.batch_size, len(split))
        self.per_epoch = len(split) // self.size
        self._mirrored_first = torch.rand(len(split), generator=generator(seed, "mirror")) < 0.5  # [N]
        self._order = self._epoch_order(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W], pixels 0 … 255 of some type, and labels [B], of one step."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = self._epoch_order(epoch)
        index = self._order[1][place * self.size : (place + 1) * self.size]  # [B]
        images, recipe, random = self.split.images[index], self.recipe, generator(self.seed, "augment", step)
        if recipe.affine.moves:
            images = augment.random_affine(images, **recipe.affine.model_dump(), generator=random)
        if recipe.shift:
            images = augment.random_shift(images, recipe.shift, random)
        if recipe.flip:
            images = augment.flip_alternating(images, self._mirrored_first[index], epoch)
        images = images.to(self.device, memory_format=torch.channels_last)
        return images, self.split.labels[index].to(self.device)

    def _epoch_order(self, epoch: int) -> tuple[int, Tensor]:
        return epoch, torch.randperm(len(self.split), generator=generator(self.seed, "order", epoch))


def generator(*key: int | str) -> Generator:
    """Randomness by name: the same key gives the same numbers, on any machine and after any restart."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


# --- the parts that would clutter the loop ----------------------------------------------------------------------------


def _end_epoch(state: State, network: ConvNet, held: Split, device: torch.device, per_epoch: int) -> dict[str, Any]:
    """Close the epoch's sums into a row of the history, with the hold-out's figures beside them."""
    logits = infer(network, held.images, device)
    row = {
        "epoch": math.ceil(state.step / per_epoch),
        "step": state.step,
        "train_loss": state.loss_sum / state.seen,
        "train_accuracy": state.right / state.seen,
        "holdout_loss": float(F.cross_entropy(logits, held.labels)),
        "holdout_accuracy": accuracy(logits, held.labels),
        "seconds": state.seconds,
    }
    state.history.append(row)
    state.loss_sum, state.right, state.seen = 0.0, 0, 0
    return row


def _save(path: Path, state: State, network: ConvNet, optimizers: list[torch.optim.Optimizer], good_step: int) -> int:
    """Save, or where the last step has ruined the weights, say so and leave the last good checkpoint alone."""
    if not checkpoint.all_finite(network):
        raise Diverged(state.step, good_step)
    checkpoint.save(path, state, network, optimizers)
    return state.step


def arithmetic_of(device: torch.device, precision: torch.dtype) -> dict[str, str]:
    """What equal weights depend on beside the run's identity; a resumed run should have the same."""
    return {
        "device": device_name(device),  # with the number of threads
        "precision": str(precision).removeprefix("torch."),
        "torch": str(torch.__version__),  # a plain string: loading a checkpoint allows no other class
    }


def _started(
    recipe: Recipe, dataset: Dataset, seed: int, device: torch.device, precision: torch.dtype, step: int, steps: int
) -> events.Started:
    return events.Started(
        recipe=recipe.name,
        dataset=dataset.name,
        seed=seed,
        device=device.type,
        precision=str(precision).removeprefix("torch."),
        steps=steps,
        step=step,
    )


def _log(board: "SummaryWriter", row: dict[str, Any]) -> None:
    for name in ("loss", "accuracy"):
        for part in ("train", "holdout"):
            board.add_scalar(f"{name}/{part}", row[f"{part}_{name}"], row["step"])


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
