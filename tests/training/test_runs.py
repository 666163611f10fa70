"""Runs: a folder that is all one needs to go on, and that ends as a version."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import TINY, squares, write_class_folders
from training import events, runs
from training.board import PICTURES
from training.bundle import store
from training.bundle.int8 import INT8, read_int8
from training.bundle.store import BundleRef
from training.checkpoint import CheckpointError
from training.layout import DatasetError
from training.loop import CHECKPOINT, Interrupted
from training.recipes import RECIPES, Teacher
from training.runs import Options, Plan, Published, RunError

QUICK = TINY.model_copy(update={"epochs": 1})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(model="tiny", recipe=QUICK, seed=3, dataset=str(write_class_folders(tmp_path / "squares", squares())))


@pytest.fixture
def run(tmp_path: Path, plan: Plan) -> Path:
    runs.create(tmp_path / "runs" / "first", plan)
    return tmp_path / "runs" / "first"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(artifacts=tmp_path / "artifacts", device="cpu")


def execute(folder: Path, options: Options, *, resume: bool = False, publish: bool = True) -> Published | None:
    return runs.execute(folder, options, lambda _: None, resume=resume, publish=publish)


def stop_at_once(event: events.Event) -> None:
    if isinstance(event, events.Progress):
        os.kill(os.getpid(), signal.SIGTERM)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_plan(run: Path, plan: Plan) -> None:
    assert [path.name for path in run.iterdir()] == [runs.RUN]
    assert runs.open_plan(run) == plan


def test_a_run_is_not_begun_over_another(run: Path, plan: Plan) -> None:
    before = (run / runs.RUN).read_bytes()
    with pytest.raises(RunError, match=f"^{run} already holds a run; go on with it by --resume {run}, or choose"):
        runs.create(run, plan.model_copy(update={"seed": 4}))
    assert (run / runs.RUN).read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path, options: Options) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path} holds no run: there is no {runs.RUN} in it$"):
        execute(tmp_path, options)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": "tiny", "recipe": "mnist", "seed": 0, "dataset": "x"}'])
def test_a_plan_that_can_not_be_read_is_refused(run: Path, text: str) -> None:
    (run / runs.RUN).write_text(text)
    with pytest.raises(RunError, match=f"^{run / runs.RUN} can't be read: ."):
        runs.open_plan(run)


# --- to the end -------------------------------------------------------------------------------------------------------


def test_a_run_ends_as_a_version(run: Path, options: Options) -> None:
    told: list[events.Event] = []
    published = runs.execute(run, options, told.append, resume=False)
    manifest = store.read_manifest(options.artifacts, BundleRef("tiny", "1"))
    assert published == Published(BundleRef("tiny", "1"), manifest.metrics, is_active=True)
    assert (manifest.recipe.seed, manifest.recipe.settings) == (3, QUICK.model_dump(mode="json"))
    assert store.active(options.artifacts, "tiny") == "1"
    assert {path.name for path in run.iterdir()} == {
        runs.RUN,
        runs.EVENTS,
        runs.LEARNING_CURVE,
        CHECKPOINT,
        "tensorboard",
        *PICTURES,
    }
    with Image.open(run / runs.LEARNING_CURVE) as image:
        image.verify()
    assert told[-1].model_dump(exclude={"at"}) == {
        "event": "published",
        "model": "tiny",
        "version": "1",
        "accuracy": manifest.metrics.accuracy,
    }
    logged = [events.parse(line) for line in (run / runs.EVENTS).read_text().splitlines()]
    assert [event for event in told if event in logged or not isinstance(event, events.Progress)] == logged
    int8 = read_int8(BundleRef("tiny", "1").path(options.artifacts) / INT8)
    assert int8 is not None
    assert (int8.figures.n, int8.figures.float32_accuracy) == (manifest.metrics.n, manifest.metrics.accuracy)


@pytest.mark.parametrize(("activate", "active"), [(False, "1"), (True, "2")])
def test_a_second_version_answers_only_if_that_is_asked_for(
    run: Path, options: Options, activate: bool, active: str
) -> None:
    execute(run, options)
    second = execute(run, replace(options, activate=activate), resume=True)
    assert second is not None
    assert (second.ref, second.is_active) == (BundleRef("tiny", "2"), activate)
    assert store.active(options.artifacts, "tiny") == active


def test_a_run_can_be_published_later(run: Path, options: Options) -> None:
    assert execute(run, options, publish=False) is None
    assert not options.artifacts.exists()
    runs.require_finished(run)
    published = execute(run, options, resume=True)
    assert published is not None
    assert published.ref == BundleRef("tiny", "1")


# --- with a teacher ---------------------------------------------------------------------------------------------------


TAUGHT = QUICK.model_copy(update={"teacher": Teacher(recipe="tiny", temperature=2, share=0.5)})


def kinds_in(folder: Path) -> list[str]:
    """Of all events but progress, in order."""
    told = [events.parse(line) for line in (folder / runs.EVENTS).read_text().splitlines()]
    return [event.event for event in told if not isinstance(event, events.Progress)]


def test_the_teacher_is_trained_first_and_is_part_of_what_a_run_is(
    tmp_path: Path, plan: Plan, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", QUICK)
    folder = tmp_path / "taught"
    runs.create(folder, plan.model_copy(update={"recipe": TAUGHT}))
    published = execute(folder, options)
    assert published is not None
    assert published.ref == BundleRef("tiny", "1")
    assert runs.open_plan(folder / "teacher").recipe == QUICK
    views = ["phase"] * 9  # TINY moves pictures by a pixel, and mirrors none
    assert kinds_in(folder) == [
        *("started", "epoch", "checkpointed", *views, "started", "epoch", "checkpointed", "published")
    ]
    settings = store.read_manifest(options.artifacts, published.ref).recipe.settings
    assert settings["teacher"] == {"recipe": "tiny", "temperature": 2.0, "share": 0.5}


def test_a_teacher_that_was_trained_before_is_used_as_it_is(
    tmp_path: Path, plan: Plan, options: Options, run: Path
) -> None:
    execute(run, options, publish=False)
    before = (run / CHECKPOINT).read_bytes()
    folder = tmp_path / "taught"
    runs.create(folder, plan.model_copy(update={"recipe": TAUGHT, "teacher": run}))
    assert execute(folder, options) is not None
    assert (run / CHECKPOINT).read_bytes() == before
    assert not (folder / "teacher").exists()


def test_a_student_that_was_stopped_ends_with_the_weights_of_one_that_never_was(
    tmp_path: Path, plan: Plan, options: Options, run: Path
) -> None:
    execute(run, options, publish=False)
    taught = plan.model_copy(update={"recipe": TAUGHT, "teacher": run})
    for name in ("whole", "stopped"):
        runs.create(tmp_path / name, taught)
    whole = execute(tmp_path / "whole", options)
    with pytest.raises(Interrupted):
        runs.execute(tmp_path / "stopped", options, stop_at_once, resume=False)
    stopped = execute(tmp_path / "stopped", options, resume=True)
    assert whole is not None
    assert stopped is not None
    digests = {store.read_manifest(options.artifacts, one.ref).weights_sha256 for one in (whole, stopped)}
    assert len(digests) == 1


# --- not to the end ---------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_is_not_finished(run: Path, options: Options) -> None:
    with pytest.raises(Interrupted):
        runs.execute(run, options, stop_at_once, resume=False)
    with pytest.raises(RunError, match=f"^{run} stands at step 1 of 4; go on with it: safelight train --resume {run}$"):
        runs.require_finished(run)
    assert not options.artifacts.exists()
    assert execute(run, options, resume=True) is not None
    assert kinds_in(run) == [
        *("started", "checkpointed", "interrupted"),
        *("started", "epoch", "checkpointed", "published"),
    ]


def test_a_run_that_never_began_is_not_finished(run: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^no checkpoint at {run / CHECKPOINT}$"):
        runs.require_finished(run)


def test_a_run_that_was_stopped_before_its_first_checkpoint_can_be_gone_on_with(
    run: Path, plan: Plan, options: Options
) -> None:
    data = Path(plan.dataset).rename(run.parent / "moved")
    with pytest.raises(DatasetError, match=f"^no data set '{plan.dataset}'"):
        execute(run, options)
    data.rename(plan.dataset)
    assert execute(run, options, resume=True) is not None


def test_strict_runs_bear_no_broken_picture(tmp_path: Path, plan: Plan, options: Options) -> None:
    (Path(plan.dataset) / "train" / "filled" / "broken.png").write_bytes(b"\x89PNG")
    runs.create(tmp_path / "strict", plan.model_copy(update={"strict": True}))
    with pytest.raises(DatasetError, match=r"^1 pictures can't be read, the first of them train/filled/broken\.png: "):
        execute(tmp_path / "strict", options)
    runs.create(tmp_path / "lenient", plan)
    execute(tmp_path / "lenient", options)
    assert store.read_manifest(options.artifacts, BundleRef("tiny", "1")).training.dataset.skipped == 1
