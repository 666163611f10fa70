"""Fine-tuning: a published model and a few pictures become a better model, or an honest no.

Read downward: `execute` is the whole run, in order. Heads first, on cached features; then the layers before them, where
there are pictures enough; then calibration; then the gate, on pictures that nothing was fitted to; then a version like
any other, which may answer only if the gate and the policy say so.

A run is a folder. Only the long part, `tune`, keeps checkpoints, and the head that it begins with. The rest is quick
and comes out the same again.
"""

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from training import SafelightError, checkpoint, datasets, events, gate, intake
from training.bundle import store
from training.bundle.answers import Probabilities, probabilities
from training.bundle.classes import BUILT_IN, NameTaken, folded, known, settled
from training.bundle.manifest import DatasetFacts, Manifest, Parent, RecipeSpec, TrainingFacts
from training.bundle.replay import REPLAY, read_replay
from training.bundle.store import BundleRef
from training.candidates import Candidate, head_of, learn, own_place, right
from training.dataset_report import Report
from training.datasets import Split, holdout
from training.devices import choose_device, keep_freed_memory, training_precision
from training.evaluate import infer
from training.export import Measured, Origin, assess, export
from training.guest import alone_in, limit_memory, memory_left
from training.hold import holdable, working_time
from training.holdouts import digest
from training.layout import DatasetError
from training.loop import Emit, Interrupted, arithmetic_of
from training.memory import remember
from training.networks import ConvNet, parameters
from training.processors import processors
from training.quantize import int8_form
from training.report import read_verdict
from training.task import Past, Pictures, Plan, Task
from training.tune import LEARNING_CURVE

RUN = "run.json"
EVENTS = "events.jsonl"
DATA = "data"
PRECISION = "precision.pt"
TORN = (".*.pt-*", f".{LEARNING_CURVE}", f".{RUN}")  # what a kill leaves of files that were being written

LEAST_BYTES = 2**28  # no run does with less than this beside its libraries
LAST_BYTES = 2**24  # a thread's stack is half of it: with less left, whatever fails does so for want of memory
TIMED_ROUNDS = 30
CHECKED_IN_INT8 = 1000  # test pictures at most; more would take longer than they tell


class BaseUnsuitable(SafelightError):
    """Only the networks that our own models have, `convnet`, can be fine-tuned."""


class RunInvalid(SafelightError):
    """A folder that holds no fine-tuning run, or already holds one."""


@dataclass(frozen=True)
class Options:
    """Where things are on this machine, and what the run may take of it."""

    artifacts: Path
    data: Path | None = None
    device: str | None = None
    deadline_seconds: float | None = None
    holdable: bool = False
    memory_bytes: int | None = None


def create(folder: Path, plan: Plan) -> None:
    """Make a run's folder. Raises RunInvalid where there is a run already."""
    if (folder / RUN).exists():
        raise RunInvalid(f"{folder} already holds a run; go on with it by --resume {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RUN}"
    temporary.write_text(plan.model_dump_json(indent=2) + "\n")
    temporary.replace(folder / RUN)


def open_plan(folder: Path) -> Plan:
    """Raises RunInvalid."""
    try:
        return Plan.model_validate_json((folder / RUN).read_bytes())
    except FileNotFoundError:
        raise RunInvalid(f"{folder} holds no run: there is no {RUN} in it") from None
    except ValidationError as error:
        raise RunInvalid(f"{folder / RUN} can't be read: {error.errors()[0]['msg']}") from error


def execute(folder: Path, options: Options, emit: Emit) -> dict[str, Any]:
    """Fine-tune to the end, or go on to it; returns what came of it. Raises FolderBusy, and what the parts raise."""
    plan = open_plan(folder)
    with alone_in(folder):
        for torn in (path for pattern in TORN for path in folder.glob(pattern)):
            torn.unlink()
        return _execute(plan, folder, options, emit)


def _execute(plan: Plan, folder: Path, options: Options, emit: Emit) -> dict[str, Any]:
    begun = working_time()
    log = events.EventLog(folder / EVENTS)

    def tell(event: events.Event) -> None:
        log(event)
        emit(event)

    def late() -> bool:
        return options.deadline_seconds is not None and working_time() - begun > options.deadline_seconds

    try:
        if options.memory_bytes is not None:
            limit_memory(options.memory_bytes, least=LEAST_BYTES)
        keep_freed_memory()
        torch.set_num_threads(processors())
        with holdable(tell) if options.holdable else nullcontext():
            task = prepare(plan, folder, options, tell)
            candidate = learn(task, folder, tell, late)
            tell(events.Phase(phase="judging", step=0, steps=2))
            measured, verdict = judge(task, candidate, options)
        tell(events.Phase(phase="judging", step=1, steps=2))
        ref = publish(task, candidate, measured, verdict, working_time() - begun, options, tell)
        tell(events.Published(model=ref.model, version=ref.version, accuracy=measured.metrics.accuracy))
        result = decide(plan, ref, options) | {"seconds": round(working_time() - begun, 1)}
        tell(events.Decided(result=result))
        shutil.rmtree(folder / DATA, ignore_errors=True)
        return result
    except Interrupted:
        raise
    except KeyboardInterrupt:
        tell(events.Interrupted(step=0))
        raise
    except Exception as error:
        tell(failure(error))
        raise
    finally:
        log.close()


def failure(error: Exception) -> events.Failed:
    """What went wrong. Where next to nothing is left of the memory, that is it, whatever libraries make of the want."""
    if isinstance(error, RuntimeError | SystemError | ImportError) and memory_left() < LAST_BYTES:
        error = MemoryError()
    return events.failure(error)


# --- what there is to learn from --------------------------------------------------------------------------------------


def prepare(plan: Plan, folder: Path, options: Options, tell: Emit) -> Task:
    """Check the pictures, load the base, and gather what is remembered of its data."""
    store.check_writable(options.artifacts, plan.name)
    manifest = store.read_manifest(options.artifacts, plan.base)
    bundle = plan.base.path(options.artifacts)
    store.check_files(bundle, manifest)
    base = intake.Base(manifest, read_replay(bundle / REPLAY))
    pictures = load_pictures(plan, base, folder, options, tell)
    classes = classes_of(plan, manifest, pictures, options)
    places = {folded(label): place for place, label in enumerate(classes)}
    device = choose_device(options.device)
    mirrored = bool(manifest.recipe.settings.get("flip", False))
    return Task(
        plan=plan,
        manifest=manifest,
        network=load_base(bundle, manifest),
        classes=classes,
        pictures=pictures,
        labels=torch.tensor([places[folded(label)] for label in pictures.classes])[pictures.everything.labels],
        past=recall(plan, base, classes, options, tell),
        flip=mirrored if plan.tuning.flip is None else plan.tuning.flip,
        device=device,
        precision=begun_in(folder, device),
    )


def begun_in(folder: Path, device: torch.device) -> torch.dtype:
    """The precision that the run was begun in: measured once, so that a run that was killed ends with the same weights.

    Raises CheckpointError where what was written down can't be read.
    """
    path = folder / PRECISION
    if not path.exists():
        checkpoint.write(path, {"precision": str(training_precision(device)).removeprefix("torch.")})
    with checkpoint.reading(path) as content:
        return getattr(torch, content["precision"])


def load_base(bundle: Path, manifest: Manifest) -> ConvNet:
    """Raises BaseUnsuitable, CheckpointError."""
    network = checkpoint.load_network(bundle, manifest)
    if not isinstance(network, ConvNet):
        raise BaseUnsuitable(
            f"{manifest.model}@{manifest.version} is a {manifest.network.name}; only a convnet can be fine-tuned"
        )
    return network


def load_pictures(plan: Plan, base: intake.Base, folder: Path, options: Options, tell: Emit) -> Pictures:
    """Check every picture, then decode those that are accepted as the base sees them."""
    archive, report = accepted(plan, base, folder / DATA, options)
    tell(events.Validated(report=report.model_dump(mode="json")))
    found = datasets.class_folders(archive, base.manifest.input)
    everything = Split(
        torch.cat([found.train.images, found.test.images]), torch.cat([found.train.labels, found.test.labels])
    )
    is_test = torch.arange(len(everything)) >= len(found.train) if report.divided else None
    return Pictures(report.name, found.sha256, found.classes, everything, is_test, report.rejected.count)


def accepted(plan: Plan, base: intake.Base, into: Path, options: Options) -> tuple[Path, Report]:
    """The accepted pictures, as a zip, and the report on them.

    They are checked once: not again by a run that goes on, nor where they were checked for this base before.
    """
    given = Path(plan.dataset)
    before = checked_report(given)
    if before and before.base and (before.base.model, before.base.version) == (plan.model, plan.version):
        return given, before
    if (report := checked_report(into / intake.DATA)) is None:
        shutil.rmtree(into, ignore_errors=True)  # what a kill left of it
        with intake.opened(plan.dataset, options.data, plan.limit) as archive:
            report = intake.check(archive, before.name if before else given.stem, base=base, into=into)
    return into / intake.DATA, report


def checked_report(archive: Path) -> Report | None:
    """What was found when an archive was checked; None for one that is as somebody packed it."""
    if archive.name != intake.DATA:
        return None
    try:
        return Report.model_validate_json(archive.with_name(intake.REPORT).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def classes_of(plan: Plan, manifest: Manifest, pictures: Pictures, options: Options) -> tuple[str, ...]:
    """The new version's classes. Raises NameTaken."""
    namesakes = [namesake.classes for namesake in store.namesakes(options.artifacts, plan.name)]
    return settled(plan.name, manifest.classes, pictures.classes, keep=plan.tuning.keep_classes, namesakes=namesakes)


def recall(plan: Plan, base: intake.Base, classes: tuple[str, ...], options: Options, tell: Emit) -> Past:
    """The base's own data where it is there, else what its bundle remembers; nothing where its classes go."""
    manifest = base.manifest
    features = base.replay if base.replay is not None and len(base.replay.labels) else None
    if classes[: len(manifest.classes)] != manifest.classes:
        return Past()
    source = manifest.training.dataset.name
    if options.data is not None and source in BUILT_IN:
        try:
            found = datasets.load(source, manifest.input, options.data)
        except DatasetError as error:
            tell(events.Notice(message=f"the base's own data isn't here ({error}); its bundle's features stand in"))
        else:
            fitted, check = holdout(found.train, float(manifest.recipe.settings.get("holdout", 0.02)))
            return Past(fitted if plan.tuning.replay else None, check, found.test, features)
    return Past(features=features)


# --- judging and publishing -------------------------------------------------------------------------------------------


def judge(task: Task, candidate: Candidate, options: Options) -> tuple[Measured, gate.Verdict]:
    """Measure the candidate on its test part, and hold it against the others there. Raises NameTaken."""
    if classes_of(task.plan, task.manifest, task.pictures, options) != task.classes:
        raise NameTaken(
            f"another job has made {task.plan.name} meanwhile, with its classes in another order; start again"
        )
    labels = task.labels[candidate.test]
    measured = assess(candidate.held_logits, candidate.held_labels, candidate.test_logits, labels, task.classes)
    rival = active_rival(task, options)
    mine, rivals = costs(candidate.network, rival, task)
    same = known(task.classes, task.manifest.classes)
    evidence = gate.Evidence(
        classes=task.classes,
        labels=labels.numpy(),
        candidate=probabilities(candidate.test_logits.numpy(), measured.calibration.temperature),
        active=None if rival is None else rival_answers(rival, task, candidate),
        nearest_mean=candidate.nearest_mean.numpy(),
        new_classes=[label for label in task.classes if label not in same],
        guard=guard_answers(task, candidate),
        candidate_cost=mine,
        active_cost=rivals,
        cross_validated=candidate.cross_validated,
        looks=looks(task, candidate, options),
    )
    return measured, gate.judge(evidence, seed=task.plan.seed)


@dataclass(frozen=True)
class Rival:
    """The version that answers now, for the same classes."""

    manifest: Manifest
    network: ConvNet


def active_rival(task: Task, options: Options) -> Rival | None:
    """The active version of the new model's name; where there is none yet, the base, if it has the same classes."""
    ref = store.answering(options.artifacts, task.plan.name)
    if ref is None and task.same_classes:
        ref = task.plan.base
    if ref is None:
        return None
    manifest = store.read_manifest(options.artifacts, ref)
    if manifest.input != task.manifest.input:
        return None  # it sees other pixels: its answers to these mean nothing
    return Rival(manifest, load_base(ref.path(options.artifacts), manifest))


def rival_answers(rival: Rival, task: Task, candidate: Candidate) -> Probabilities:
    theirs = [folded(label) for label in rival.manifest.classes]  # perhaps in another order
    logits = infer(rival.network, task.split.images[candidate.test], torch.device("cpu"))
    logits = logits[:, [theirs.index(folded(label)) for label in task.classes]]
    return probabilities(logits.numpy(), rival.manifest.calibration.temperature)


def guard_answers(task: Task, candidate: Candidate) -> gate.Guard | None:
    """What the candidate and the base have right of the base's own test set, or of the features of some of it."""
    past = task.past
    if past.guard is not None:
        mine, bases = (right(network, past.guard, task.device) for network in (candidate.network, task.network))
        return gate.Guard(mine, bases)
    if past.features is None or candidate.history or candidate.place != own_place(task.network):
        return None
    features = torch.from_numpy(past.features.guard_features).float()
    labels = torch.from_numpy(past.features.guard_labels)
    heads = head_of(candidate.network), head_of(task.network)
    mine, bases = ((head(features).argmax(1) == labels).numpy() for head in heads)
    return gate.Guard(mine, bases)


def looks(task: Task, candidate: Candidate, options: Options) -> int:
    """How many candidates for this name have been held against these very test pictures, this one included."""
    hold_out = digest(task.split.images[candidate.test])
    return store.looked(options.artifacts, task.plan.name, hold_out, checkpoint.weights_sha256(candidate.network))


def costs(candidate: ConvNet, rival: Rival | None, task: Task) -> tuple[gate.Cost, gate.Cost | None]:
    """What one picture takes, timed in turns, and what the weights take on disk."""
    networks = [candidate.folded(), *([rival.network.folded()] if rival else [])]
    picture = torch.from_numpy(np.zeros((1, *task.manifest.input.shape), np.uint8))
    rounds: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for turn in range(TIMED_ROUNDS + 5):
            for network, milliseconds in zip(networks, rounds, strict=True):
                begun = working_time()
                network(picture)
                if turn >= 5:  # the first are slower
                    milliseconds.append((working_time() - begun) * 1000)
    found = [
        gate.Cost(milliseconds, 4 * parameters(network)) for network, milliseconds in zip(networks, rounds, strict=True)
    ]
    return found[0], found[1] if rival else None


def publish(
    task: Task,
    candidate: Candidate,
    measured: Measured,
    verdict: gate.Verdict,
    seconds: float,
    options: Options,
    tell: Emit,
) -> BundleRef:
    """Publish the candidate as the next version, which answers only those who ask for it by number.

    A run that was killed just after it had published finds its version again, by its weights.
    """
    plan = task.plan
    origin = Origin(
        model=plan.name,
        classes=task.classes,
        input=task.manifest.input,
        network=task.manifest.network.name,
        arguments=candidate.arguments,
        recipe=RecipeSpec(
            name="finetune",
            settings=plan.tuning.model_dump(mode="json") | {"flip": task.flip, "views": "none"},
            seed=plan.seed,
        ),
        training=TrainingFacts(
            dataset=DatasetFacts(
                name=task.pictures.name,
                sha256=task.pictures.sha256,
                train=len(candidate.trained_on),
                holdout=len(candidate.held_labels),
                test=len(candidate.test),
                skipped=task.pictures.skipped,
            ),
            epochs=candidate.epochs,
            seconds=round(seconds, 1),
            **arithmetic_of(task.device, task.precision),
        ),
        parent=Parent(model=plan.model, version=plan.version, weights_sha256=task.manifest.weights_sha256),
    )
    if (published := published_before(plan, candidate.network, options)) is not None:
        return published
    if not store.versions(options.artifacts, plan.name):
        store.hold_back(options.artifacts, plan.name)  # else the only version would answer, whatever the gate says
    train, test = task.split[candidate.trained_on], task.split[candidate.test]
    memory = remember(candidate.network, train, test, len(task.classes))
    some = test[torch.arange(0, len(test), -(-len(test) // CHECKED_IN_INT8))]
    int8 = int8_form(candidate.network, train, some, origin.input, measured.calibration.temperature, tell)
    return export(
        candidate.network,
        origin,
        measured,
        candidate.history,
        options.artifacts,
        replay=memory,
        int8=int8,
        verdict=verdict,
    )


def published_before(plan: Plan, network: ConvNet, options: Options) -> BundleRef | None:
    digest = checkpoint.weights_sha256(network)
    for ref in store.versions(options.artifacts, plan.name):
        manifest = store.readable_manifest(options.artifacts, ref)
        if manifest and manifest.weights_sha256 == digest and manifest.created_at >= plan.created_at:
            return ref
    return None


def decide(plan: Plan, ref: BundleRef, options: Options) -> dict[str, Any]:
    """Let the version answer, or not, by the verdict in its report; and everything that led there.

    Not by the one at hand: a run that was killed once its version was active has judged it anew, against itself.
    """
    manifest = store.read_manifest(options.artifacts, ref)
    verdict = read_verdict(ref.path(options.artifacts) / "report")
    promoted = gate.promotes(plan.promote, verdict)
    if promoted:
        store.activate(options.artifacts, ref)
    return {
        "model": ref.model,
        "version": ref.version,
        "promoted": promoted,
        "decision": verdict.decision,
        "summary": gate.summary(plan.promote, verdict),
        "classes": list(manifest.classes),
        "base": str(plan.base),
        "metrics": manifest.metrics.model_dump(),
        "gate": {"checks": [check.model_dump() for check in verdict.checks]},
        "comparisons": {name: score.model_dump() for name, score in verdict.comparisons.items()},
    }
