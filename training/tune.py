"""The second half of fine-tuning: train a network's layers further on a few pictures, gently.

Like `loop`, but for what is different about few pictures: the norms keep the statistics of the many that the network
was first trained on, the stem stays as it is, old pictures are replayed beside the new, and what is kept is a running
average of the weights from the step where it validated best.

What a batch looks like depends on the seed and the step alone, so a run that was killed ends with the weights of one
that never stopped.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import augment, checkpoint, events, report
from training.checkpoint import State
from training.datasets import Split
from training.devices import in_precision
from training.evaluate import accuracy, infer
from training.loop import CHECKPOINT, Clock, Diverged, Emit, Interrupted, arithmetic_of, generator, stop_signals
from training.networks import ConvNet
from training.probe import balancing_weights

LEARNING_CURVE = "learning-curve.png"

TRUNK_LR = 0.02
PROBED_HEAD_LR = 0.002  # a head that was fitted already only follows what happens below it
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARM_UP = 0.05  # share of the steps: momentum has no history yet, and the weights something to lose
LONGEST_GRADIENT = 1.0
AVERAGE = 0.98  # the average forgets a step's weights over about 50 steps
EVALUATIONS = 10
PATIENCE = 5  # evaluations without a better one, then it stops early
BACKOFF = 0.3  # of the step size, after the loss ran away
ATTEMPTS = 3
RUNAWAY_STEPS = 20


class DeadlinePassed(Exception):
    """The time that was allowed is over; a checkpoint was written at `step`."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the time allowed was over at step {step}; allow more, or ask for fewer epochs")


@dataclass(frozen=True)
class Material:
    """What is trained on, what decides when to stop, and what is replayed beside it."""

    train: Split
    validation: Split
    replay: Split | None


@dataclass(frozen=True)
class Settings:
    steps: int
    batch_size: int  # of new pictures; as many are replayed beside them
    learning_rate: float  # multiplies every rate
    shift: int
    flip: bool
    fitted_head: bool


@dataclass(frozen=True)
class Setup:
    """All that a run of `tune` needs."""

    start: ConvNet
    material: Material
    settings: Settings
    folder: Path
    seed: int
    device: torch.device
    precision: torch.dtype
    identity: dict[str, Any]  # what its checkpoints are of
    emit: Emit
    late: Callable[[], bool]


def tune(setup: Setup) -> tuple[ConvNet, list[dict[str, Any]]]:
    """Train further, or go on with that where the run's folder has a checkpoint; returns the best average of weights.

    Where the loss runs away it goes back to the last checkpoint, twice, with smaller steps. Raises Interrupted,
    DeadlinePassed, Diverged, CheckpointError.
    """
    tuning = _Tuning(setup)
    while True:
        try:
            tuning.train()
        except Diverged as error:
            tuning.restore()
            tuning.state.attempt += 1
            if tuning.state.attempt == ATTEMPTS:
                raise
            tuning.save()
            setup.emit(events.Notice(message=f"{error}; going on from there with smaller steps"))
        else:
            return tuning.best.cpu().eval(), tuning.state.history


class _Tuning:
    """One run of `tune`: the weights that move, their average, and the best average so far."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.material, self.settings = setup, setup.material, setup.settings
        self.path, self.emit, self.device = setup.folder / CHECKPOINT, setup.emit, setup.device
        start = setup.start.to(self.device)
        self.current, self.average, self.best = (copy.deepcopy(start) for _ in range(3))
        self.everything = nn.ModuleDict({"current": self.current, "average": self.average, "best": self.best})
        self.moving, self.following = _moving(self.current), _moving(self.average)
        self.optimizer = _optimizer(self.current, self.settings)
        self.weights = balancing_weights(self.material.train.labels, len(start.head.weight)).to(self.device)
        self.every = max(1, self.settings.steps // EVALUATIONS)
        identity = setup.identity | {"steps": self.settings.steps}
        self.state = State(identity, arithmetic_of(self.device, setup.precision))
        if self.path.exists():
            self.restore()
        else:
            self._evaluate()  # the start itself may be the best there is

    def save(self) -> None:
        checkpoint.save(self.path, self.state, self.everything, [self.optimizer])

    def restore(self) -> None:
        self.state = checkpoint.load(self.path, self.state.identity, self.everything, [self.optimizer])

    def train(self) -> None:
        """Step by step to the end, or until it gets no better."""
        state, settings = self.state, self.settings
        first_loss = max(state.history[0]["holdout_loss"], 0.1)
        limit = max(2 * first_loss, math.log(len(self.current.head.weight)) + 1)
        good_step, high = state.step, 0
        batch = settings.batch_size * (2 if self.material.replay else 1)
        with stop_signals() as stopped:
            clock = Clock(batch, settings.steps, state)
            while state.step < settings.steps and not self._settled():
                loss = self._step()
                high = high + 1 if loss > limit else 0
                if not math.isfinite(loss) or high == RUNAWAY_STEPS:
                    raise Diverged(state.step, good_step, "learning_rate")
                state.step += 1
                state.seconds = clock.seconds()
                epoch = state.step * settings.batch_size / len(self.material.train)
                self.emit(clock.progress(epoch, loss, state.right / state.seen))
                if state.step % self.every == 0 or state.step == settings.steps:
                    self._evaluate()
                    good_step = state.step
                if stopped() or self.setup.late():
                    self._stop(stopped())

    def _step(self) -> float:
        """One step; returns the mean loss of its batch."""
        images, labels, weights = self._batch(self.state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._rate(self.state.step) * BACKOFF**self.state.attempt
        self.current.eval()  # the norms keep their statistics, also in a batch of strange pictures
        with in_precision(self.state.precision, self.device):
            logits = self.current(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.moving, LONGEST_GRADIENT)
        self.optimizer.step()
        self._follow()
        self.state.loss_sum += float(losses.detach().sum())
        self.state.right += int((logits.argmax(1) == labels).sum())
        self.state.seen += len(labels)
        return loss.item()

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, C, H, W], labels [B] and how much each counts [B]; a function of the seed and the step."""
        random, settings = generator(self.setup.seed, "tune", step), self.settings
        chosen = torch.randint(len(self.material.train), (settings.batch_size,), generator=random)
        new = self.material.train[chosen]
        images, labels, weights = new.images, new.labels, self.weights[chosen.to(self.device)]
        if self.material.replay is not None:
            old = self.material.replay[
                torch.randint(len(self.material.replay), (settings.batch_size,), generator=random)
            ]
            images, labels = torch.cat([images, old.images]), torch.cat([labels, old.labels])
            weights = torch.cat([weights / weights.mean(), torch.ones(len(old), device=self.device)])
        if settings.shift:
            down, right = augment.random_shifts(len(images), settings.shift, 1, random)
            images = augment.move(images, down, right, settings.shift)
        if settings.flip:
            mirrored = torch.rand(len(images), generator=random) < 0.5
            images = augment.mirror(images, mirrored)
        return images.to(self.device, memory_format=torch.channels_last), labels.to(self.device), weights

    def _rate(self, step: int) -> float:
        """Share of the peak: a short way up, then down along a cosine to zero."""
        up = min(1.0, (step + 1) / (WARM_UP * self.settings.steps))
        return up * 0.5 * (1 + math.cos(math.pi * step / self.settings.steps))

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the average follow; at first it is the mean of all steps so far, not half the start."""
        keep = min(AVERAGE, (1 + self.state.step) / (10 + self.state.step))
        for average, moving in zip(self.following, self.moving, strict=True):
            average.lerp_(moving, 1 - keep)

    def _evaluate(self) -> None:
        """Validate the average, keep it if it is the best yet, and save."""
        state, validation = self.state, self.material.validation
        if not checkpoint.all_finite(self.current):
            raise Diverged(state.step, state.step - state.step % self.every, "learning_rate")
        logits = infer(self.average, validation.images, self.device)
        loss = float(F.cross_entropy(logits, validation.labels))
        if all(loss < row["holdout_loss"] for row in state.history):
            self.best.load_state_dict(self.average.state_dict())
        row = {
            "epoch": len(state.history),
            "step": state.step,
            "train_loss": state.loss_sum / state.seen if state.seen else loss,
            "train_accuracy": state.right / state.seen if state.seen else accuracy(logits, validation.labels),
            "holdout_loss": loss,
            "holdout_accuracy": accuracy(logits, validation.labels),
            "seconds": state.seconds,
        }
        state.history.append(row)
        state.loss_sum, state.right, state.seen = 0.0, 0, 0
        self.save()
        report.learning_curve(self.setup.folder / LEARNING_CURVE, state.history)
        self.emit(events.Epoch.model_validate(row))
        self.emit(events.Checkpointed(step=state.step, path=str(self.path)))

    def _settled(self) -> bool:
        """Whether the last evaluations brought nothing better."""
        losses = [row["holdout_loss"] for row in self.state.history]
        return len(losses) - 1 - losses.index(min(losses)) >= PATIENCE

    def _stop(self, by_signal: bool) -> None:
        self.save()
        step = self.state.step
        self.emit(events.Checkpointed(step=step, path=str(self.path)))
        if not by_signal:
            raise DeadlinePassed(step)
        self.emit(events.Interrupted(step=step))
        raise Interrupted(step)


def _moving(network: ConvNet) -> list[nn.Parameter]:
    """Everything but the stem, and but the scales of the norms, which are never trained."""
    network.stem.requires_grad_(False)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _optimizer(network: ConvNet, settings: Settings) -> torch.optim.Optimizer:
    head = list(network.head.parameters())
    trunk = [parameter for parameter in network.groups.parameters() if parameter.requires_grad]
    head_lr = PROBED_HEAD_LR if settings.fitted_head else TRUNK_LR
    groups = [
        {"params": trunk, "peak": TRUNK_LR * settings.learning_rate},
        {"params": head, "peak": head_lr * settings.learning_rate},
    ]
    return torch.optim.SGD(groups, lr=TRUNK_LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)


def averaged(base: ConvNet, tuned: ConvNet, share: float) -> ConvNet:
    """Weights between two networks of one shape: `share` of the way from the base to the tuned one (Wortsman et al.,
    2022)."""
    between = copy.deepcopy(tuned)
    state, base_state = between.state_dict(), base.state_dict()
    between.load_state_dict(
        {
            name: base_state[name].lerp(tensor, share) if tensor.is_floating_point() else tensor
            for name, tensor in state.items()
        }
    )
    return between.eval()
