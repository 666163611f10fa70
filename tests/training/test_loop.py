"""The training loop: what a run leaves behind, and that stopping it changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.tiny import TINY, as_settings, squares, write_class_folders
from training import checkpoint, events, runs
from training.augment import scaled
from training.checkpoint import CheckpointError
from training.datasets import Dataset, Split
from training.drawings import drawn_images
from training.evaluate import accuracy, infer
from training.loop import CHECKPOINT, Batches, Diverged, Emit, Interrupted, Trained, generator, train
from training.recipes import SGD, Affine, Recipe, Smaller, override

CPU = torch.device("cpu")
STEPS = 16  # of TINY on squares(): 64 pictures, 16 a batch, 4 epochs
SHAKEN = TINY.model_copy(update={"flip": True, "affine": Affine(degrees=10, scale=0.1, shear=5, shift=1)})

Go = Callable[..., Trained]


def ignore(_: events.Event) -> None:
    pass


@pytest.fixture
def go(tmp_path: Path) -> Go:
    """Train in a folder of this name."""

    def go(
        name: str = "run",
        recipe: Recipe = TINY,
        dataset: Dataset | None = None,
        *,
        seed: int = 0,
        resume: bool = False,
        watched: bool = False,
        emit: Emit = ignore,
    ) -> Trained:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        data = dataset or squares()
        return train(recipe, data, folder, seed=seed, device=CPU, resume=resume, watched=watched, emit=emit)

    return go


def weights(trained: Trained) -> dict[str, bytes]:
    return as_bytes(trained.network.state_dict())


def saved_weights(folder: Path) -> dict[str, bytes]:
    return as_bytes(torch.load(folder / CHECKPOINT, weights_only=True)["network"])


def as_bytes(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def without_seconds(trained: Trained) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in trained.history]


def signalling(step: int, *numbers: int) -> Emit:
    """Send ourselves signals as soon as a step is done."""

    def emit(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.step == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return emit


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_network_learns_what_it_is_shown(go: Go) -> None:
    trained, test = go(), squares().test
    assert accuracy(infer(trained.network, test.images, CPU), test.labels) >= 0.95
    assert (len(trained.train), len(trained.held)) == (64, 16)
    assert [(row["epoch"], row["step"]) for row in trained.history] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    assert trained.history[-1]["holdout_accuracy"] >= 0.9
    assert not trained.network.training


def test_the_seed_decides_the_weights(go: Go) -> None:
    once, again, other = go("once", SHAKEN), go("again", SHAKEN), go("other", SHAKEN, seed=1)
    assert weights(once) == weights(again)
    assert weights(once) != weights(other)


def test_a_run_tells_every_step_and_every_epoch(go: Go, tmp_path: Path) -> None:
    told: list[events.Event] = []
    trained = go(emit=told.append)
    epoch = ["progress"] * 4 + ["epoch", "checkpointed"]
    assert [event.event for event in told] == ["started", *(epoch * 4)]
    assert told[0].model_dump(exclude={"at", "precision"}) == {
        "event": "started",
        "recipe": "tiny",
        "dataset": "squares",
        "seed": 0,
        "device": "cpu",
        "steps": STEPS,
        "step": 0,
    }
    assert [event.model_dump(exclude={"at", "event"}) for event in told if event.event == "epoch"] == trained.history
    progress = [event for event in told if isinstance(event, events.Progress)]
    assert [(event.step, event.steps, event.epoch) for event in progress] == [
        (step, STEPS, step / 4) for step in range(1, STEPS + 1)
    ]
    assert all(event.images_per_second > 0 and event.seconds_left >= 0 for event in progress)
    assert progress[-1].seconds_left == 0
    saved = [event for event in told if isinstance(event, events.Checkpointed)]
    assert [(event.step, event.path) for event in saved] == [
        (step, str(tmp_path / "run" / CHECKPOINT)) for step in (4, 8, 12, 16)
    ]


@pytest.mark.parametrize("stop", [None, 9])
def test_curves_are_written_for_tensorboard_once_each(go: Go, tmp_path: Path, stop: int | None) -> None:
    if stop:
        with pytest.raises(Interrupted):
            go(watched=True, emit=signalling(stop, signal.SIGTERM))
        time.sleep(1)  # the two runs' files are told apart, and put in order, by the second in their names
    trained = go(watched=True, resume=stop is not None)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for tag in ("loss/train", "loss/holdout", "accuracy/train", "accuracy/holdout"):
        name, part = tag.split("/")
        assert [(point.step, point.value) for point in board.Scalars(tag)] == [
            (row["step"], pytest.approx(row[f"{part}_{name}"])) for row in trained.history
        ]


def test_pictures_are_written_for_people_and_for_tensorboard(go: Go, tmp_path: Path) -> None:
    go(watched=True)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    for name, step in (("inputs", 0), ("filters", STEPS), ("feature-maps", STEPS), ("gradients", STEPS)):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 100
        assert [image.step for image in board.Images(name)] == [step]
    layers = ["stem", "groups.0.conv1", "groups.0.conv2", "head"]
    for layer in layers:
        assert [point.step for point in board.Scalars(f"gradient/{layer}")] == [4, 8, 12, 16]


def test_nobody_has_to_watch(go: Go, tmp_path: Path) -> None:
    go()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [CHECKPOINT]


def test_with_patience_a_run_ends_when_nothing_gets_better_and_keeps_the_best(go: Go, tmp_path: Path) -> None:
    recipe = override(TINY, ["patience=2", "epochs=50"])
    trained = go("patient", recipe)
    found = [row["holdout_accuracy"] for row in trained.history]
    best = found.index(max(found))
    assert len(found) == best + 3
    assert accuracy(infer(trained.network, trained.held.images, CPU), trained.held.labels) == found[best]
    assert checkpoint.read_progress(tmp_path / "patient" / CHECKPOINT) == (200, 200)
    assert weights(go("patient", recipe, resume=True)) == weights(trained)


def test_dropout_is_a_function_of_the_seed_and_the_step(go: Go) -> None:
    arguments = {"height": 12, "width": 12, "widths": [16], "dropout": 0.5}
    recipe = SHAKEN.model_copy(update={"network": "perceptron", "arguments": arguments, "optimizer": SGD(lr=0.05)})
    straight = go("straight", recipe)
    with pytest.raises(Interrupted):
        go("stopped", recipe, emit=signalling(6, signal.SIGTERM))
    assert weights(go("stopped", recipe, resume=True)) == weights(straight)


def test_strangers_are_told_by_their_energy(go: Go) -> None:
    strange = torch.from_numpy(drawn_images(TINY.input, 200, "test"))
    apart = []
    for share in (0.0, 0.5):
        trained = go(str(share), TINY.model_copy(update={"strangers": share, "epochs": 8, "precision": "float32"}))
        known = infer(trained.network, squares().test.images, CPU)
        outside = infer(trained.network, strange, CPU)
        apart.append(float(known.logsumexp(1).mean() - outside.logsumexp(1).mean()))
        assert accuracy(known, squares().test.labels) >= 0.9
    assert apart[1] > apart[0] + 1, apart


def test_half_an_epoch_is_a_run(go: Go) -> None:
    trained = go(recipe=TINY.model_copy(update={"epochs": 0.5}))
    assert [(row["epoch"], row["step"]) for row in trained.history] == [(1, 2)]


def test_a_run_has_at_least_one_step(go: Go) -> None:
    trained = go(recipe=TINY.model_copy(update={"epochs": 0.01}))
    assert [(row["epoch"], row["step"]) for row in trained.history] == [(1, 1)]


# --- batches ----------------------------------------------------------------------------------------------------------


def numbered(count: int) -> Split:
    """Pictures whose labels are their places."""
    return Split(squares(count).train.images, torch.arange(count))


def test_a_batch_depends_on_the_seed_and_the_step_alone() -> None:
    split = squares(70).train
    forward = [Batches(split, SHAKEN, 3, CPU).at(step) for step in range(12)]
    jumping, other = Batches(split, SHAKEN, 3, CPU), Batches(split, SHAKEN, 4, CPU)
    for step in (11, 0, 5, 4, 3, 8, 8):
        batch = jumping.at(step)
        assert torch.equal(batch.images, forward[step].images)
        assert torch.equal(batch.labels, forward[step].labels)
        assert not torch.equal(batch.images, other.at(step).images)


def test_an_epoch_shows_no_picture_twice_and_each_epoch_has_its_own_order() -> None:
    batches = Batches(numbered(70), TINY, 0, CPU)
    assert (batches.size, batches.per_epoch) == (16, 4)
    epochs = [torch.cat([batches.at(4 * epoch + place).labels for place in range(4)]).tolist() for epoch in range(20)]
    assert all(len(set(epoch)) == 64 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert set().union(*epochs) == set(range(70))  # those left over in one epoch come in another


def test_a_picture_keeps_its_label() -> None:
    split = numbered(70)
    batches = Batches(split, TINY.model_copy(update={"shift": 0}), 0, CPU)
    for step in range(8):
        batch = batches.at(step)
        assert torch.equal(batch.images, split.images[batch.labels])


def test_each_picture_is_seen_both_ways_in_any_two_epochs() -> None:
    split = numbered(64)
    batches = Batches(split, TINY.model_copy(update={"shift": 0, "flip": True}), 0, CPU)
    mirrored = torch.zeros(2, 64, dtype=torch.bool)
    for step in range(8):
        batch = batches.at(step)
        mirrored[step // 4, batch.labels] = (batch.images == split.images[batch.labels].flip(3)).all(dim=(1, 2, 3))
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert 10 < mirrored[0].sum() < 54


def test_a_run_begins_with_smaller_pictures_strangers_among_them() -> None:
    recipe = TINY.model_copy(update={"epochs": 2, "smaller": Smaller(share=0.4, scale=0.75), "strangers": 0.25})
    batches = Batches(squares().train, recipe, 0, CPU)
    plain = Batches(squares().train, recipe.model_copy(update={"smaller": Smaller()}), 0, CPU)
    sizes = [batches.at(step).images.shape[2:] for step in range(batches.steps)]
    small = math.ceil(0.4 * batches.steps)
    assert sizes == [(9, 9)] * small + [(12, 12)] * (batches.steps - small)
    for step in (0, batches.steps - 1):
        assert batches.at(step).labels.tolist() == plain.at(step).labels.tolist()
    assert torch.equal(batches.at(small).images, plain.at(small).images)
    assert torch.equal(batches.at(0).images, scaled(plain.at(0).images, (9, 9)))


def test_a_data_set_smaller_than_a_batch_is_one_batch() -> None:
    batches = Batches(numbered(10), TINY, 0, CPU)
    assert (batches.size, batches.per_epoch) == (10, 1)
    assert sorted(batches.at(3).labels.tolist()) == list(range(10))


def test_randomness_goes_by_its_whole_name() -> None:
    keys = [(0, "order", 1), (0, "order", 11), (0, "order1", 1), (1, "order", 1), ("0", "order", 1), (0, "augment", 1)]
    draws = {key: torch.rand(4, generator=generator(*key)).tolist() for key in keys}
    assert len({tuple(draw) for draw in draws.values()}) == len(keys)
    assert torch.rand(4, generator=generator(*keys[0])).tolist() == draws[keys[0]]


# --- stopped, and gone on with ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[8], [1], [6], [15], [STEPS], [2, 3, 4, 11]], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    go: Go, tmp_path: Path, stops: list[int], number: int
) -> None:
    straight = go("straight", SHAKEN, seed=7)
    for sitting, step in enumerate(stops):
        with pytest.raises(Interrupted, match=f"^stopped at step {step}$") as stopped:
            go("stopped", SHAKEN, seed=7, resume=sitting > 0, emit=signalling(step, number))
        assert stopped.value.step == step
        assert checkpoint.read_progress(tmp_path / "stopped" / CHECKPOINT) == (step, STEPS)
    told: list[events.Event] = []
    ended = go("stopped", SHAKEN, seed=7, resume=True, emit=told.append)
    assert weights(ended) == weights(straight)
    assert without_seconds(ended) == without_seconds(straight)
    assert (told[0].event, told[0].step) == ("started", stops[-1])
    assert [event.step for event in told if isinstance(event, events.Progress)] == list(range(stops[-1] + 1, STEPS + 1))


def test_time_spent_before_a_stop_counts(go: Go) -> None:
    with pytest.raises(Interrupted):
        go(emit=signalling(8, signal.SIGTERM))
    ended = go(resume=True)
    seconds = [row["seconds"] for row in ended.history]
    assert seconds == sorted(seconds)
    assert ended.seconds == seconds[-1]


def test_stopping_is_told_last(go: Go, tmp_path: Path) -> None:
    told: list[events.Event] = []
    stop = signalling(6, signal.SIGTERM)

    def emit(event: events.Event) -> None:
        told.append(event)
        stop(event)

    with pytest.raises(Interrupted):
        go(emit=emit)
    path = str(tmp_path / "run" / CHECKPOINT)
    assert [event.model_dump(exclude={"at"}) for event in told[-2:]] == [
        {"event": "checkpointed", "step": 6, "path": path},
        {"event": "interrupted", "step": 6},
    ]


def test_a_second_signal_does_not_wait(go: Go, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(emit=signalling(6, signal.SIGINT, signal.SIGINT))
    assert checkpoint.read_progress(tmp_path / "run" / CHECKPOINT) == (4, STEPS)


@pytest.mark.parametrize("stop", [None, 6])
def test_signals_mean_after_a_run_what_they_meant_before(go: Go, stop: int | None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    if stop:
        with pytest.raises(Interrupted):
            go(emit=signalling(stop, signal.SIGTERM))
    else:
        go()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("seed", {"seed": 1}),
        ("recipe", {"recipe": TINY.model_copy(update={"epochs": 5})}),
        ("dataset", {"dataset": squares(seed=5)}),
    ],
)
def test_another_run_is_not_gone_on_with(go: Go, tmp_path: Path, key: str, other: dict[str, object]) -> None:
    with pytest.raises(Interrupted):
        go(emit=signalling(6, signal.SIGTERM))
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointError, match=rf"{CHECKPOINT} is of a run with {key} .*, not .*start anew"):
        go(resume=True, **other)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_a_run_without_a_checkpoint_can_not_be_gone_on_with(go: Go) -> None:
    with pytest.raises(CheckpointError, match=f"^no checkpoint at .*{CHECKPOINT}$"):
        go(resume=True)


def test_going_on_with_other_arithmetic_is_noted(go: Go, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        go(emit=signalling(6, signal.SIGTERM))
    content = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    here = dict(content["state"]["arithmetic"])
    content["state"]["arithmetic"]["device"] = "cpu (64 threads)"
    torch.save(content, tmp_path / "run" / CHECKPOINT)
    told: list[events.Event] = []
    go(resume=True, emit=told.append)
    (note,) = [event.message for event in told if isinstance(event, events.Notice)]
    assert note == f"begun with {here | {'device': 'cpu (64 threads)'}}, goes on with {here}: not bit for bit"


def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(go: Go, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        go(emit=signalling(6, signal.SIGTERM))
    content = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[content["state"]["arithmetic"]["precision"]]
    content["state"]["arithmetic"]["precision"] = other
    torch.save(content, tmp_path / "run" / CHECKPOINT)
    told: list[events.Event] = []
    trained = go(resume=True, emit=told.append)
    assert [event.precision for event in told if isinstance(event, events.Started)] == [other]
    assert trained.arithmetic["precision"] == other
    assert not [event for event in told if isinstance(event, events.Notice)]


# --- divergence -------------------------------------------------------------------------------------------------------

# A decay of many times the weight a step: what it acts on grows by a factor, until it isn't finite any more.
DIVERGING = override(TINY, ["optimizer.weight_decay=20"])
BURSTING = override(TINY, ["optimizer.weight_decay=1e30", "epochs=0.5"])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_weights(go: Go, tmp_path: Path) -> None:
    told: list[events.Event] = []
    with pytest.raises(Diverged) as diverged:
        go(recipe=DIVERGING, emit=told.append)
    step = diverged.value.step
    good = 4 * (step // 4)
    assert good > 0
    assert str(diverged.value) == (
        f"the loss is not finite at step {step}; the weights of step {good} are kept. "
        "Lower the optimizer's learning rate"
    )
    assert [event.step for event in told if isinstance(event, events.Progress)] == list(range(1, step + 1))
    assert all(math.isfinite(event.loss) for event in told if isinstance(event, events.Progress))
    assert checkpoint.read_progress(tmp_path / "run" / CHECKPOINT) == (good, STEPS)
    kept = torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["network"]
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_weights_ruined_by_an_epoch_s_last_step_are_not_kept(go: Go, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="^the loss is not finite at step 2; the weights of step 0 are kept"):
        go(recipe=BURSTING)
    assert checkpoint.read_progress(tmp_path / "run" / CHECKPOINT) == (0, 2)


# --- in a process of its own ------------------------------------------------------------------------------------------

LONG = TINY.model_copy(update={"batch_size": 4, "epochs": 3})
LONG_STEPS = 150  # of LONG on 250 pictures: 200 to train on, 50 steps an epoch


@pytest.fixture
def plan(tmp_path: Path) -> runs.Plan:
    dataset = Dataset("squares", ("filled", "hollow"), squares(250).train, squares(10).test)
    data = write_class_folders(tmp_path / "squares", dataset)
    return runs.Plan(model="tiny", recipe=LONG, seed=3, dataset=str(data))


def begin(plan: runs.Plan, folder: Path) -> "subprocess.Popen[str]":
    """`safelight train` in a process of its own, seen past its 60th step. It prints into a pipe that holds some twenty
    events, so it can't have reached the end of the second epoch, at step 100."""
    words = ["mnist", *as_settings(plan.recipe), "--name", "tiny", "--seed", str(plan.seed), "--dataset", plan.dataset]
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "train", *words, "--run", str(folder), "--no-publish", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=4096,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == 60:
            return process
    raise AssertionError(process.communicate()[1])


def finish(plan: runs.Plan, folder: Path, *, resume: bool = True) -> dict[str, bytes]:
    """Train to the end in this process."""
    if not resume:
        runs.create(folder, plan)
    told: list[events.Event] = []
    runs.execute(folder, runs.Options(artifacts=folder), told.append, resume=resume, publish=False)
    assert not any(isinstance(event, events.Notice) for event in told)
    return saved_weights(folder)


def steps_logged(folder: Path) -> int:
    lines = [json.loads(line) for line in (folder / runs.EVENTS).read_text().splitlines()]
    return max(line["step"] for line in lines if line["event"] == "progress")


@pytest.mark.slow
def test_a_process_killed_amid_an_epoch_loses_that_epoch_and_no_more(plan: runs.Plan, tmp_path: Path) -> None:
    process = begin(plan, tmp_path / "killed")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 30 <= steps_logged(tmp_path / "killed") < 100  # not each of many short steps is logged
    assert checkpoint.read_progress(tmp_path / "killed" / CHECKPOINT) == (50, LONG_STEPS)
    straight = finish(plan, tmp_path / "straight", resume=False)
    subprocess.run(
        [sys.executable, "-m", "training", "train", "--resume", str(tmp_path / "killed"), "--no-publish"],
        check=True,
        capture_output=True,
    )
    assert saved_weights(tmp_path / "killed") == straight


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_asked_to_stop_keeps_its_last_step_and_says_how_to_go_on(
    plan: runs.Plan, tmp_path: Path, number: int
) -> None:
    process = begin(plan, tmp_path / "stopped")
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 130
    step, _ = checkpoint.read_progress(tmp_path / "stopped" / CHECKPOINT)
    assert 60 <= step == steps_logged(tmp_path / "stopped") < 100
    last = events.parse(out.splitlines()[-1])
    assert last == events.Interrupted(at=last.at, step=step)
    assert err.endswith(
        f"stopped at step {step}; a checkpoint is kept. Go on with:\n"
        f"  safelight train --resume {tmp_path / 'stopped'} --no-publish\n"
    )
    assert finish(plan, tmp_path / "stopped") == finish(plan, tmp_path / "straight", resume=False)
