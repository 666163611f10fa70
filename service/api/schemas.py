"""The bodies of requests and replies, and nothing else."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.jobs.job import Job, Metadata, Pictures, Promote
from training.bundle.manifest import Manifest
from training.dataset_report import Report


class Score(BaseModel):
    label: str
    index: int
    probability: float


class Problem(BaseModel):
    """RFC 9457; `code` is stable, `detail` is for people. More members, as `limit`, may stand beside them."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str


class Prediction(BaseModel):
    """The best class, its calibrated probability, and the `top_k` best classes."""

    label: str
    index: int
    probability: float
    scores: list[Score] = Field(description="best first")
    in_distribution: bool = Field(description="false: the picture is unlike what the model was trained on")


class FailedPrediction(BaseModel):
    error: Problem


class Predictions(BaseModel):
    """One entry for each picture, in the request's order."""

    model: str
    version: str
    predictions: list[Prediction | FailedPrediction]


class Base64Images(BaseModel):
    """Pictures as base64 or data URIs."""

    model_config = ConfigDict(extra="forbid")

    images: list[str]


class VersionSummary(BaseModel):
    version: str
    state: Literal["unverified", "ready", "loaded", "refused"]
    reason: str | None = Field(description="why it was refused")
    active: bool
    created_at: datetime | None
    accuracy: float | None
    weights_sha256: str | None


class Model(BaseModel):
    name: str
    active: str | None = Field(description="the version that answers when a request names none")
    default: bool = Field(description="answers when a request names no model")
    classes: list[str] = Field(description="of the active version, in index order")
    versions: list[VersionSummary]


class Models(BaseModel):
    models: list[Model]
    unreadable: dict[str, str] = Field(description="models whose folder can't be read, and why")


class VersionDetail(VersionSummary):
    manifest: Manifest | None
    report: dict[str, Any] | None = Field(description="metrics, confusion matrix and training history")


class Active(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: str


class BuiltInDataset(BaseModel):
    """A data set made of pictures that the service has."""

    model_config = ConfigDict(extra="forbid")

    builtin: Literal["mnist", "cifar10"]
    limit: int | None = Field(None, ge=20, description="so many training pictures; all of both splits if left out")
    model: str | None = Field(None, description="the model that it is meant for")
    version: str | None = None
    name: str | None = None


class Dataset(Report):
    """What was found in a data set when it was checked."""

    created_at: datetime


class DatasetSummary(BaseModel):
    id: str
    name: str
    created_at: datetime
    images: int
    bytes: int
    divided: bool
    classes: list[str]


class Datasets(BaseModel):
    datasets: list[DatasetSummary] = Field(description="newest first")


class Health(BaseModel):
    status: Literal["live", "ready"]


class Info(BaseModel):
    name: str
    version: str
    versions: dict[str, str] = Field(description="of what it runs on")
    device: str
    threads: int
    workers: int
    limits: dict[str, float]
    engines: list[dict[str, Any]] = Field(description="each loaded version's way to run, and what was timed")


class TrainSettings(BaseModel):
    """What to fine-tune, and how."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="the base")
    version: str | None = Field(None, description="of the base; the active one if left out")
    name: str | None = Field(None, description="the model that the result becomes a version of; the base's if left out")
    recipe: dict[str, Any] = Field({}, description="settings of fine-tuning that are to differ from their defaults")
    seed: int = Field(0, ge=0, le=2**32 - 1)
    promote: Promote = Field("if_better", description="when the new version is to answer")
    metadata: Metadata = {}


class TrainRequest(TrainSettings):
    """And on what. In a form `dataset` may be the archive itself, and `recipe` is JSON."""

    dataset: Pictures


class Jobs(BaseModel):
    """Newest first; with `after` set to the last one's id, the next page."""

    jobs: list[Job]
    has_more: bool


class Events(BaseModel):
    """In their order, each with its `id` and what `training/events.py` says; `after` the last id, the next page."""

    events: list[dict[str, Any]]
    has_more: bool
