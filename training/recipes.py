"""Recipes: the frozen settings of a training run. A recipe holds numbers and reasons; the loop holds neither."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training import SafelightError
from training.bundle.manifest import InputSpec


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


class Recipe(BaseModel):
    """`bias_lr` and `head_lr` are per example: the loss is summed over the batch, so they hold for any batch size.
    `filter_lr` isn't: Muon's steps have a fixed length."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    summary: str
    dataset: str = Field(description="what is trained on when nothing else is named")
    expected_accuracy: float | None = Field(None, description="single view, on the data set's test split")
    input: InputSpec

    network: str
    arguments: dict[str, Any] = Field(description="the network's, but for channels and classes")

    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    filter_lr: float = Field(ge=0, description="Muon's step, relative to filters of norm sqrt(outputs)")
    filter_momentum: float = Field(0.6, ge=0, lt=1)
    bias_lr: float = Field(gt=0)
    head_lr: float = Field(gt=0)
    momentum: float = Field(0.85, gt=0, lt=1, description="of everything but the filters")
    weight_decay: float = Field(0, ge=0, description="share of biases and head lost per example, at the peak rate")
    label_smoothing: float = Field(0, ge=0, lt=1)

    flip: bool = Field(False, description="mirror every other epoch; wrong for anything that has a handedness")
    shift: int = Field(0, ge=0, description="images move by at most this many pixels, borders reflected")
    affine: Affine = Affine()

    views: Literal["none", "shifts", "mirrored shifts"] = Field("none", description="of test-time augmentation")
    holdout: float = Field(0.04, gt=0, lt=0.5, description="share of train kept back: it calibrates, and steers tuning")


MNIST = Recipe(
    name="mnist",
    summary="Handwritten digits, 28 x 28 grey.",
    dataset="mnist",
    expected_accuracy=0.996,
    input=InputSpec(channels=1, height=28, width=28, fit="digit"),
    network="convnet",
    # A stride of 2 in the stem: digits need no more than 12 x 12 places, and cost a quarter.
    arguments={"widths": [64, 128], "stem_width": 32, "stem_kernel": 5, "stem_stride": 2, "activation": "silu"},
    epochs=10,
    batch_size=500,
    filter_lr=0.1,
    bias_lr=0.053,
    head_lr=4e-5,  # 0.67 / 128², as below
    weight_decay=2e-6,
    label_smoothing=0.1,
    affine=Affine(degrees=10, scale=0.1, shear=5, shift=2),  # never flipped: a mirrored 2 is no digit
    views="shifts",
)

CIFAR10 = Recipe(
    name="cifar10",
    summary="Ten kinds of animals and vehicles, 32 x 32 colour.",
    dataset="cifar10",
    expected_accuracy=0.935,
    input=InputSpec(channels=3, height=32, width=32, fit="cover"),
    network="convnet",
    # 24 stem filters: the 12 directions of a 2 x 2 x 3 patch and their negatives.
    arguments={"widths": [64, 256, 256], "stem_width": 24, "stem_kernel": 2, "whiten": True, "activation": "silu"},
    epochs=12,
    batch_size=500,
    filter_lr=0.12,  # airbench's 0.24 at batch 2000, by the square root of the batch size
    bias_lr=0.053,
    head_lr=1e-5,  # 0.67 / 256²: the published rate is for logits divided by the width, ours starts the head smaller
    weight_decay=2e-6,
    label_smoothing=0.2,
    flip=True,
    shift=2,
    views="mirrored shifts",
)

RECIPES = {recipe.name: recipe for recipe in (MNIST, CIFAR10)}


def recipe(name: str) -> Recipe:
    """Raises RecipeInvalid, naming those that exist."""
    if name not in RECIPES:
        raise RecipeInvalid(f"no recipe is called {name!r}; there is {', '.join(RECIPES)}")
    return RECIPES[name]


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
