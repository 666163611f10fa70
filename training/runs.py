"""A run: a folder that says what is trained, keeps its checkpoint, logs and curve, and ends as a bundle."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from training import SafelightError, checkpoint, datasets, events, lessons, report
from training.board import PICTURES
from training.bundle import store
from training.bundle.manifest import Metrics, ModelName
from training.bundle.store import BundleRef
from training.datasets import Dataset
from training.devices import choose_device, keep_freed_memory, training_precision
from training.export import export, measure, origin
from training.loop import CHECKPOINT, Diverged, Emit, Trained, train
from training.memory import remember
from training.networks import cost
from training.processors import processors
from training.quantize import int8_form
from training.ranks import Ranks, is_first, own_device, together
from training.recipes import Recipe
from training.recipes import recipe as find_recipe
from training.trials import trials

RUN = "run.json"
EVENTS = "events.jsonl"
LEARNING_CURVE = "learning-curve.png"


class RunError(SafelightError):
    """A folder that holds no run, or one that isn't ready for what is asked."""


class Plan(BaseModel):
    """What to train; written into the run's folder, so that going on needs no more than the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName
    recipe: Recipe
    seed: int
    dataset: str
    strict: bool = False
    teacher: Path | None = None  # the run to learn from, where the recipe has a teacher; None: one within this run


@dataclass(frozen=True)
class Options:
    """Where things are on this machine; may differ from one sitting to the next."""

    artifacts: Path
    data: Path | None = None
    device: str | None = None
    download: bool = False
    activate: bool = False


@dataclass(frozen=True)
class Published:
    ref: BundleRef
    metrics: Metrics
    is_active: bool


def create(folder: Path, plan: Plan) -> None:
    """Make a run's folder, or where several processes train together, wait until the first has made it.

    Raises RunError where there is a run already, RecipeInvalid for an impossible network.
    """
    if not is_first():
        while not (folder / RUN).exists():
            time.sleep(0.05)
        return
    if (folder / RUN).exists():
        raise RunError(f"{folder} already holds a run; go on with it by --resume {folder}, or choose another by --run")
    cost(plan.recipe)  # a network that can't be built is found now, not after the data was decoded
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{RUN}").write_text(plan.model_dump_json(indent=2) + "\n")
    os.replace(folder / f".{RUN}", folder / RUN)


def open_plan(folder: Path) -> Plan:
    """Raises RunError."""
    try:
        return Plan.model_validate_json((folder / RUN).read_bytes())
    except FileNotFoundError:
        raise RunError(f"{folder} holds no run: there is no {RUN} in it") from None
    except ValidationError as error:
        raise RunError(f"{folder / RUN} can't be read: {error.errors()[0]['msg']}") from error


def execute(folder: Path, options: Options, emit: Emit, *, resume: bool, publish: bool = True) -> Published | None:
    """Train to the end, or go on to it; then measure, export and publish. Raises what the parts raise."""
    keep_freed_memory()
    torch.set_num_threads(processors())
    plan = open_plan(folder)
    device = own_device(choose_device(options.device))
    with together(device) as ranks:
        if not ranks.is_first:
            _execute(folder, plan, options, device, ranks, lambda _: None, resume=resume, publish=False)
            return None
        log = events.EventLog(folder / EVENTS)

        def tell(event: events.Event) -> None:
            log(event)
            emit(event)

        try:
            return _execute(folder, plan, options, device, ranks, tell, resume=resume, publish=publish)
        except (SafelightError, Diverged, OSError) as error:
            tell(events.Failed(code=events.code_of(error), message=str(error)))
            raise
        finally:
            log.close()


def _execute(
    folder: Path,
    plan: Plan,
    options: Options,
    device: torch.device,
    ranks: Ranks,
    tell: Emit,
    *,
    resume: bool,
    publish: bool,
) -> Published | None:
    dataset = datasets.load(
        plan.dataset, plan.recipe.input, options.data, strict=plan.strict, download=options.download
    )
    if dataset.skipped:
        tell(events.Notice(message=datasets.describe_skipped(dataset)))
    resume = resume and (folder / CHECKPOINT).exists()  # one that was stopped before its first checkpoint begins
    taught = _lessons(folder, plan, dataset, device, ranks, tell) if plan.recipe.teacher else None
    trained = train(
        plan.recipe,
        dataset,
        folder,
        seed=plan.seed,
        device=device,
        resume=resume,
        lessons=taught,
        ranks=ranks,
        emit=tell,
    )
    if ranks.is_first:
        report.learning_curve(folder / LEARNING_CURVE, trained.history)
    if not publish:
        return None
    published = _publish(folder, plan, trained, dataset, options, tell)
    ref, accuracy = published.ref, published.metrics.accuracy
    tell(events.Published(model=ref.model, version=ref.version, accuracy=accuracy))
    return published


def _lessons(
    folder: Path, plan: Plan, dataset: Dataset, device: torch.device, ranks: Ranks, tell: Emit
) -> lessons.Lessons:
    """Train the teacher, unless that is done, and have it look at the pictures."""
    assert plan.recipe.teacher is not None
    run = plan.teacher or folder / "teacher"
    if not (run / RUN).exists():
        recipe = find_recipe(plan.recipe.teacher.recipe)
        create(run, Plan(model=recipe.name, recipe=recipe, seed=plan.seed, dataset=plan.dataset, strict=plan.strict))
    teacher = open_plan(run)
    begun = (run / CHECKPOINT).exists()
    trained = train(
        teacher.recipe, dataset, run, seed=teacher.seed, device=device, resume=begun, ranks=ranks, emit=tell
    )
    fitted, _ = datasets.holdout(dataset.train, plan.recipe.holdout)
    precision = training_precision(device)
    return lessons.take(trained.network, fitted, plan.recipe, folder / "lessons", device, precision, tell)


def require_finished(folder: Path) -> None:
    """Raises RunError for a run that can still be trained further."""
    step, steps = checkpoint.read_progress(folder / CHECKPOINT)
    if step < steps:
        raise RunError(f"{folder} stands at step {step} of {steps}; go on with it: safelight train --resume {folder}")


def _publish(folder: Path, plan: Plan, trained: Trained, dataset: Dataset, options: Options, tell: Emit) -> Published:
    measured = measure(trained, dataset, plan.recipe)
    what = origin(trained, dataset, plan.recipe, seed=plan.seed, model=plan.model)
    memory = remember(trained.network, trained.train, dataset.test, len(dataset.classes))
    temperature = measured.calibration.temperature
    int8 = int8_form(trained.network, trained.train, dataset.test, plan.recipe.input, temperature, tell)
    tried = trials(
        trained.network,
        dataset.test,
        plan.recipe.input,
        measured.ood,
        temperature,
        trained.device,
        options.data,
        plan.dataset,
    )
    ref = export(
        trained.network,
        what,
        measured,
        trained.history,
        options.artifacts,
        replay=memory,
        int8=int8,
        trials=tried,
        pictures=[folder / name for name in PICTURES if (folder / name).exists()],
    )
    if options.activate or store.versions(options.artifacts, plan.model) == [ref]:
        store.activate(options.artifacts, ref)
    is_active = store.answering(options.artifacts, plan.model) == ref
    return Published(ref, measured.metrics, is_active)
