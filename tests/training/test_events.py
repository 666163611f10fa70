"""Events: one line of JSON each, and back."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from training import events

EVENTS = [
    events.Validated(report={"classes": {"cat": 20, "dog": 21}, "rejected": []}),
    events.Started(recipe="tiny", dataset="squares", seed=0, device="cpu", precision="float32", steps=40, step=10),
    events.Notice(message="begun with 2 threads, goes on with 4"),
    events.Progress(step=1, steps=40, epoch=0.1, loss=0.7, accuracy=0.5, images_per_second=1000.5, seconds_left=3.0),
    events.Phase(phase="heads", step=1, steps=3, seconds_left=0.5),
    events.Epoch(
        epoch=1,
        step=10,
        train_loss=0.5,
        train_accuracy=0.8,
        holdout_loss=float("inf"),
        holdout_accuracy=0.75,
        seconds=1.5,
    ),
    events.Checkpointed(step=10, path="runs/ä/checkpoint.pt"),
    events.Interrupted(step=10),
    events.Held(),
    events.Released(),
    events.Published(model="squares", version="1", accuracy=0.9),
    events.Decided(result={"model": "squares", "promoted": True, "summary": "fixed 41 of 310, broke 6; promoted"}),
    events.Failed(code="diverged", message="the loss\nis not finite"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.event)
def test_an_event_is_one_line_and_comes_back_as_it_was(event: events.Event) -> None:
    line = event.model_dump_json()
    assert "\n" not in line
    assert events.parse(line) == event


def test_every_kind_of_event_is_tried_here() -> None:
    assert {type(event) for event in EVENTS} == set(events._Event.__subclasses__())


def test_an_event_says_when() -> None:
    before = datetime.now(UTC)
    assert before <= events.Interrupted(step=1).at <= datetime.now(UTC)


@pytest.mark.parametrize(
    "line", ["", "epoch 3", "[]", '{"event": "party"}', '{"event": "interrupted"}', '{"step": 3}', b"\xff"]
)
def test_a_line_that_is_no_event_is_refused(line: str | bytes) -> None:
    with pytest.raises(ValidationError):
        events.parse(line)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), "out_of_memory", events.OUT_OF_MEMORY),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "out_of_memory",
            events.OUT_OF_MEMORY,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", events.OUT_OF_MEMORY),
        (OSError(12, "Cannot allocate memory"), "out_of_memory", events.OUT_OF_MEMORY),
        (OSError(28, "No space left on device"), "disk_full", events.DISK_FULL),
        (OSError(5, "Input/output error"), "os_error", "[Errno 5] Input/output error"),
        (ValueError("odd"), "value_error", "odd"),
        (ValueError(), "value_error", "ValueError()"),
    ],
)
def test_a_failure_has_a_code_and_says_what_to_do(error: Exception, code: str, message: str) -> None:
    failed = events.failure(error)
    assert (failed.code, failed.message) == (code, message)


def test_a_full_disk_is_seen_behind_what_was_made_of_it() -> None:
    error = RuntimeError("the archive can't be written")
    error.__cause__ = OSError(28, "No space left on device")
    assert events.failure(error).code == "disk_full"


def test_the_log_holds_each_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = events.EventLog(path)
    for count, event in enumerate(EVENTS, start=1):
        log(event)
        assert [events.parse(line) for line in path.read_text().splitlines()] == EVENTS[:count]
    log.close()


def progress(step: int) -> events.Progress:
    return events.Progress(
        step=step, steps=40, epoch=0.1, loss=0.7, accuracy=0.5, images_per_second=1000.5, seconds_left=3.0
    )


def test_of_quick_steps_some_are_written_and_the_last_before_another_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = events.EventLog(path)
    steps = [progress(step) for step in range(1, 6)]
    end = events.Interrupted(step=5)
    for event in [*steps, end, *steps]:
        log(event)
    assert [events.parse(line) for line in path.read_text().splitlines()] == [steps[0], steps[4], end]
    log.close()
    assert [events.parse(line) for line in path.read_text().splitlines()] == [steps[0], steps[4], end, steps[4]]


def test_slow_steps_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "STEP_SECONDS", 0.0)
    log = events.EventLog(tmp_path / "events.jsonl")
    steps = [progress(step) for step in range(1, 6)]
    for step in steps:
        log(step)
    log.close()
    assert [events.parse(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()] == steps


def test_the_log_is_gone_on_with(tmp_path: Path) -> None:
    for step in (1, 2):
        log = events.EventLog(tmp_path / "events.jsonl")
        log(events.Interrupted(step=step))
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [1, 2]


def test_a_line_that_a_kill_cut_short_is_taken_away_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = events.Interrupted(step=1).model_dump_json() + "\n"
    path.write_text(whole + '{"at": "2026-')
    log = events.EventLog(path)
    assert path.read_text() == whole
    log(events.Interrupted(step=2))
    log.close()
    assert [events.parse(line).model_dump()["step"] for line in path.read_text().splitlines()] == [1, 2]
