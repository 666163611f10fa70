"""What was found in a data set: `intake` writes it, the service passes it on. Needs neither torch nor the pictures."""

from pydantic import BaseModel, ConfigDict, Field

SHOWN = 100  # so many of each kind are named; the counts are of all


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassCounts(_Part):
    name: str
    images: int = Field(description="accepted, in all splits")
    train: int | None = Field(description="of them under train/; null where the data set isn't divided")
    test: int | None


class Rejection(_Part):
    file: str
    code: str = Field(description="stable: not_an_image, image_corrupt, image_too_large, entry_damaged, …")
    detail: str


class Rejections(_Part):
    """Files that are not in the data set, for what is wrong with them."""

    count: int
    by_code: dict[str, int]
    first: tuple[Rejection, ...] = Field(max_length=SHOWN)


class Copy(_Part):
    file: str
    of: str


class Copies(_Part):
    """Files that are left out because another one, which is kept, is the same picture."""

    count: int
    first: tuple[Copy, ...] = Field(max_length=SHOWN)


class Contradiction(_Part):
    """One picture under several classes."""

    files: tuple[str, ...] = Field(max_length=SHOWN)
    classes: tuple[str, ...]


class Contradictions(_Part):
    count: int = Field(description="pictures; their files are all rejected, with the code contradicting_labels")
    first: tuple[Contradiction, ...] = Field(max_length=SHOWN)


class BaseModelFacts(_Part):
    """How the data set relates to the model that it is meant for."""

    model: str
    version: str
    known: dict[str, str] = Field(description="classes that the model has too, and what it calls them")
    new: tuple[str, ...]
    test_pictures: int | None = Field(
        description="files rejected because the model was measured on them; null where it doesn't remember on which"
    )


class Size(_Part):
    width: int
    height: int


class Sizes(_Part):
    """Of the accepted pictures as they came, ordered by area."""

    smallest: Size
    median: Size
    largest: Size
    upscaled: int = Field(description="pictures smaller than the model's input in both directions")


class Polarity(_Part):
    """For models of digits, which see light ink on dark ground and turn pictures of the other kind around."""

    dark_on_light: int
    light_on_dark: int


class Report(_Part):
    """The whole finding."""

    id: str = Field(description="of the content: the same accepted pictures have the same id")
    name: str
    images: int = Field(description="accepted")
    bytes: int = Field(description="of the accepted files")
    divided: bool = Field(description="came with train/ and test/; else fine-tuning divides it")
    classes: tuple[ClassCounts, ...]
    rejected: Rejections
    duplicates: Copies
    near_duplicates: Copies = Field(description="test pictures that nearly are training pictures")
    contradictions: Contradictions
    base: BaseModelFacts | None
    sizes: Sizes
    polarity: Polarity | None
    notes: tuple[str, ...] = Field(description="what a person should know, in sentences")
