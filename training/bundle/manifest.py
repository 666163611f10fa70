"""The manifest: everything a bundle says about itself. Readable without torch."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from training import SafelightError

MODULE = "model.ts"
CHECKPOINT = "checkpoint.safetensors"
GOLDEN = "golden.safetensors"
MANIFEST = "manifest.json"

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Version = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,8}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^(report/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Fraction = Annotated[float, Field(ge=0, le=1)]

Fit = Literal["digit", "cover", "contain", "stretch"]
Score = Literal["energy", "max_logit", "max_probability"]


class BundleError(SafelightError):
    """A folder that should be a bundle and isn't one that can be trusted."""


class ManifestInvalid(BundleError):
    """manifest.json is missing, isn't JSON, or says something impossible."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class InputSpec(_Record):
    """What the network takes: uint8 [N, channels, height, width]; `fit` says how a picture becomes that."""

    channels: Literal[1, 3]
    height: int = Field(ge=1, le=1024)
    width: int = Field(ge=1, le=1024)
    fit: Fit

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class NetworkSpec(_Record):
    """Enough to build the network again before its weights are loaded."""

    name: str
    arguments: dict[str, Any]
    parameters: int = Field(ge=0)
    macs: int = Field(ge=0, description="multiply-accumulates for one image")


class RecipeSpec(_Record):
    name: str
    settings: dict[str, Any]
    seed: int


class DatasetFacts(_Record):
    name: str
    sha256: Sha256
    train: int = Field(ge=0, description="images that the weights were fitted to")
    holdout: int = Field(ge=0, description="images of train kept back for calibration")
    test: int = Field(ge=0)
    skipped: int = Field(ge=0, description="pictures that could not be decoded")


class TrainingFacts(_Record):
    dataset: DatasetFacts
    epochs: float = Field(ge=0)
    seconds: float = Field(ge=0)
    device: str
    precision: str
    torch: str


class Parent(_Record):
    model: ModelName
    version: Version
    weights_sha256: Sha256


class Metrics(_Record):
    """On the test set, read once. ECE in 15 equal bins; NLL and ECE after temperature scaling, in nats and [0, 1]."""

    n: int = Field(ge=1)
    accuracy: Fraction
    accuracy_tta: Fraction | None
    macro_f1: Fraction
    per_class_recall: dict[str, Fraction]
    nll: float = Field(ge=0)
    nll_uncalibrated: float = Field(ge=0)
    ece: Fraction
    ece_uncalibrated: Fraction


class Calibration(_Record):
    temperature: float = Field(gt=0)


class OutOfDistribution(_Record):
    """An input scores `score`; at or above `threshold` it counts as in distribution."""

    score: Score
    threshold: float
    true_positive_rate: Fraction = Field(description="share of held-out images at or above the threshold")


class FileFacts(_Record):
    sha256: Sha256
    bytes: int = Field(ge=0)


class Manifest(_Record):
    format_version: Literal[1] = 1
    format: Literal["torchscript"] = "torchscript"
    model: ModelName
    version: Version
    created_at: datetime
    classes: tuple[str, ...] = Field(min_length=2)
    input: InputSpec
    network: NetworkSpec
    recipe: RecipeSpec
    training: TrainingFacts
    parent: Parent | None
    metrics: Metrics
    calibration: Calibration
    ood: OutOfDistribution
    files: dict[FileName, FileFacts]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("class names must differ from each other")
        missing = {MODULE, CHECKPOINT, GOLDEN} - self.files.keys()
        if missing:
            raise ValueError(f"files must list {', '.join(sorted(missing))}")
        return self

    @property
    def weights_sha256(self) -> str:
        """The digest that names these weights: that of the checkpoint."""
        return self.files[CHECKPOINT].sha256

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read a manifest; raises ManifestInvalid with the first thing that is wrong."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ManifestInvalid(f"{MANIFEST}: {where}: {first['msg']}") from error
