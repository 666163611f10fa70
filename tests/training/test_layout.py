"""Which file is of which class; the trees themselves are tested with the data sets."""

import unicodedata
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.layout import DatasetError, below_root, class_names, is_hidden, places, shown


def test_names_are_brought_to_one_form() -> None:
    decomposed = unicodedata.normalize("NFD", "éclair")
    assert class_names({decomposed, "éclair", " 猫 ", "дом", "🐈\u200d⬛"}) == {
        decomposed: "éclair",
        "éclair": "éclair",
        " 猫 ": "猫",
        "дом": "дом",
        "🐈\u200d⬛": "🐈\u200d⬛",
    }


@pytest.mark.parametrize(
    ("labels", "kind", "message", "facts"),
    [
        (
            {"cat"},
            "TooFewClasses",
            "only one class, 'cat'; a classifier needs at least 2, a folder each",
            {"classes": 1, "limit": 2},
        ),
        (
            {"cat", "cat "},
            "TooFewClasses",
            "only one class, 'cat'; a classifier needs at least 2, a folder each",
            {"classes": 1, "limit": 2},
        ),
        (
            {"Cat", "cat", "dog"},
            "ClassNamesCollide",
            "the classes 'Cat' and 'cat' differ only in case; put them into one folder",
            {"classes": ["Cat", "cat"]},
        ),
        (
            {"STRASSE", "straße"},
            "ClassNamesCollide",
            "the classes 'STRASSE' and 'straße' differ only in case; put them into one folder",
            {"classes": ["STRASSE", "straße"]},
        ),
        (
            {"x" * 300, "dog"},
            "ClassNameInvalid",
            f"the class name '{'x' * 120}…{'x' * 60}' has 300 characters; the limit is 100: rename its folder",
            {"label": f"{'x' * 120}…{'x' * 60}", "limit": 100},
        ),
        (
            {str(number) for number in range(20_001)},
            "TooManyClasses",
            "the data set has 20001 classes; the limit is 1000: a folder is one class",
            {"classes": 20_001, "limit": 1000},
        ),
    ],
    ids=["one", "one-trimmed", "case", "folded", "long", "many"],
)
def test_names_that_make_no_classes_are_refused(
    labels: set[str], kind: str, message: str, facts: dict[str, object]
) -> None:
    with pytest.raises(DatasetError) as found:
        class_names(labels)
    assert (type(found.value).__name__, str(found.value), found.value.facts) == (kind, message, facts)


@pytest.mark.parametrize("name", ["", "  ", " .hidden", "a\nb", "a\0b", "a\\b", "a/b", "/a", "a\u2028b", "\udce4"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(DatasetError) as found:
        class_names({name, "dog"})
    assert str(found.value) == (
        f"{shown(name.strip())!r} can't be a class's name: it is empty, starts with a dot, or holds a control "
        "character or slash; rename its folder"
    )


@given(st.sets(st.text(max_size=120), min_size=1, max_size=5))
def test_a_name_that_is_taken_can_be_a_folder_and_stays_as_it_is(labels: set[str]) -> None:
    try:
        names = set(class_names(labels).values())
    except DatasetError:
        return
    assert class_names(names) == {name: name for name in names}
    for name in names:
        assert len(PurePosixPath(name).parts) == 1
        assert not is_hidden(PurePosixPath(name))
        assert len(name.encode()) <= 400


@given(st.text())
def test_what_is_shown_is_printable_and_short(name: str) -> None:
    assert shown(name).isprintable()
    assert len(shown(name * 50)) <= 200


def test_a_picture_s_place_says_its_class_and_split() -> None:
    tree = ["pets/train/cat/1.png", "pets/test/dog/2.png", "pets/train/dog/deep/3.png", "pets/.x/y/z"]
    below = below_root(map(PurePosixPath, tree))
    found, misplaced = places(below.values())
    assert {str(path): (place.split, place.label) for path, place in found.items()} == {
        "train/cat/1.png": ("train", "cat"),
        "test/dog/2.png": ("test", "dog"),
    }
    assert misplaced == [PurePosixPath("train/dog/deep/3.png")]
