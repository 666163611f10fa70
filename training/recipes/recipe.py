"""What a recipe can say, and how a setting of one is changed."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training import SafelightError
from training.bundle.manifest import InputSpec

DIGIT = InputSpec(channels=1, height=28, width=28, fit="digit")
PHOTO = InputSpec(channels=3, height=32, width=32, fit="cover")


class RecipeInvalid(SafelightError):
    """No such recipe, no such setting, or a value that a setting can't have."""


class Affine(BaseModel):
    """How far each image may be turned (± degrees), scaled (1 ± share), sheared (± degrees) and moved (± pixels)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    degrees: float = Field(0, ge=0, le=180)
    scale: float = Field(0, ge=0, lt=1)
    shear: float = Field(0, ge=0, le=45)
    shift: float = Field(0, ge=0)

    @property
    def moves(self) -> bool:
        return any((self.degrees, self.scale, self.shear, self.shift))


class Smaller(BaseModel):
    """How a run begins: with smaller images, which cost less by the square of their side and teach nearly as much
    (Howard, 2018)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    share: float = Field(0, ge=0, lt=1, description="of the run")
    scale: float = Field(1, ge=0.5, le=1, description="of both sides")

    def size(self, height: int, width: int) -> tuple[int, int]:
        return int(height * self.scale), int(width * self.scale)


class Muon(BaseModel):
    """Orthogonal steps for the convolutions, Nesterov SGD for biases and head. `bias_lr` and `head_lr` are per example:
    the loss is summed over the batch, so they hold for any batch size. `filter_lr` isn't: Muon's steps have a fixed
    length."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["muon"] = "muon"
    filter_lr: float = Field(ge=0, description="Muon's step, relative to filters of norm sqrt(outputs)")
    filter_momentum: float = Field(0.6, ge=0, lt=1)
    bias_lr: float = Field(gt=0)
    head_lr: float = Field(gt=0)
    momentum: float = Field(0.85, gt=0, lt=1, description="of everything but the filters")
    weight_decay: float = Field(0, ge=0, description="share of biases and head lost per example, at the peak rate")


class SGD(BaseModel):
    """Plain, or with momentum; the loss is the mean over the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0, ge=0, description="L2: its gradient is this times the weight; biases have none")


class Adam(BaseModel):
    """Adam, or with its weight decay apart from the gradient AdamW; the loss is the mean over the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0, ge=0)


class Teacher(BaseModel):
    """A network that is trained first, to be learned from (Hinton et al., 2015)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: str
    temperature: float = Field(gt=0, description="both distributions are softened by it before they are compared")
    share: float = Field(gt=0, le=1, description="of the loss; the rest is the labels'")


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    summary: str
    dataset: str = Field(description="what is trained on when nothing else is named")
    expected_accuracy: float | None = Field(None, description="single view, on the data set's test split")
    published: str | None = Field(None, description="what is claimed for it elsewhere, and by whom")
    input: InputSpec

    network: str
    arguments: dict[str, Any] = Field(description="the network's, but for channels and classes")

    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    optimizer: Muon | SGD | Adam = Field(discriminator="kind")
    precision: Literal["auto", "float32"] = Field("auto", description="auto: in what convolutions are fastest in here")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="of the rates, down to zero")
    warm_up: float = Field(0, ge=0, lt=1, description="share of the run in which the rates rise to their peak")
    cost: Literal["cross entropy", "squared error"] = "cross entropy"
    label_smoothing: float = Field(0, ge=0, lt=1)
    l1: float = Field(0, ge=0, description="times the sum of all weights' sizes, added to the loss; not biases")
    clip_norm: float | None = Field(None, gt=0, description="longest gradient, of all parameters together")
    patience: int | None = Field(
        None, ge=1, description="epochs without a better hold-out accuracy that end the run; the best weights are kept"
    )
    teacher: Teacher | None = None
    strangers: float = Field(
        0,
        ge=0,
        lt=1,
        description="drawn pictures of no class beside each batch, as a share of it, whose logits learn to be low",
    )

    flip: bool = Field(False, description="mirror every other epoch; wrong for anything that has a handedness")
    shift: int = Field(0, ge=0, description="images move by at most this many pixels, borders reflected")
    shift_step: int = Field(1, ge=1, description="and by multiples of this many")
    affine: Affine = Affine()
    trivial: float = Field(
        0, ge=0, le=1, description="share of the images that are turned, sheared, moved, made darker, more colourful, …"
    )
    cutout: int = Field(0, ge=0, description="a square of so many pixels is covered in each image")
    smaller: Smaller = Field(Smaller(), description="images for the first share of the run, to the scale of theirs")

    views: Literal["none", "shifts", "mirrored shifts"] = Field("none", description="of test-time augmentation")
    holdout: float = Field(0.04, gt=0, lt=0.5, description="share of train kept back: it calibrates, and steers tuning")


def override(base: Recipe, settings: list[str]) -> Recipe:
    """Change settings given as `key=value`; a value is JSON or a word, and `arguments.widths=[32,64]` reaches inside.

    Raises RecipeInvalid for a key that doesn't exist or a value out of range.
    """
    values = base.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise RecipeInvalid(f"{setting!r} isn't a setting; write key=value, for example epochs=3")
        *parents, last = key.strip().split(".")
        inner = values
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None  # type: ignore[assignment]
        if not isinstance(inner, dict) or (last not in inner and parents != ["arguments"]):
            raise RecipeInvalid(f"recipe {base.name} has no setting {key!r}; it has {', '.join(Recipe.model_fields)}")
        inner[last] = _value(text)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeInvalid(f"{where}={first['input']!r}: {first['msg']}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
