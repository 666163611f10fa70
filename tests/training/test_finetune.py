"""Fine-tuning from tiny@1, which tells filled from hollow squares: new classes, its own, few pictures, and noise."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import TINY as RECIPE
from tests.tiny import make_bundle, reseal, squares, write_class_folders
from training import archives, events, finetune, intake, runs, tune
from training.bundle import store
from training.bundle.classes import NameTaken
from training.bundle.int8 import INT8, read_int8
from training.bundle.replay import REPLAY, read_replay, write_replay
from training.bundle.store import BundleRef
from training.bundle.tuning import Tuning
from training.checkpoint import CheckpointError, write
from training.devices import training_precision
from training.finetune import Options, RunInvalid
from training.guest import FolderBusy, alone_in
from training.loop import Diverged, Interrupted
from training.published import verify
from training.task import Plan

TINY = BundleRef("tiny", "1")


def bars(root: Path, count: int, *, seed: int = 0, kinds: str = "across down cross", shuffled: bool = False) -> Path:
    """Pictures of bars, so many of each kind, in class folders."""
    random = np.random.default_rng(seed)
    names = kinds.split()
    labels = np.repeat(np.arange(len(names)), count)
    folders = random.permutation(labels) if shuffled else labels
    for index, (label, folder) in enumerate(zip(labels, folders, strict=True)):
        pixels = random.integers(0, 60, (12, 12), dtype=np.uint8)
        y, x = random.integers(2, 9, 2)
        if names[label] in ("across", "cross"):
            pixels[y : y + 2] = 220
        if names[label] in ("down", "cross"):
            pixels[:, x : x + 2] = 220
        path = root / names[folder] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def inverted_squares(root: Path, count: int) -> Path:
    """What tiny@1 knows, dark on light: it must guess."""
    dataset = squares(count, seed=50)
    splits = [type(split)(255 - split.images, split.labels) for split in (dataset.train, dataset.test)]
    return write_class_folders(root, type(dataset)("inverted", dataset.classes, *splits))


def plan(dataset: Path, **changes: Any) -> Plan:
    values = {
        "model": "tiny",
        "version": "1",
        "dataset": str(dataset),
        "name": "bars",
        "tuning": Tuning(),
        "seed": 0,
        "promote": "if_better",
    }
    return Plan.model_validate(values | changes)


def run(
    folder: Path, artifacts: Path, made: Plan, emit: Callable[[events.Event], None] = lambda _: None
) -> dict[str, Any]:
    finetune.create(folder, made)
    return finetune.execute(folder, Options(artifacts, device="cpu"), emit)


def events_of(folder: Path) -> list[events.Event]:
    return [events.parse(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def kinds_of(folder: Path) -> list[str]:
    """The kinds of events in order, progress, phases and notices left out, each once where it repeats."""
    kinds = [event.event for event in events_of(folder) if event.event not in ("progress", "phase", "notice")]
    return [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind]


def phases_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Of each phase: its first step and its last, with none left out between, and of how many."""
    phases: dict[str, list[events.Phase]] = {}
    for event in events_of(folder):
        if isinstance(event, events.Phase):
            phases.setdefault(event.phase, []).append(event)
    for told in phases.values():
        assert [event.step for event in told] == list(range(told[0].step, told[-1].step + 1))
    return {name: (told[0].step, told[-1].step, told[-1].steps) for name, told in phases.items()}


def weights(artifacts: Path, ref: BundleRef) -> str:
    return store.read_manifest(artifacts, ref).weights_sha256


def test_new_classes_become_a_new_model_that_answers(tmp_path: Path, tiny: Path) -> None:
    result = run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 120)))
    assert (result["model"], result["version"], result["promoted"], result["decision"]) == (
        "bars",
        "1",
        True,
        "promote",
    )
    assert result["metrics"]["accuracy"] > 0.9
    assert result["summary"].endswith("; promoted")
    assert result["comparisons"].keys() == {"candidate", "nearest_mean", "majority"}
    ref = BundleRef("bars", "1")
    assert store.answering(tiny, "bars") == ref
    verify(ref, tiny)
    manifest = store.read_manifest(tiny, ref)
    assert manifest.classes == ("across", "cross", "down")
    assert manifest.parent is not None
    assert (manifest.parent.model, manifest.parent.version) == ("tiny", "1")
    assert manifest.parent.weights_sha256 == weights(tiny, TINY)
    assert json.loads((ref.path(tiny) / "report" / "metrics.json").read_text())["gate"]["decision"] == "promote"
    assert read_replay(ref.path(tiny) / REPLAY) is not None
    int8 = read_int8(ref.path(tiny) / INT8)
    assert int8 is not None
    assert (int8.figures.n, int8.figures.objection()) == (manifest.training.dataset.test, None)


def test_the_events_tell_the_whole_story(tmp_path: Path, tiny: Path) -> None:
    seen: list[events.Event] = []
    result = run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 120), tuning=Tuning(epochs=2)), seen.append)
    found = events_of(tmp_path / "run")
    assert seen == found
    assert kinds_of(tmp_path / "run")[:2] == ["validated", "started"]
    assert kinds_of(tmp_path / "run")[-2:] == ["published", "decided"]
    steps = [event.step for event in found if isinstance(event, events.Progress)]
    assert steps == list(range(1, len(steps) + 1))
    last = found[-1]
    assert isinstance(last, events.Decided)
    assert last.result == result
    assert phases_of(tmp_path / "run") == {"heads": (0, 3, 3), "judging": (0, 1, 2)}
    assert (tmp_path / "run" / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run" / "data").exists()


def test_a_model_of_its_own_classes_becomes_better_and_replaces_itself(tmp_path: Path, tiny: Path) -> None:
    made = plan(inverted_squares(tmp_path / "data", 400), name="tiny", tuning=Tuning(depth="full", replay=False))
    result = run(tmp_path / "run", tiny, made)
    assert (result["model"], result["version"]) == ("tiny", "2")
    comparisons = result["comparisons"]
    assert comparisons.keys() == {"candidate", "active", "nearest_mean", "majority"}
    assert {score["n"] for score in comparisons.values()} == {400}
    assert (comparisons["active"]["accuracy"] < 0.7, comparisons["majority"]["accuracy"]) == (True, 0.5)
    assert comparisons["candidate"]["accuracy"] > max(0.9, comparisons["nearest_mean"]["accuracy"])
    checks = {check["name"]: check["passed"] for check in result["gate"]["checks"]}
    assert (checks["mcnemar"], checks["macro_f1"], checks["recall"]) == (True, True, True)
    assert store.read_manifest(tiny, BundleRef("tiny", "2")).classes == ("filled", "hollow")


def test_what_it_forgot_of_its_own_data_keeps_it_from_answering(tmp_path: Path, tiny: Path) -> None:
    """Without the base's data, the features in its bundle are the guard."""
    made = plan(inverted_squares(tmp_path / "data", 400), name="tiny", tuning=Tuning(depth="head", replay=False))
    result = run(tmp_path / "run", tiny, made)
    (guard,) = (check for check in result["gate"]["checks"] if check["name"] == "guard")
    assert (guard["passed"], guard["figures"]["n"]) == (False, 80)
    assert result["promoted"] is False
    assert store.answering(tiny, "tiny") == TINY


def test_a_base_of_too_many_classes_to_remember_any_is_fine_tuned_without_a_guard(tmp_path: Path, tiny: Path) -> None:
    folder = TINY.path(tiny)
    known = read_replay(folder / REPLAY)
    assert known is not None
    none = {name: getattr(known, name)[:0] for name in ("features", "labels", "guard_features", "guard_labels")}
    write_replay(folder / REPLAY, replace(known, **none))
    reseal(folder)
    made = plan(inverted_squares(tmp_path / "data", 40), name="tiny", tuning=Tuning(depth="head"))
    (guard,) = (check for check in run(tmp_path / "run", tiny, made)["gate"]["checks"] if check["name"] == "guard")
    assert (guard["passed"], guard["sentence"]) == (None, "There is no test set of the base to guard.")


def test_each_candidate_on_the_same_test_pictures_makes_it_harder_also_when_it_was_deleted(
    tmp_path: Path, tiny: Path
) -> None:
    data = inverted_squares(tmp_path / "data", 110)

    def asked(folder: str) -> float:
        """What p must be below."""
        made = plan(data, name="tiny", promote="never", tuning=Tuning(depth="head", replay=False))
        checks = run(tmp_path / folder, tiny, made)["gate"]["checks"]
        return next(check["figures"]["alpha"] for check in checks if check["name"] == "mcnemar")

    assert asked("first") == 0.05
    store.delete(tiny, BundleRef("tiny", "2"))
    (data / "train" / "filled" / "0000.png").unlink()
    assert asked("another-training-part") == 0.025
    assert asked("the-same-again") == 0.025
    (data / "test" / "filled" / "0000.png").unlink()
    assert asked("another-test-part") == 0.05


@pytest.mark.parametrize("seed", range(10))
def test_shuffled_labels_are_refused_and_nothing_answers(tmp_path: Path, tiny: Path, seed: int) -> None:
    data = bars(tmp_path / "bars", 120, seed=seed, shuffled=True)
    result = run(tmp_path / "run", tiny, plan(data, seed=seed, tuning=Tuning(depth="head")))
    assert (result["promoted"], result["decision"]) == (False, "refuse")
    assert store.answering(tiny, "bars") is None
    assert [str(ref) for ref in store.versions(tiny, "bars")] == ["bars@1"]


def test_few_pictures_are_cross_validated(tmp_path: Path, tiny: Path) -> None:
    result = run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 25)))
    assert phases_of(tmp_path / "run") == {"heads": (0, 21, 21), "judging": (0, 1, 2)}  # 5 x (3 + 1) + 1
    assert result["metrics"]["n"] == 75  # each of them, answered by a head that never saw it
    assert result["promoted"] is True
    assert store.read_manifest(tiny, BundleRef("bars", "1")).training.dataset.train == 75


def test_pictures_that_were_checked_for_this_base_are_not_checked_again(tmp_path: Path, tiny: Path) -> None:
    checked, base = tmp_path / "checked", intake.Base.read(tiny, TINY)
    with archives.opened(bars(tmp_path / "bars", 25)) as archive:
        report = intake.check(archive, "my bars", base=base, into=checked)
    made = plan(checked / intake.DATA)
    taken = finetune.accepted(made, base, tmp_path / "data", Options(tiny))
    assert taken == (checked / intake.DATA, report)
    assert not (tmp_path / "data").exists()


def test_pictures_that_were_checked_for_another_base_are_checked_once_more(tmp_path: Path, tiny: Path) -> None:
    checked, base = tmp_path / "checked", intake.Base.read(tiny, TINY)
    with archives.opened(bars(tmp_path / "bars", 25)) as archive:
        intake.check(archive, "my bars", into=checked)
    made = plan(checked / intake.DATA)
    archive_path, report = finetune.accepted(made, base, tmp_path / "data", Options(tiny))
    assert archive_path == tmp_path / "data" / intake.DATA
    assert (report.name, report.images) == ("my bars", 75)
    assert report.base is not None
    assert (report.base.model, report.base.version) == ("tiny", "1")
    shutil.rmtree(checked)  # a run that goes on needs it no more
    assert finetune.accepted(made, base, tmp_path / "data", Options(tiny)) == (archive_path, report)


def test_the_policy_has_the_last_word(tmp_path: Path, tiny: Path) -> None:
    data = bars(tmp_path / "bars", 25)
    never = run(tmp_path / "first", tiny, plan(data, promote="never"))
    assert (never["decision"], never["promoted"], store.answering(tiny, "bars")) == ("promote", False, None)
    shuffled = bars(tmp_path / "shuffled", 25, shuffled=True)
    always = run(tmp_path / "second", tiny, plan(shuffled, promote="always"))
    assert (always["decision"], always["promoted"]) == ("refuse", True)
    assert store.answering(tiny, "bars") == BundleRef("bars", "2")


def test_the_base_s_classes_can_be_kept(tmp_path: Path, tiny: Path) -> None:
    made = plan(bars(tmp_path / "bars", 120), tuning=Tuning(keep_classes=True, depth="head"))
    run(tmp_path / "run", tiny, made)
    assert store.read_manifest(tiny, BundleRef("bars", "1")).classes == ("filled", "hollow", "across", "cross", "down")


def test_a_class_is_known_whatever_its_case(tmp_path: Path, tiny: Path) -> None:
    data = inverted_squares(tmp_path / "data", 40)
    for part in ("train", "test"):
        (data / part / "filled").rename(data / part / "Filled")
    made = plan(data, name="other", tuning=Tuning(depth="head"))
    run(tmp_path / "run", tiny, made)
    assert store.read_manifest(tiny, BundleRef("other", "1")).classes == ("filled", "hollow")


def test_a_name_that_stands_for_other_classes_is_taken(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(NameTaken) as refusal:
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 25), name="tiny"))
    assert str(refusal.value) == (
        "model tiny has the classes filled, hollow; the new version would have across, cross, down: "
        "give it another `name`"
    )
    last = events_of(tmp_path / "run")[-1]
    assert isinstance(last, events.Failed)
    assert (last.code, last.message) == ("name_taken", str(refusal.value))
    assert [str(ref) for ref in store.versions(tiny, "tiny")] == ["tiny@1"]


def test_a_name_that_is_held_back_stands_for_its_classes_too(tmp_path: Path, tiny: Path) -> None:
    run(tmp_path / "first", tiny, plan(bars(tmp_path / "bars", 25), promote="never"))
    assert store.answering(tiny, "bars") is None
    with pytest.raises(NameTaken) as refusal:
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "others", 25, kinds="across down"), promote="always"))
    assert str(refusal.value) == (
        "model bars has the classes across, cross, down; the new version would have across, down: "
        "give it another `name`"
    )
    assert [str(ref) for ref in store.versions(tiny, "bars")] == ["bars@1"]


def test_a_new_version_has_the_classes_as_the_last_one_spells_and_orders_them(tmp_path: Path, tiny: Path) -> None:
    first = run(tmp_path / "first", tiny, plan(bars(tmp_path / "bars", 25)))
    reseal(
        tiny / "bars" / "1", classes=("Down", "ACROSS", "cross")
    )  # its weights haven't changed: it calls all wrongly
    second = run(tmp_path / "second", tiny, plan(bars(tmp_path / "bars", 25), seed=1))
    assert first["classes"] == ["across", "cross", "down"]
    assert second["classes"] == ["Down", "ACROSS", "cross"]
    assert list(second["metrics"]["per_class_recall"]) == ["Down", "ACROSS", "cross"]
    accuracies = {name: score["accuracy"] for name, score in second["comparisons"].items()}
    assert accuracies["candidate"] > 0.9
    assert (accuracies["active"] < 0.2, second["promoted"]) == (True, True)


def test_a_job_whose_name_another_one_takes_meanwhile_is_refused(tmp_path: Path, tiny: Path) -> None:
    def be_slower(event: events.Event) -> None:
        if isinstance(event, events.Phase) and (event.phase, event.step) == ("judging", 0):
            make_bundle(tiny, "bars", classes=("across", "down"))

    with pytest.raises(
        NameTaken, match="^model bars has the classes across, down; the new version would have across, "
    ):
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 25)), be_slower)
    assert [str(ref) for ref in store.versions(tiny, "bars")] == ["bars@1"]


# --- killed and gone on with ------------------------------------------------------------------------------------------


def stop_at(step: int) -> Callable[[events.Event], None]:
    def emit(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return emit


def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_never_was(tmp_path: Path, tiny: Path) -> None:
    data = bars(tmp_path / "bars", 120)
    other = shutil.copytree(tiny, tmp_path / "other")
    whole = run(tmp_path / "whole", other, plan(data))

    with pytest.raises(Interrupted):
        run(tmp_path / "run", tiny, plan(data), stop_at(7))
    with pytest.raises(Interrupted):
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), stop_at(30))
    result = finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    assert weights(tiny, BundleRef("bars", "1")) == weights(other, BundleRef("bars", "1"))
    for key in ("summary", "metrics", "comparisons"):
        assert result[key] == whole[key]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_heads_are_fitted_once_and_again_only_where_they_are_lost(
    tmp_path: Path, tiny: Path, damage: Callable[[Path], object]
) -> None:
    def fits() -> int:
        return sum(isinstance(event, events.Phase) and event.phase == "heads" for event in events_of(tmp_path / "run"))

    with pytest.raises(Interrupted):
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 120)), stop_at(7))
    once = fits()
    for step in (9, 11):
        with pytest.raises(Interrupted):
            finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), stop_at(step))
        assert fits() == once
    damage(tmp_path / "run" / "head.pt")
    with pytest.raises(Interrupted):
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), stop_at(13))
    assert fits() == 2 * once > 0


class Killed(BaseException):
    """As if the process had died here."""


def test_a_run_that_was_killed_once_it_had_published_finds_its_version_again(tmp_path: Path, tiny: Path) -> None:
    def die(event: events.Event) -> None:
        if isinstance(event, events.Published):
            raise Killed

    data = bars(tmp_path / "bars", 25)
    with pytest.raises(Killed):
        run(tmp_path / "run", tiny, plan(data), die)
    assert store.answering(tiny, "bars") is None
    result = finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    assert (result["version"], result["promoted"]) == ("1", True)
    assert [str(ref) for ref in store.versions(tiny, "bars")] == ["bars@1"]


def run_until_active(folder: Path, artifacts: Path, made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and die right after the version was activated."""
    activate = store.activate

    def activate_and_die(artifacts: Path, ref: BundleRef) -> None:
        activate(artifacts, ref)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "activate", activate_and_die)
        with pytest.raises(Killed):
            run(folder, artifacts, made)


def test_a_run_that_was_killed_once_its_version_was_active_ends_like_one_that_never_was(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, other = bars(tmp_path / "bars", 25), shutil.copytree(tiny, tmp_path / "other")
    run_until_active(tmp_path / "run", tiny, plan(data), monkeypatch)
    assert store.answering(tiny, "bars") == BundleRef("bars", "1")
    result = finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    whole = run(tmp_path / "whole", other, plan(data))
    assert result | {"seconds": 0} == whole | {"seconds": 0}
    assert (result["version"], result["promoted"], store.answering(tiny, "bars")) == ("1", True, BundleRef("bars", "1"))


def test_what_was_timed_before_the_kill_is_what_is_told_after_it(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(
        inverted_squares(tmp_path / "data", 40),
        name="tiny",
        promote="always",
        tuning=Tuning(depth="head", replay=False),
    )
    run_until_active(tmp_path / "run", tiny, made, monkeypatch)
    result = finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    reported = json.loads((tiny / "tiny" / "2" / "report" / "metrics.json").read_text())
    assert result["gate"]["checks"] == reported["gate"]["checks"]
    assert (result["comparisons"], result["metrics"]) == (reported["gate"]["comparisons"], reported["metrics"])
    assert {"latency", "mcnemar"} <= {check["name"] for check in result["gate"]["checks"]}
    assert [ref.version for ref in store.versions(tiny, "tiny")] == ["1", "2"]


def test_what_a_kill_left_of_files_that_were_being_written_goes_when_the_run_goes_on(
    tmp_path: Path, tiny: Path
) -> None:
    made = plan(bars(tmp_path / "bars", 25))
    finetune.create(tmp_path / "run", made)
    torn = (
        ".checkpoint.pt-4711",
        ".head.pt-1",
        ".learning-curve.png",
        ".run.json",
        ".data-safelight-x/content/data.zip",
    )
    for name in torn:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"torn")
    (tmp_path / "run" / ".notes").write_text("mine")
    finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", ".notes", "events.jsonl", finetune.PRECISION, "run.json"]


def test_a_folder_where_a_run_is_at_work_is_left_alone(tmp_path: Path, tiny: Path) -> None:
    finetune.create(tmp_path / "run", plan(bars(tmp_path / "bars", 25)))
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "being writ')
    with alone_in(tmp_path / "run"), pytest.raises(FolderBusy) as refusal:
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    assert str(refusal.value) == f"another process is at work in {tmp_path / 'run'}; wait for it, or stop it first"
    assert (tmp_path / "run" / "events.jsonl").read_text() == '{"event": "being writ'


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(tmp_path: Path, tiny: Path) -> None:
    other = {torch.float32: "bfloat16", torch.bfloat16: "float32"}[training_precision(torch.device("cpu"))]
    made = plan(bars(tmp_path / "bars", 120))
    finetune.create(tmp_path / "run", made)
    write(tmp_path / "run" / finetune.PRECISION, {"precision": other})
    finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    assert {event.precision for event in events_of(tmp_path / "run") if isinstance(event, events.Started)} == {other}
    assert store.read_manifest(tiny, BundleRef("bars", "1")).training.precision == other


def test_a_base_that_is_no_convnet_is_refused_with_its_kind(tmp_path: Path, tiny: Path) -> None:
    perceptron = RECIPE.model_copy(
        update={"network": "perceptron", "arguments": {"height": 12, "width": 12, "widths": []}, "epochs": 1}
    )
    shown = str(write_class_folders(tmp_path / "squares", squares()))
    runs.create(tmp_path / "base", runs.Plan(model="flat", recipe=perceptron, seed=0, dataset=shown))
    runs.execute(tmp_path / "base", runs.Options(tiny, device="cpu"), lambda _: None, resume=False)
    told: list[events.Event] = []
    with pytest.raises(finetune.BaseUnsuitable, match="^flat@1 is a perceptron; only a convnet can be fine-tuned$"):
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 40), model="flat"), told.append)
    assert told[-1].model_dump(exclude={"at"}) == {
        "event": "failed",
        "code": "base_unsuitable",
        "message": "flat@1 is a perceptron; only a convnet can be fine-tuned",
    }
    assert store.versions(tiny, "bars") == []


def test_a_run_is_not_begun_over_another(tmp_path: Path) -> None:
    made = plan(tmp_path / "nothing")
    finetune.create(tmp_path / "run", made)
    with pytest.raises(RunInvalid, match=f"^{tmp_path / 'run'} already holds a run; go on with it by --resume"):
        finetune.create(tmp_path / "run", made)
    assert finetune.open_plan(tmp_path / "run") == made


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunInvalid, match=rf"^{tmp_path} holds no run: there is no run\.json in it$"):
        finetune.execute(tmp_path, Options(tmp_path), lambda _: None)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_loss_that_runs_away_is_gone_back_from_twice_and_then_fails(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "TRUNK_LR", 1e30)
    made = plan(bars(tmp_path / "bars", 120), tuning=Tuning(epochs=20))
    with pytest.raises(Diverged, match="the loss is not finite at step"):
        run(tmp_path / "run", tiny, made)
    last = events_of(tmp_path / "run")[-1]
    assert isinstance(last, events.Failed)
    assert last.code == "diverged"
    assert "Lower learning_rate" in last.message
    again = [event for event in events_of(tmp_path / "run") if isinstance(event, events.Notice)]
    assert sum("with smaller steps" in event.message for event in again) == 2


def test_a_damaged_checkpoint_fails_the_run_and_is_named(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path / "run", tiny, plan(bars(tmp_path / "bars", 120)), stop_at(3))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"^{path} is damaged: "):
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu"), lambda _: None)
    last = events_of(tmp_path / "run")[-1]
    assert isinstance(last, events.Failed)
    assert last.code == "checkpoint_error"
    assert store.versions(tiny, "bars") == []


def test_time_that_is_over_ends_the_run_with_a_checkpoint(tmp_path: Path, tiny: Path) -> None:
    finetune.create(tmp_path / "run", plan(bars(tmp_path / "bars", 120)))
    with pytest.raises(Exception, match="the time allowed was over at step 1; allow more, or ask for fewer epochs"):
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu", deadline_seconds=0), lambda _: None)
    last = events_of(tmp_path / "run")[-1]
    assert isinstance(last, events.Failed)
    assert last.code == "deadline_passed"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def failed(
    folder: Path, artifacts: Path, made: Plan, *, expected: type[Exception] | tuple[type[Exception], ...]
) -> Any:
    """The event that a run ends with which fails."""
    with pytest.raises(expected):
        run(folder, artifacts, made)
    last = events_of(folder)[-1]
    assert isinstance(last, events.Failed)
    return last


def test_where_no_version_could_be_published_nothing_is_begun(
    tmp_path: Path, tiny: Path, read_only: Callable[[Path], Path]
) -> None:
    read_only(tiny)
    last = failed(tmp_path / "run", tiny, plan(tmp_path / "bars"), expected=store.ArtifactsUnwritable)
    assert last.code == "artifacts_unwritable"
    assert last.message == (
        f"{tiny} can't be written, so no version could be published there; see to the owner and rights of the "
        "artifacts folder (SAFELIGHT_ARTIFACTS)"
    )


def test_a_full_disk_of_models_fails_the_run_and_nothing_half_made_is_left(
    tmp_path: Path, tiny: Path, small_disk: Callable[[Path, str], Path]
) -> None:
    artifacts = small_disk(tmp_path / "small", "304k")
    shutil.copytree(tiny, artifacts, dirs_exist_ok=True)
    data = bars(tmp_path / "bars", 25)
    last = failed(tmp_path / "run", artifacts, plan(data), expected=(OSError, RuntimeError))
    assert (last.code, last.message) == ("disk_full", events.DISK_FULL)
    assert store.versions(artifacts, "bars") == []
    assert {path.name for path in (artifacts / "bars").iterdir()} <= {"active", ".looks"}
    shutil.copytree(artifacts, tmp_path / "larger")
    again = finetune.execute(tmp_path / "run", Options(tmp_path / "larger", device="cpu"), lambda _: None)
    assert (again["version"], again["promoted"]) == ("1", True)


def test_a_full_disk_of_runs_fails_the_run_without_a_torn_checkpoint(
    tmp_path: Path, tiny: Path, small_disk: Callable[[Path, str], Path]
) -> None:
    folder = small_disk(tmp_path / "run", "220k")
    data = bars(tmp_path / "bars", 120)
    last = failed(folder, tiny, plan(data), expected=(OSError, RuntimeError))
    assert last.code == "disk_full"
    assert store.versions(tiny, "bars") == []
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 200_000


def test_a_run_that_may_take_less_memory_than_it_needs_to_begin_fails(tmp_path: Path, tiny: Path) -> None:
    finetune.create(tmp_path / "run", plan(tmp_path / "bars"))
    with pytest.raises(MemoryError):
        finetune.execute(tmp_path / "run", Options(tiny, device="cpu", memory_bytes=100_000_000), lambda _: None)
    (last,) = events_of(tmp_path / "run")
    assert isinstance(last, events.Failed)
    assert (last.code, last.message) == ("out_of_memory", events.OUT_OF_MEMORY)


FAILS_FOR_WANT = """
import resource
from training import finetune, guest
told = [RuntimeError("can't start new thread"), RuntimeError("could not create a primitive"), SystemError("no error")]
print(*(finetune.failure(error).code for error in told))
guest.limit_memory(guest._allocated() + 2**23)
print(*(finetune.failure(error).code for error in [*told, ValueError("odd"), finetune.RunInvalid("no run")]))
"""


def test_whatever_fails_where_no_memory_is_left_fails_for_that() -> None:
    told = subprocess.run([sys.executable, "-c", FAILS_FOR_WANT], capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in told.splitlines()] == [
        ["runtime_error", "runtime_error", "system_error"],
        ["out_of_memory", "out_of_memory", "out_of_memory", "value_error", "run_invalid"],
    ]
