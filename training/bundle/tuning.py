"""What a fine-tuning request may change: the service checks it at the door, the run obeys it."""

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from training import SafelightError


class TuningInvalid(SafelightError):
    """A setting of fine-tuning that doesn't exist, or a value that it can't have."""


class Tuning(BaseModel):
    """Left alone, everything follows from the data: its size, its classes, and the model that it starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    depth: Literal["auto", "head", "full"] = Field(
        "auto",
        description="`head` fits the last layer alone, in seconds; `full` also trains the layers before it, from "
        "300 pictures on; `auto` does so where there are 20 of each class too, and old classes can be replayed",
    )
    epochs: float | None = Field(None, gt=0, le=1000, description="passes over the pictures, of the training after it")
    batch_size: int = Field(32, ge=2, le=1024, description="new pictures in a step; as many are replayed beside them")
    learning_rate: float = Field(1.0, gt=0, le=100, description="multiplies every rate of the training")
    shift: int = Field(2, ge=0, le=16, description="pictures move by at most this many pixels, borders reflected")
    flip: bool | None = Field(None, description="mirror pictures; left out: where the base model's recipe does")
    keep_classes: bool = Field(
        False, description="the new model also keeps those of the base model's classes that the data set doesn't have"
    )
    replay: bool = Field(True, description="train on the base model's data too, so that it isn't forgotten")

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Raises TuningInvalid with the first thing that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(cls.model_fields)
                raise TuningInvalid(f"fine-tuning has no setting {name!r}; it has {known}", setting=name) from error
            raise TuningInvalid(f"{name}={first['input']!r}: {first['msg']}", setting=name) from error

    @classmethod
    def from_words(cls, settings: list[str]) -> Self:
        """Settings given as `key=value`; a value is JSON or a word. Raises TuningInvalid."""
        values = {}
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise TuningInvalid(f"{setting!r} isn't a setting; write key=value, for example epochs=3")
            try:
                values[key.strip()] = json.loads(text)
            except json.JSONDecodeError:
                values[key.strip()] = text
        return cls.parse(values)
