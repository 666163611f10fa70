"""Which classes a new version has, whoever asks."""

import pytest

from training.bundle.classes import BUILT_IN, NameTaken, known, settled

BASE = ("Cat", "dog", "Caf\u00e9")


@pytest.mark.parametrize(
    ("found", "keep", "classes"),
    [
        (("dog", "cat"), False, ("Cat", "dog", "Caf\u00e9")),  # none new: all of the base's, which it may replace
        (("dog", "cat"), True, ("Cat", "dog", "Caf\u00e9")),
        (("CAT", "cow"), False, ("Cat", "cow")),  # as the base spells what it knows
        (("CAT", "cow"), True, ("Cat", "dog", "Caf\u00e9", "cow")),
        (("cow", "emu"), False, ("cow", "emu")),
        (("cafe\u0301", "emu"), False, ("Caf\u00e9", "emu")),  # the same letters, composed otherwise
    ],
)
def test_classes_follow_from_the_base_and_the_pictures(
    found: tuple[str, ...], keep: bool, classes: tuple[str, ...]
) -> None:
    assert settled("pets", BASE, found, keep=keep, namesakes=[]) == classes


def test_a_model_keeps_its_classes_their_spelling_and_their_order() -> None:
    newest, answering = ("Emu", "COW"), ("cow", "emu")
    assert settled("pets", BASE, ("cow", "emu"), keep=False, namesakes=[newest, answering]) == newest


@pytest.mark.parametrize(
    ("namesakes", "theirs"), [([("cow",)], "cow"), ([("cow", "emu"), ("cow", "emu", "owl")], "cow, emu, owl")]
)
def test_a_name_that_stands_for_other_classes_is_taken(namesakes: list[tuple[str, ...]], theirs: str) -> None:
    with pytest.raises(NameTaken) as refusal:
        settled("pets", BASE, ("cow", "emu"), keep=False, namesakes=namesakes)
    assert str(refusal.value) == (
        f"model pets has the classes {theirs}; the new version would have cow, emu: give it another `name`"
    )


def test_a_refusal_names_ten_classes_at_most() -> None:
    with pytest.raises(
        NameTaken, match=r" would have 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more: give it another `name`$"
    ):
        settled("pets", BASE, [str(label) for label in range(12)], keep=False, namesakes=[BASE])


def test_what_the_base_knows_is_told_in_its_words() -> None:
    assert known(("cat", "cow", "CAFE\u0301"), BASE) == {"cat": "Cat", "CAFE\u0301": "Caf\u00e9"}


def test_the_built_in_sets_have_ten_classes_each() -> None:
    assert {name: len(set(classes)) for name, classes in BUILT_IN.items()} == {"mnist": 10, "cifar10": 10}
