"""Class folders: which file of a tree is a picture of which class, and of which split. Knows names only, not contents.

`train/<class>/*` and `test/<class>/*`, or `<class>/*`; folders that merely wrap the rest are looked through.
"""

import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from training import SafelightError

SPLITS = {"train": "train", "test": "test", "val": "val", "validation": "val"}
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


MIN_CLASSES = 2
MAX_CLASSES = 1_000
MAX_CLASS_NAME = 100  # characters


class DatasetError(SafelightError):
    """No data where it was looked for, or data that can't be trained on; the message says what to do."""


class NoPictures(DatasetError):
    """A tree without a single file in a class's folder."""


class LayoutMixed(DatasetError):
    """Some pictures lie under train/ and test/ and others don't."""


class ClassNameInvalid(DatasetError):
    """A class name that is empty, longer than 100 characters, or holds a control character or slash."""


class ClassNamesCollide(DatasetError):
    """Two class names that are equal but for case."""


class TooFewClasses(DatasetError):
    """Fewer than two classes."""


class TooManyClasses(DatasetError):
    """More than a thousand classes."""


@dataclass(frozen=True)
class Place:
    """What a picture's path says of it."""

    split: str  # "train", "val", "test", or "" where the tree doesn't say
    label: str


def below_root(paths: Iterable[PurePosixPath]) -> dict[PurePosixPath, PurePosixPath]:
    """Each path without the folders that merely wrap everything else, in order; hidden and system files left out."""
    files = {path: path for path in sorted(paths) if not is_hidden(path)}
    while files and len({below.parts[0] for below in files.values()}) == 1 and min(map(_depth, files.values())) > 2:
        files = {path: PurePosixPath(*below.parts[1:]) for path, below in files.items()}
    return files


def places(paths: Iterable[PurePosixPath]) -> tuple[dict[PurePosixPath, Place], list[PurePosixPath]]:
    """The place of each file, by its path below the root; and those that look like pictures but lie where none belongs.

    Raises NoPictures and LayoutMixed.
    """
    found, misplaced = {}, []
    for path in paths:
        *folders, _ = path.parts
        if len(folders) == 2 and folders[0] in SPLITS:
            found[path] = Place(SPLITS[folders[0]], folders[1])
        elif len(folders) == 1:
            found[path] = Place("", folders[0])
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            misplaced.append(path)
    if not found:
        raise NoPictures(
            "no pictures found: expected <class>/<picture>, or train/<class>/<picture> and test/<class>/<picture>"
        )
    if len({bool(place.split) for place in found.values()}) == 2:
        odd = next(path for path, place in found.items() if not place.split)
        raise LayoutMixed(
            f"some pictures lie under train/ and test/ and others, as {odd}, do not; use one layout", file=str(odd)
        )
    return found, misplaced


def class_names(labels: Collection[str]) -> dict[str, str]:
    """Each label, of which there is one at least, → the class's name: NFC, trimmed.

    Raises TooFewClasses, TooManyClasses, ClassNameInvalid and ClassNamesCollide.
    """
    if len(labels) > MAX_CLASSES:
        raise TooManyClasses(
            f"the data set has {len(labels)} classes; the limit is {MAX_CLASSES}: a folder is one class",
            classes=len(labels),
            limit=MAX_CLASSES,
        )
    names = {label: unicodedata.normalize("NFC", label).strip() for label in sorted(labels)}
    by_folded: dict[str, str] = {}
    for name in names.values():
        _check_class_name(name)
        other = by_folded.setdefault(name.casefold(), name)
        if other != name:
            raise ClassNamesCollide(
                f"the classes {shown(other)!r} and {shown(name)!r} differ only in case; put them into one folder",
                classes=[other, name],
            )
    if len(by_folded) < MIN_CLASSES:
        raise TooFewClasses(
            f"only one class, {shown(*by_folded.values())!r}; a classifier needs at least {MIN_CLASSES}, a folder each",
            classes=len(by_folded),
            limit=MIN_CLASSES,
        )
    return names


def _check_class_name(name: str) -> None:
    quoted = repr(shown(name))
    if len(name) > MAX_CLASS_NAME:
        raise ClassNameInvalid(
            f"the class name {quoted} has {len(name)} characters; the limit is {MAX_CLASS_NAME}: rename its folder",
            label=shown(name),
            limit=MAX_CLASS_NAME,
        )
    hidden = name.startswith(".") or is_hidden(PurePosixPath(name))
    if not name or hidden or set(name) & set("/\\") or any(map(_is_control, name)):
        raise ClassNameInvalid(
            f"{quoted} can't be a class's name: it is empty, starts with a dot, or holds a control character or slash; "
            "rename its folder",
            label=shown(name),
        )


def _is_control(letter: str) -> bool:
    # Cs: half a character, of a name that isn't UTF-8
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


def shown(name: object) -> str:
    """A name for people and logs: nothing unprintable, and not endless."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(name))
    return text if len(text) <= 200 else f"{text[:120]}…{text[-60:]}"


def is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "__MACOSX")) or part == "Thumbs.db" for part in path.parts)


def _depth(path: PurePosixPath) -> int:
    return len(path.parts)
