"""Every setting: its type, its default and the reason for it. Read once, from SAFELIGHT_* variables."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from training import SafelightError
from training.bundle.manifest import ModelName
from training.processors import processors

PREFIX = "SAFELIGHT_"


class SettingsInvalid(SafelightError):
    """A variable that doesn't exist or has a value that it can't have."""


class Settings(BaseSettings):
    """Field descriptions are the text of docs/settings.md."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="Address to listen on. The default is reached from this machine only.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes. One is fastest where requests can share batches; more of them divide the processors.",
    )
    artifacts: Path = Field(
        Path("artifacts"), description="Folder of models; new versions are picked up while running."
    )
    state: Path = Field(
        Path("state"), description="Folder for what the service itself keeps: jobs, their runs, data sets."
    )
    data: Path | None = Field(
        None, description="Folder with MNIST and CIFAR-10, for training and for data sets made of them."
    )
    device: str = Field("auto", description="auto (CUDA, then MPS, then CPU), cuda, cuda:1, mps or cpu.")
    precision: Literal["auto", "float32"] = Field(
        "auto",
        description="float32: in no coarser arithmetic. auto: in the fastest whose answers are near enough, see "
        "bundle-format.md.",
    )
    default_model: ModelName = Field("mnist", description="The model that answers when a request names none.")
    threads: int = Field(
        0, ge=0, le=1024, description="Threads of the engine; 0: the processors of this container divided by workers."
    )
    max_body_bytes: int = Field(
        33_554_432, ge=1024, description="Largest request body; refused with 413 while it streams in."
    )
    max_dataset_bytes: int = Field(
        2_147_483_648, ge=1024, description="Largest upload of a data set; refused with 413 while it streams in."
    )
    dataset_uploads: int = Field(
        4, ge=1, le=1000, description="Data sets that may be received or checked at once; beyond that, 429."
    )
    dataset_checks: int = Field(
        1, ge=1, le=1000, description="Checks at once, each a process at the lowest priority; other uploads wait."
    )
    dataset_seconds: float = Field(600.0, gt=0, description="A check that takes longer is stopped: 504.")
    dataset_memory_bytes: int = Field(
        4_294_967_296, ge=268_435_456, description="Most memory of a check, so that no archive can take the machine's."
    )
    max_image_pixels: int = Field(
        50_000_000, ge=1, description="Largest picture, width x height, read from its header before it is decoded."
    )
    max_images: int = Field(256, ge=1, le=100_000, description="Most pictures in one request.")
    max_batch: int = Field(
        0,
        ge=0,
        le=4096,
        description="Most pictures that the engine computes at once: 1 to 8, or 16, 32 and so on; 0: 32 on a CPU, "
        "else 64.",
    )
    queue_size: int = Field(
        384,
        ge=1,
        description="Pictures of one version that may wait or be decoded at once; beyond that, 429 with Retry-After. "
        "The default is the largest request and half as much: more of a queue only makes waiting longer.",
    )
    cache_mb: int = Field(
        0, ge=0, description="Memory, in each worker, for answers to pictures that come again; 0: none are kept."
    )
    deadline_seconds: float = Field(
        10.0, gt=0, description="A request is answered within this time or with 504; X-Deadline-Ms may ask for less."
    )
    drain_seconds: float = Field(
        0.0, ge=0, description="After SIGTERM, go on answering this long while /health/ready says 503, for balancers."
    )
    rescan_seconds: float = Field(1.0, gt=0, description="How often the artifacts folder is looked at for changes.")
    loaded_versions: int = Field(
        8, ge=1, description="Versions kept in memory beside the active ones, those used last; others load on demand."
    )
    database_url: str | None = Field(
        None,
        description="Where jobs are kept, as postgresql://user:password@host/name; an SQLite file in the state folder.",
    )
    concurrent_jobs: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Fine-tuning jobs that run at once, spread over the GPUs; left out: one for each GPU, or one in "
        "all. 0: this service only queues them.",
    )
    queued_jobs: int = Field(100, ge=1, description="Jobs that may wait; beyond that, 429.")
    job_seconds: float = Field(21_600.0, gt=0, description="A job that takes longer fails; pauses don't count.")
    hold_seconds: float = Field(
        600.0,
        ge=0,
        description="A paused job's process waits so long in memory, to go on at once, or until another job needs its "
        "place; 0: it ends at once.",
    )
    job_memory_bytes: int = Field(
        0,
        ge=0,
        description="Memory that a job may take; 0: three quarters of the machine's or its container's, shared by the "
        "jobs that run at once, and on a GPU no limit.",
    )
    keep_checkpoints: float = Field(
        7.0, ge=0, description="Days that a failed job's checkpoint is kept; that of any other goes when it is over."
    )
    keep_jobs: float = Field(90.0, ge=0, description="Days that a job that is over can still be read.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", description="json for machines, text for people; auto is text on a terminal."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.queue_size < self.max_images:
            raise ValueError(f"queue_size {self.queue_size} can't hold one request of max_images {self.max_images}")
        return self

    @property
    def threads_each(self) -> int:
        """Of one worker's engine, and as many to decode in."""
        return self.threads or max(1, processors() // self.workers)

    @classmethod
    def read(cls) -> Self:
        """From the environment. Raises SettingsInvalid with one sentence that names the variable."""
        known = {PREFIX + name.upper() for name in cls.model_fields}
        unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise SettingsInvalid(f"there is no setting {unknown[0]}; docs/settings.md lists those that exist")
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = PREFIX + str(first["loc"][0]).upper() if first["loc"] else "the settings"
            value = f"={first['input']!r}" if first["loc"] else ""
            raise SettingsInvalid(f"{name}{value}: {first['msg']}") from error
