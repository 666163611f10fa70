"""The lines that a run prints: one JSON object each. A run's only channel to whoever started it."""

import errno
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

STEP_SECONDS = 0.1


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class Validated(_Event):
    """The data set was read and checked; `report` is intake's. What follows is training."""

    event: Literal["validated"] = "validated"
    report: dict[str, Any]


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


class Phase(_Event):
    """How far a run is with what it does beside training: before it, and after."""

    event: Literal["phase"] = "phase"
    phase: Literal["heads", "judging", "lessons"]
    step: int
    steps: int
    seconds_left: float | None = None  # of this phase


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


class Held(_Event):
    """The run waits where it is, until it is told to go on."""

    event: Literal["held"] = "held"


class Released(_Event):
    event: Literal["released"] = "released"


class Published(_Event):
    event: Literal["published"] = "published"
    model: str
    version: str
    accuracy: float


class Decided(_Event):
    """The end of a fine-tuning run: what became of the candidate, with every figure behind it."""

    event: Literal["decided"] = "decided"
    result: dict[str, Any]


class Failed(_Event):
    event: Literal["failed"] = "failed"
    code: str
    message: str


Event = Annotated[
    Validated
    | Started
    | Notice
    | Progress
    | Phase
    | Epoch
    | Checkpointed
    | Interrupted
    | Held
    | Released
    | Published
    | Decided
    | Failed,
    Field(discriminator="event"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


# What a person reads, whoever finds it out: the run itself, or the service from what became of its process.
DISK_FULL = "the disk is full; make room, then start the job again"
OUT_OF_MEMORY = (
    "the job needs more memory than it may take; allow more (SAFELIGHT_JOB_MEMORY_BYTES, or --memory-bytes), or start "
    "it again with a smaller batch_size or fewer pictures"
)

# As Python, the system, torch, C++, and those that OpenBLAS and Rust end a process with, say it.
WANT_OF_MEMORY = re.compile(
    r"MemoryError|[Cc]annot allocate memory|can't allocate memory|[Oo]ut of memory|bad_alloc"
    r"|[Mm]emory allocation .*failed"
)


def parse(line: str | bytes) -> Event:
    """Read one line; raises pydantic.ValidationError where it isn't an event."""
    return _EVENT.validate_json(line)


def code_of(error: Exception) -> str:
    """A stable code for what went wrong: the exception's name in snake case."""
    return re.sub(r"(?<=.)(?=[A-Z][a-z])", "_", type(error).__name__).lower()


def failure(error: Exception) -> Failed:
    """What went wrong, by a stable code, and what to do."""
    if any(is_disk_full(cause) for cause in (error, error.__cause__, error.__context__)):
        return Failed(code="disk_full", message=DISK_FULL)
    if isinstance(error, MemoryError) or WANT_OF_MEMORY.search(str(error)):
        return Failed(code="out_of_memory", message=OUT_OF_MEMORY)
    return Failed(code=code_of(error), message=str(error) or repr(error))


def is_disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class EventLog:
    """Appends events to a file, each written at once; what a kill cut short is taken away first.

    Of steps that take less than `STEP_SECONDS` only some are written, and always the last before another event.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("ab", buffering=0)
        self._written = -STEP_SECONDS
        self._kept_back: Progress | None = None
        if path.stat().st_size:
            self._file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and time.monotonic() < self._written + STEP_SECONDS:
            self._kept_back = event
            return
        if not isinstance(event, Progress):
            self._write_kept_back()
        self._write(event)

    def close(self) -> None:
        self._write_kept_back()
        self._file.close()

    def _write_kept_back(self) -> None:
        if self._kept_back is not None:
            self._write(self._kept_back)

    def _write(self, event: Event) -> None:
        self._file.write(event.model_dump_json().encode() + b"\n")
        self._kept_back = None
        if isinstance(event, Progress):
            self._written = time.monotonic()
