"""What a fine-tuning run is about: the plan, the pictures, the base, and what is remembered of the base's data."""

from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from training import gate
from training.bundle.manifest import Manifest, ModelName, Version
from training.bundle.replay import Replay
from training.bundle.store import BundleRef
from training.bundle.tuning import Tuning
from training.datasets import Split
from training.networks import ConvNet


class Plan(BaseModel):
    """What to make of what; written into the run's folder, so that going on needs no more than the folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelName
    version: Version
    dataset: str
    limit: int | None = Field(None, ge=1, description="of a built-in data set, this many pictures")
    name: ModelName
    tuning: Tuning
    seed: int
    promote: gate.Policy
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def base(self) -> BundleRef:
        return BundleRef(self.model, self.version)


@dataclass(frozen=True)
class Pictures:
    """All that was accepted, as the base's input has it. `is_test` [N] marks the uploader's own test part."""

    name: str
    sha256: str
    classes: tuple[str, ...]
    everything: Split
    is_test: Tensor | None
    skipped: int


@dataclass(frozen=True)
class Task:
    """What is to be learned, from where: the base, the pictures with the new model's labels, and what is remembered."""

    plan: Plan
    manifest: Manifest
    network: ConvNet
    classes: tuple[str, ...]  # of the new model
    pictures: Pictures
    labels: Tensor  # [N], in the order of `classes`
    past: "Past"
    flip: bool
    device: torch.device
    precision: torch.dtype  # that convolutions are trained in

    @property
    def keeps_base(self) -> bool:
        """Whether the base's classes are the first of the new model's, in the base's order."""
        return self.classes[: len(self.manifest.classes)] == self.manifest.classes

    @property
    def same_classes(self) -> bool:
        return self.classes == self.manifest.classes

    @property
    def split(self) -> Split:
        return Split(self.pictures.everything.images, self.labels)


@dataclass(frozen=True)
class Past:
    """What is known of the base's own data: the pictures themselves, or features of some, or nothing."""

    replay: Split | None = None
    check: Split | None = None  # never trained on; to choose by
    guard: Split | None = None  # its test set; for the gate alone
    features: Replay | None = None
