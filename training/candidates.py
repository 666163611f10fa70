"""What a fine-tuning run tries: heads at every depth of the network, then the whole of it trained further.

`learn` is the order. Everything is chosen on pictures that it wasn't fitted to, and nothing by the test part.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from training import checkpoint, events, probe
from training.checkpoint import CheckpointError
from training.datasets import Split, holdout
from training.evaluate import infer
from training.hold import working_time
from training.holdouts import CROSS_VALIDATED_BELOW, FOLDS, TEST_SHARE, TRUSTED_TEST, Parts, folds, parts
from training.loop import Emit
from training.networks import ConvNet
from training.probe import Head, Place
from training.task import Task
from training.tune import Material, Settings, Setup, averaged, tune

HEAD = "head.pt"  # in the run's folder

DEEP_FROM = 20  # pictures of each class; fewer can't say where training goes wrong
FEW_STEPS, MANY_STEPS, MOST_STEPS = 200, 500, 2000
MANY_PICTURES = 1000  # from here on MANY_STEPS, or two epochs, if those are more
PROBED = 5000  # pictures that heads are fitted to; more of them only take longer
PROBED_MOVED = 1000  # up to so many, moved by a pixel as well
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way from the base's weights to the tuned ones
FORGETTING = 0.005  # of accuracy on the base's own data that may be lost while choosing; the gate judges for itself


@dataclass(frozen=True)
class Candidate:
    """A network, and what it says of pictures that it wasn't fitted to."""

    network: ConvNet
    arguments: dict[str, Any]
    place: Place
    held_logits: Tensor  # [V, K], to calibrate with
    held_labels: Tensor
    test_logits: Tensor  # [T, K], for the gate; out of fold where cross-validated
    test: Tensor  # [T], which pictures these are
    nearest_mean: Tensor  # [T], what the nearest class mean answers there, from the same features
    trained_on: Tensor  # [n]
    history: list[dict[str, Any]]
    epochs: float
    cross_validated: bool


def learn(task: Task, folder: Path, tell: Emit, late: Callable[[], bool]) -> Candidate:
    """Choose by validation between heads at every depth, and the whole network trained further."""
    split, given = task.split, task.pictures.is_test
    test = given if given is not None and int(given.sum()) >= TRUSTED_TEST else None
    if len(split) - (0 if test is None else int(test.sum())) < CROSS_VALIDATED_BELOW * (1 - TEST_SHARE):
        return cross_validated(task, test, tell)
    divided = parts(split, test, task.plan.seed)
    if not may_go_deeper(task, divided):
        return fitted_head(task, divided, tell)
    head = kept(folder / HEAD, task) or keep(folder / HEAD, task, fitted_head(task, divided, tell))
    return deeper(task, head, divided, folder, tell, late)


def keep(path: Path, task: Task, candidate: Candidate) -> Candidate:
    """Write a candidate down, so that a run that goes on needn't fit it again. Raises CheckpointError."""
    content = {field.name: getattr(candidate, field.name) for field in fields(candidate)}
    content |= {"network": candidate.network.state_dict(), "place": astuple(candidate.place)}
    checkpoint.write(path, {"identity": identity_of(task), "candidate": content})
    return candidate


def kept(path: Path, task: Task) -> Candidate | None:
    """The candidate that was written down; None where there is none for this very task, or the file is damaged."""
    try:
        with checkpoint.reading(path) as saved:
            if saved["identity"] != identity_of(task):
                return None
            content = saved["candidate"]
            network = ConvNet(**content["arguments"])
            network.load_state_dict(content["network"])
            return Candidate(**content | {"network": network.eval(), "place": Place(*content["place"])})
    except CheckpointError:
        return None


def identity_of(task: Task) -> dict[str, Any]:
    """What a run is of: its plan and its pictures."""
    return {"plan": task.plan.model_dump(mode="json"), "data": task.pictures.sha256}


@dataclass(frozen=True)
class Choice:
    place: Place
    penalty: float


def menu(task: Task) -> list[Choice]:
    """Which heads may be tried: on the base's own features for its own classes, else at every depth."""
    own = own_place(task.network)
    if task.same_classes or (task.keeps_base and task.past.replay is None):
        return [Choice(own, penalty) for penalty in probe.PENALTIES]
    return [Choice(place, penalty) for place in probe.places(task.network) for penalty in probe.PENALTIES]


class Heads:
    """Fits heads to some of the pictures, with what is remembered of the base's beside them.

    It will be asked for a head for each choice in so many `rounds`, and for `more`: of those it tells the progress.
    """

    def __init__(self, task: Task, pool: Tensor, tell: Emit, rounds: int = 1, more: int = 0) -> None:
        self.task, self.pool, self.tell = task, pool, tell
        self.menu = menu(task)
        self.fitted, self.fits = 0, rounds * len(self.menu) + more
        self.clock = 0.0  # starts with the end of the first fit, which takes longer than those after it
        self.tell_progress()
        where = list(dict.fromkeys(choice.place for choice in self.menu))
        images = task.split.images[pool]
        self.views = [
            probe.features(task.network, view, where, task.device) for view in views(images, task.flip, len(pool))
        ]
        self.labels = task.labels[pool]
        self.old = self._old_features(where)

    def fit(self, choice: Choice, chosen: Tensor) -> Head:
        """Fit to the pictures at these places of the pool [n]."""
        place, classes = choice.place, len(self.task.classes)
        inputs = torch.cat([view[place][chosen] for view in self.views])
        labels = self.labels[chosen].repeat(len(self.views))
        weights = probe.balancing_weights(labels, classes)
        if place in self.old:
            features, old_labels = self.old[place]
            weights = torch.cat([weights / weights.sum(), torch.full((len(old_labels),), 1 / len(old_labels))])
            inputs, labels = torch.cat([inputs, features]), torch.cat([labels, old_labels])
        toward = head_of(self.task.network) if self.task.same_classes else None
        head = probe.fit_head(inputs, labels, classes, penalty=choice.penalty, weights=weights, toward=toward)
        self.fitted += 1
        self.clock = self.clock or working_time()
        self.tell_progress()
        return head

    def tell_progress(self) -> None:
        pace = (working_time() - self.clock) / (self.fitted - 1) if self.fitted > 1 else None
        left = None if pace is None else pace * (self.fits - self.fitted)
        self.tell(events.Phase(phase="heads", step=self.fitted, steps=self.fits, seconds_left=left))

    def logits(self, choice: Choice, head: Head, chosen: Tensor) -> Tensor:
        return head(self.views[0][choice.place][chosen])

    def nearest(self, place: Place, fitted: Tensor, queries: Tensor) -> Tensor:
        """The class of the nearest mean, of features [M, D] at a place: [M]."""
        features, labels = self.views[0][place][fitted], self.labels[fitted]
        return probe.nearest_mean(features, labels, queries, len(self.task.classes)).argmax(1)

    def best(self, fitted: Tensor, validation: Tensor) -> tuple[Choice, Head, dict[Choice, float]]:
        """The choice with the least NLL on validation pictures, and everyone's."""
        heads = {choice: self.fit(choice, fitted) for choice in self.menu}
        losses = {
            choice: nll(self.logits(choice, head, validation), self.labels[validation])
            for choice, head in heads.items()
        }
        choice = min(losses, key=lambda one: losses[one])
        return choice, heads[choice], losses

    def _old_features(self, where: list[Place]) -> dict[Place, tuple[Tensor, Tensor]]:
        past, task = self.task.past, self.task
        if past.replay is not None:
            some, _ = holdout(past.replay, 1 - min(1.0, 1000 / len(past.replay)))
            found = probe.features(task.network, some.images, where, task.device)
            return {place: (features, some.labels) for place, features in found.items()}
        if past.features is not None and task.plan.tuning.replay:
            remembered = torch.from_numpy(past.features.features).float(), torch.from_numpy(past.features.labels)
            own = own_place(task.network)
            return {own: remembered} if own in where else {}
        return {}


def fitted_head(task: Task, divided: Parts, tell: Emit) -> Candidate:
    """The best head, chosen on the validation part."""
    some = divided.train[:: -(-len(divided.train) // PROBED)]  # evenly: they lie class by class
    pool, count = torch.cat([some, divided.validation]), len(some)
    heads = Heads(task, pool, tell)
    choice, head, losses = heads.best(torch.arange(count), torch.arange(count, len(pool)))
    for one, loss in losses.items():
        tell(events.Notice(message=f"head after group {one.place.depth}, penalty {one.penalty:g}: NLL {loss:.3f}"))
    arguments = probe.arguments_at(task.manifest.network.arguments, choice.place, len(task.classes))
    network = probe.cut(task.network, arguments, head)
    queries = probe.features(task.network, task.split.images[divided.test], [choice.place], task.device)[choice.place]
    nearest = heads.nearest(choice.place, torch.arange(count), queries)
    return answered(task, network, arguments, choice.place, divided, nearest)


def answered(
    task: Task,
    network: ConvNet,
    arguments: dict[str, Any],
    place: Place,
    divided: Parts,
    nearest: Tensor,
    history: Sequence[dict[str, Any]] = (),
    epochs: float = 0.0,
) -> Candidate:
    """A network with its answers on the parts that it wasn't fitted to. Those on the test part are for the gate."""
    held, tested = (
        infer(network.to(task.device), task.split.images[part], task.device)
        for part in (divided.validation, divided.test)
    )
    return Candidate(
        network=network.cpu(),
        arguments=arguments,
        place=place,
        held_logits=held,
        held_labels=task.labels[divided.validation],
        test_logits=tested,
        test=divided.test,
        nearest_mean=nearest,
        trained_on=divided.train,
        history=list(history),
        epochs=epochs,
        cross_validated=False,
    )


def cross_validated(task: Task, test: Tensor | None, tell: Emit) -> Candidate:
    """Few pictures: each is answered by a head that was chosen and fitted without it, then one is fitted to them all.

    Within each turn, one of the other folds makes the choice.
    """
    everything = torch.arange(len(task.split))
    pool = everything if test is None else everything[~test]
    heads = Heads(task, pool, tell, rounds=FOLDS, more=FOLDS + 1)
    fold = folds(task.split[pool], task.plan.seed)
    out_of_fold = torch.zeros(len(pool), len(task.classes))
    nearest = torch.zeros(len(pool), dtype=torch.int64)
    losses: dict[Choice, float] = dict.fromkeys(heads.menu, 0.0)
    for turn in range(FOLDS):
        others, answered_now = (fold != turn).nonzero().squeeze(1), (fold == turn).nonzero().squeeze(1)
        choosing = fold[others] == (turn + 1) % FOLDS
        choice, _, found = heads.best(others[~choosing], others[choosing])
        losses = {one: losses[one] + loss for one, loss in found.items()}
        out_of_fold[answered_now] = heads.logits(choice, heads.fit(choice, others), answered_now)
        nearest[answered_now] = heads.nearest(choice.place, others, heads.views[0][choice.place][answered_now])
    choice = min(losses, key=lambda one: losses[one])
    head = heads.fit(choice, torch.arange(len(pool)))
    arguments = probe.arguments_at(task.manifest.network.arguments, choice.place, len(task.classes))
    network = probe.cut(task.network, arguments, head)
    tested = pool if test is None else everything[test]
    test_logits = out_of_fold
    if test is not None:
        images = task.split.images[tested]
        test_logits = infer(network, images, torch.device("cpu"))
        queries = probe.features(task.network, images, [choice.place], task.device)[choice.place]
        nearest = heads.nearest(choice.place, torch.arange(len(pool)), queries)
    return Candidate(
        network=network,
        arguments=arguments,
        place=choice.place,
        held_logits=out_of_fold,
        held_labels=task.labels[pool],
        test_logits=test_logits,
        test=tested,
        nearest_mean=nearest,
        trained_on=pool,
        history=[],
        epochs=0.0,
        cross_validated=test is None,
    )


def may_go_deeper(task: Task, divided: Parts) -> bool:
    """Only with pictures enough, and not where it would unlearn classes that nothing reminds it of."""
    tuning = task.plan.tuning
    if tuning.depth != "auto":
        return tuning.depth == "full"
    counts = torch.bincount(task.labels[divided.train])
    reminded = task.past.replay is not None or not task.keeps_base
    return reminded and int(counts[counts > 0].min()) >= DEEP_FROM * (1 - 2 * TEST_SHARE)


def deeper(
    task: Task, head: Candidate, divided: Parts, folder: Path, tell: Emit, late: Callable[[], bool]
) -> Candidate:
    """Train the layers before the head too, and take that where it validates better."""
    tuning, split = task.plan.tuning, task.split
    start = as_base(task) if task.same_classes else head.network
    settings = Settings(
        steps=steps_for(task, len(divided.train)),
        batch_size=min(tuning.batch_size, len(divided.train)),
        learning_rate=tuning.learning_rate,
        shift=tuning.shift,
        flip=task.flip,
        fitted_head=not task.same_classes,
    )
    setup = Setup(
        start=start,
        material=Material(split[divided.train], split[divided.validation], task.past.replay),
        settings=settings,
        folder=folder,
        seed=task.plan.seed,
        device=task.device,
        precision=task.precision,
        identity=identity_of(task),
        emit=tell,
        late=late,
    )
    tell(started(task, settings.steps))
    tuned, history = tune(setup)
    networks = [averaged(start.cpu(), tuned, share) for share in SHARES] if task.same_classes else [tuned]
    epochs = len(history) and history[-1]["step"] * settings.batch_size / len(divided.train)
    candidates = [
        answered(task, network, head.arguments, head.place, divided, head.nearest_mean, history, epochs)
        for network in networks
    ]
    allowed = [candidate for candidate in candidates if forgets_little(task, candidate)]
    return min([head, *allowed], key=lambda candidate: regret(task, candidate))


def steps_for(task: Task, count: int) -> int:
    tuning = task.plan.tuning
    if tuning.epochs is not None:
        return max(1, round(tuning.epochs * count / tuning.batch_size))
    if count < MANY_PICTURES:
        return FEW_STEPS
    return min(MOST_STEPS, max(MANY_STEPS, 2 * count // tuning.batch_size))


def regret(task: Task, candidate: Candidate) -> float:
    """NLL on the new pictures' validation part, and as much again of that on old pictures, where there are any."""
    loss, check = nll(candidate.held_logits, candidate.held_labels), task.past.check
    if check is None:
        return loss
    return loss + nll(infer(candidate.network.to(task.device), check.images, task.device), check.labels)


def forgets_little(task: Task, candidate: Candidate) -> bool:
    """Whether it is about as good as the base on data of the base's that neither was trained on."""
    check = task.past.check
    if check is None:
        return True
    mine, bases = (right(network, check, task.device) for network in (candidate.network, task.network))
    return float(bases.mean() - mine.mean()) <= FORGETTING


def as_base(task: Task) -> ConvNet:
    """The base, in the shape of a network with a fitted head."""
    arguments = probe.arguments_at(task.manifest.network.arguments, own_place(task.network), len(task.classes))
    return probe.cut(task.network, arguments, head_of(task.network))


def own_place(network: ConvNet) -> Place:
    """Where its own head reads."""
    return Place(len(network.groups), network.pool)


def head_of(network: ConvNet) -> Head:
    weight, bias = network.head.weight.detach(), network.head.bias
    return Head(weight, torch.zeros(len(weight)) if bias is None else bias.detach())


def views(images: Tensor, flip: bool, count: int) -> list[Tensor]:
    """The pictures [N, C, H, W], and where there are few, also moved and mirrored ones: as they are comes first."""
    found = [images]
    if count <= PROBED_MOVED:
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
        height, width = images.shape[2:]
        found += [padded[:, :, down : down + height, right_ : right_ + width] for down, right_ in ((0, 0), (2, 2))]
    return found + [view.flip(3) for view in found] if flip else found


def nll(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels))


def right(network: ConvNet, split: Split, device: torch.device) -> NDArray[np.bool_]:
    """Which pictures [N] a network has right."""
    answers = infer(network.to(device), split.images, device).argmax(1)
    return (answers == split.labels).numpy()


def started(task: Task, steps: int) -> events.Started:
    precision = str(task.precision).removeprefix("torch.")
    return events.Started(
        recipe="finetune",
        dataset=task.pictures.name,
        seed=task.plan.seed,
        device=task.device.type,
        precision=precision,
        steps=steps,
        step=0,
    )
