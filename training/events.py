"""The lines that a run prints: one JSON object each. A run's only channel to whoever started it."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Started(_Event):
    event: Literal["started"] = "started"
    recipe: str
    dataset: str
    seed: int
    device: str
    precision: str
    steps: int
    step: int  # 0, or where a resumed run goes on


class Notice(_Event):
    """Something that a person should know, and that doesn't stop the run."""

    event: Literal["notice"] = "notice"
    message: str


class Progress(_Event):
    event: Literal["progress"] = "progress"
    step: int
    steps: int
    epoch: float
    loss: float  # mean over the batch, in nats
    accuracy: float  # share of the epoch's images so far that were right when they came
    images_per_second: float
    seconds_left: float


class Epoch(_Event):
    event: Literal["epoch"] = "epoch"
    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    holdout_loss: float
    holdout_accuracy: float
    seconds: float  # spent training so far, resumed runs included


class Checkpointed(_Event):
    event: Literal["checkpointed"] = "checkpointed"
    step: int
    path: str


class Interrupted(_Event):
    event: Literal["interrupted"] = "interrupted"
    step: int


class Published(_Event):
    event: Literal["published"] = "published"
    model: str
    version: str
    accuracy: float


class Failed(_Event):
    event: Literal["failed"] = "failed"
    code: str
    message: str


Event = Annotated[
    Started | Notice | Progress | Epoch | Checkpointed | Interrupted | Published | Failed, Field(discriminator="event")
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def parse(line: str | bytes) -> Event:
    """Read one line; raises pydantic.ValidationError where it isn't an event."""
    return _EVENT.validate_json(line)


def code_of(error: Exception) -> str:
    """A stable code for what went wrong: the exception's name in snake case."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", type(error).__name__).lower()


class EventLog:
    """Appends events to a file, each flushed as it is written; a line is whole or not there."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", buffering=1)

    def __call__(self, event: Event) -> None:
        self._file.write(event.model_dump_json() + "\n")

    def close(self) -> None:
        self._file.close()
