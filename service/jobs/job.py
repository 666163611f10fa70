"""A job: what was asked for, how it stands, and which states may follow which."""

import secrets
import time
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from training.bundle.manifest import ModelName, Version

Status = Literal["queued", "validating", "running", "paused", "succeeded", "failed", "cancelled"]
Promote = Literal["if_better", "always", "never"]
Wish = Literal["pause", "cancel"]

# From each state, those that may follow. A job goes back to `queued` when its process was lost.
FOLLOWING: dict[Status, frozenset[Status]] = {
    "queued": frozenset({"validating", "paused", "cancelled"}),
    "validating": frozenset({"running", "queued", "paused", "failed", "cancelled"}),
    "running": frozenset({"succeeded", "queued", "paused", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
TERMINAL = frozenset(status for status, following in FOLLOWING.items() if not following)
AT_WORK: frozenset[Status] = frozenset({"validating", "running"})

ID = r"^job-[0-9a-f]{24}$"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Builtin(_Record):
    """One of the sets that need no upload, or a share of it, where the machine has the data."""

    builtin: Literal["cifar10", "mnist"]
    limit: int | None = Field(None, ge=20, le=50_000, description="take so many pictures; all of them if left out")


Pictures = Annotated[str | Builtin, Field(description="an uploaded set's id, or a built-in one")]


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16, description="notes of the client's own; they change nothing"),
]


class Order(_Record):
    """What is asked for, settled: the base's version is named, and so is the result."""

    model: ModelName = Field(description="the base")
    version: Version = Field(description="of the base")
    name: ModelName = Field(description="the model that the result is a version of")
    dataset: Pictures
    seed: int
    promote: Promote
    recipe: dict[str, Any] = Field(description="the settings that differ from the defaults")
    metadata: Metadata = {}


class Progress(_Record):
    phase: Literal["heads", "training", "judging"] = Field(description="in this order; few pictures: no training")
    step: int
    steps: int
    epoch: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    seconds_left: float | None = Field(None, description="of this phase")


class Error(_Record):
    code: str
    message: str


class Job(Order):
    id: str
    status: Status
    wanted: Wish | None = Field(description="asked for while it runs, and about to happen")
    progress: Progress | None
    result: dict[str, Any] | None = Field(description="once it has succeeded: the decision and the figures behind it")
    error: Error | None = Field(description="once it has failed: a stable code, and what to do")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    # The runner's own notes; no part of an answer.
    home: str = Field("", exclude=True)  # the state folder that holds its files
    seconds: float = Field(0.0, exclude=True)  # that its processes have run, of the time that it may take
    deaths: int = Field(0, exclude=True)  # of its processes in a row, without a new checkpoint between them
    died_at_step: int = Field(-1, exclude=True)


def new_id() -> str:
    """Ids sort by the time that they were made at."""
    return f"job-{time.time_ns() // 1000:014x}{secrets.token_hex(5)}"
