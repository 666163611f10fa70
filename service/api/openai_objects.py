"""OpenAI's objects, made of ours and the other way round: a file is a data set, a `fine_tuning.job` is a job."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.jobs.datasets import DatasetRecord
from service.jobs.job import Builtin, Job, Promote, Status
from training import events

Value = TypeVar("Value")

FILE_ID = re.compile(r"file-([0-9a-f]{16})")
JOB_ID = re.compile(r"ftjob-([0-9a-f]{24})")
EVENT_ID = re.compile(r"ftevent-([0-9a-f]{24})-([1-9][0-9]{0,8})")

FINE_TUNE = "fine-tune"
STATUSES: dict[Status, str] = {"validating": "validating_files"}  # the others have the same names

# OpenAI's hyperparameters, and our settings of the same meaning.
SETTINGS = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate"}


def dataset_id(file_id: str) -> str | None:
    """None where no file can have this id."""
    match = FILE_ID.fullmatch(file_id)
    return f"ds-{match[1]}" if match else None


def file_id(dataset: str) -> str:
    return f"file-{dataset.removeprefix('ds-')}"


def own_job_id(job_id: str) -> str | None:
    """None where no job can have this id."""
    match = JOB_ID.fullmatch(job_id)
    return f"job-{match[1]}" if match else None


def openai_job_id(job_id: str) -> str:
    return f"ftjob-{job_id.removeprefix('job-')}"


def event_id(job_id: str, line: int) -> str:
    return f"ftevent-{job_id.removeprefix('job-')}-{line}"


def event_line(event_id: str, job_id: str) -> int | None:
    """None where no event of this job can have this id."""
    match = EVENT_ID.fullmatch(event_id)
    return int(match[2]) if match and f"job-{match[1]}" == job_id else None


# --- requests ---


def _none_if_auto(value: object) -> object:
    return None if value == "auto" else value


Whole = Annotated[int | None, BeforeValidator(_none_if_auto)]
Multiplier = Annotated[float | None, BeforeValidator(_none_if_auto)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileFields(_Asked):
    """What stands beside the file in a form."""

    purpose: Literal["fine-tune"]


class AskedHyperparameters(_Asked):
    """Numbers, or `auto`."""

    n_epochs: Whole = None
    batch_size: Whole = None
    learning_rate_multiplier: Multiplier = None


class AskedSupervised(_Asked):
    hyperparameters: AskedHyperparameters = AskedHyperparameters()


class AskedMethod(_Asked):
    type: Literal["supervised"]
    supervised: AskedSupervised = AskedSupervised()


class CreateJob(_Asked):
    """OpenAI's request. What only we have, as `promote`, goes through the SDK as `extra_body`."""

    model: str = Field(description="the base: a model's name, or name@version")
    training_file: str = Field(description="id of an uploaded archive")
    suffix: str | None = Field(None, description="name of the new model; the base's with `-ft` if left out")
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    method: AskedMethod | None = None
    hyperparameters: AskedHyperparameters | None = Field(None, description="as in `method`, which goes before")
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    validation_file: None = Field(None, description="the archive itself may have `test/` beside `train/`")
    integrations: Annotated[list[object], Field(max_length=0)] | None = None
    promote: Promote = "if_better"
    recipe: dict[str, Any] = {}

    @property
    def base(self) -> tuple[str, str | None]:
        """Name and, where it is given, version."""
        name, _, version = self.model.partition("@")
        return name, version or None

    @property
    def name(self) -> str:
        return self.suffix or f"{self.base[0]}-ft"

    @property
    def tuning(self) -> dict[str, Any]:
        """The settings of fine-tuning that aren't left to us."""
        asked = self.method.supervised.hyperparameters if self.method else self.hyperparameters
        given = asked.model_dump(exclude_none=True) if asked else {}
        return self.recipe | {SETTINGS[name]: value for name, value in given.items()}


# --- answers ---


class File(BaseModel):
    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"  # it was checked before it got an id

    @classmethod
    def of(cls, record: DatasetRecord) -> "File":
        created_at, report = int(record.created_at.timestamp()), record.report
        return cls(id=file_id(record.id), bytes=report.bytes, created_at=created_at, filename=f"{report.name}.zip")


class FileDeleted(BaseModel):
    object: Literal["file"] = "file"
    id: str
    deleted: Literal[True] = True


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class Hyperparameters(BaseModel):
    n_epochs: float | Literal["auto"] = "auto"
    batch_size: int | Literal["auto"] = "auto"
    learning_rate_multiplier: float | Literal["auto"] = "auto"


class Supervised(BaseModel):
    hyperparameters: Hyperparameters


class Method(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class FineTuningJob(BaseModel):
    """OpenAI's fields, and at the end two of ours: the base's version, and the result with the gate's figures."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: str
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None = Field(description="what /predict?model= takes, once the new version answers")
    status: str
    error: JobError | None
    training_file: str
    validation_file: None = None
    hyperparameters: Hyperparameters
    method: Method
    seed: int
    metadata: dict[str, str]
    organization_id: str = "safelight"
    result_files: list[str] = []
    trained_tokens: None = None
    integrations: list[str] = []
    version: str
    result: dict[str, Any] | None

    @classmethod
    def of(cls, job: Job) -> "FineTuningJob":
        given = {name: job.recipe[ours] for name, ours in SETTINGS.items() if ours in job.recipe}
        hyperparameters = Hyperparameters(**given)
        return cls(
            id=openai_job_id(job.id),
            model=job.model,
            created_at=_seconds(job.created_at),
            finished_at=_seconds(job.finished_at) if job.finished_at else None,
            estimated_finish=_estimated_finish(job),
            fine_tuned_model=job.name if job.result and job.result.get("promoted") else None,
            status=STATUSES.get(job.status, job.status),
            error=JobError(code=job.error.code, message=job.error.message) if job.error else None,
            training_file=job.dataset.builtin if isinstance(job.dataset, Builtin) else file_id(job.dataset),
            hyperparameters=hyperparameters,
            method=Method(supervised=Supervised(hyperparameters=hyperparameters)),
            seed=job.seed,
            metadata=job.metadata,
            version=job.version,
            result=job.result,
        )


def _estimated_finish(job: Job) -> int | None:
    """As long as the training takes, which is most of it; None while nobody knows."""
    if job.status != "running" or job.progress is None or job.progress.seconds_left is None:
        return None
    return _seconds(datetime.now(UTC)) + round(job.progress.seconds_left)


def _seconds(at: datetime) -> int:
    return int(at.timestamp())


class JobEvent(BaseModel):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]

    @classmethod
    def of(cls, job: Job, number: int, told: events.Event) -> "JobEvent":
        """`number` is that of the event's line."""
        figures = _figures(told)
        return cls(
            id=event_id(job.id, number),
            created_at=_seconds(told.at),
            level=LEVELS.get(type(told), "info"),
            message=_message(told),
            type="metrics" if figures else "message",
            data=figures,
        )


LEVELS: dict[type, Literal["info", "warn", "error"]] = {
    events.Notice: "warn",
    events.Interrupted: "warn",
    events.Failed: "error",
}


def _figures(told: events.Event) -> dict[str, Any]:
    match told:
        case events.Progress():
            return {
                "step": told.step,
                "total_steps": told.steps,
                "train_loss": told.loss,
                "train_accuracy": told.accuracy,
            }
        case events.Epoch():
            return {
                "step": told.step,
                "train_loss": told.train_loss,
                "train_accuracy": told.train_accuracy,
                "valid_loss": told.holdout_loss,
                "valid_accuracy": told.holdout_accuracy,
            }
    return {}


SENTENCES = {
    events.Validated: "The pictures are checked",
    events.Held: "Paused",
    events.Released: "Going on",
}


def _message(told: events.Event) -> str:
    match told:
        case events.Validated() | events.Held() | events.Released():
            return SENTENCES[type(told)]
        case events.Started():
            return f"Training on {told.device}: {told.steps} steps, from step {told.step}"
        case events.Progress():
            return f"Step {told.step}/{told.steps}: training loss={told.loss:.2f}"
        case events.Phase():
            return f"{'Fitting heads' if told.phase == 'heads' else 'Judging'}: {told.step}/{told.steps}"
        case events.Epoch():
            return f"Epoch {told.epoch}: hold-out loss={told.holdout_loss:.2f}, accuracy={told.holdout_accuracy:.3f}"
        case events.Checkpointed() | events.Interrupted():
            return f"{'Checkpoint' if isinstance(told, events.Checkpointed) else 'Stopped'} at step {told.step}"
        case events.Published():
            return f"Version {told.version} of {told.model} is there"
        case events.Decided():
            return str(told.result.get("summary", "The job is done"))
        case events.Notice() | events.Failed():
            return told.message


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None


class Checkpoint(BaseModel):
    """A version that can be asked. What a run keeps so as to go on isn't one."""

    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    id: str
    created_at: int
    fine_tuned_model_checkpoint: str = Field(description="name@version: /predict?model=name&version=version")
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int

    @classmethod
    def all_of(cls, job: Job, told: list[events.Event]) -> list["Checkpoint"]:
        """Those that a run has published, with the last figures before."""
        found: list[Checkpoint] = []
        figures: dict[str, Any] = {"step": 0}
        for event in told:
            match event:
                case events.Progress():
                    figures |= {"step": event.step, "train_loss": event.loss}
                case events.Epoch():
                    figures = {
                        "step": event.step,
                        "train_loss": event.train_loss,
                        "valid_loss": event.holdout_loss,
                        "valid_accuracy": event.holdout_accuracy,
                    }
                case events.Published():
                    metrics = CheckpointMetrics(**figures)
                    checkpoint = cls(
                        id=f"ftckpt_{job.id.removeprefix('job-')}-{event.version}",
                        created_at=_seconds(event.at),
                        fine_tuned_model_checkpoint=f"{event.model}@{event.version}",
                        fine_tuning_job_id=openai_job_id(job.id),
                        metrics=metrics,
                        step_number=metrics.step,
                    )
                    found.append(checkpoint)
        return found


class Page(BaseModel, Generic[Value]):
    object: Literal["list"] = "list"
    data: list[Value]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None
