"""Recipes: frozen, and changed only by settings that exist and make sense."""

import pytest
from pydantic import ValidationError

from tests.tiny import TINY
from training.recipes import RECIPES, Recipe, RecipeInvalid, override, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_by_its_name(name: str) -> None:
    assert recipe(name).name == name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_within_its_own_limits(name: str) -> None:
    assert Recipe.model_validate(RECIPES[name].model_dump()) == RECIPES[name]


def test_an_unknown_recipe_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        RecipeInvalid, match="^no recipe is called 'imagenet'; there is mnist, cifar10, .*cifar10-lenet"
    ):
        recipe("imagenet")


def test_a_recipe_can_not_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TINY.epochs = 9
    with pytest.raises(ValidationError, match="frozen"):
        TINY.affine.degrees = 9


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("epochs=0.5", {"epochs": 0.5}),
        ("epochs=3", {"epochs": 3.0}),
        ("batch_size=7", {"batch_size": 7}),
        ("flip=true", {"flip": True}),
        ("views=mirrored shifts", {"views": "mirrored shifts"}),
        ('views="shifts"', {"views": "shifts"}),
        ("expected_accuracy=null", {"expected_accuracy": None}),
        (" epochs =3", {"epochs": 3.0}),
        ("summary=a=b", {"summary": "a=b"}),
    ],
)
def test_a_setting_is_changed_and_nothing_else(setting: str, change: dict[str, object]) -> None:
    assert override(TINY, [setting]) == TINY.model_copy(update=change)


def test_a_setting_inside_another_is_changed() -> None:
    changed = override(
        TINY, ["affine.degrees=12", "input.height=20", "arguments.widths=[4, 8]", "arguments.whiten=true"]
    )
    assert changed.affine.degrees == 12
    assert changed.input.shape == (1, 20, 12)
    assert changed.arguments == TINY.arguments | {"widths": [4, 8], "whiten": True}


def test_the_base_recipe_stays_as_it_was() -> None:
    before = TINY.model_dump_json()
    override(TINY, ["arguments.widths=[4, 8]", "affine.shift=3"])
    assert TINY.model_dump_json() == before


def test_of_two_settings_the_last_counts() -> None:
    assert override(TINY, ["epochs=1", "epochs=2"]).epochs == 2


@pytest.mark.parametrize("key", ["epoch", "affine.degree", "affine.degrees.more", "input", "arguments", ""])
def test_a_setting_without_a_value_is_refused(key: str) -> None:
    with pytest.raises(RecipeInvalid, match=f"^'{key}' isn't a setting; write key=value, for example epochs=3$"):
        override(TINY, [key])


@pytest.mark.parametrize("key", ["epoch", "affine.degree", "epochs.more", "affine.degrees.more", "no.such", "", "."])
def test_an_unknown_setting_is_refused_with_those_that_exist(key: str) -> None:
    with pytest.raises(RecipeInvalid, match=f"^recipe tiny has no setting '{key}'; it has name, summary, .*holdout$"):
        override(TINY, [f"{key}=1"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epochs=0", r"^epochs=0: .*greater than 0"),
        ("epochs=many", r"^epochs='many': .*valid number"),
        ("epochs=NaN", r"^epochs=nan: .*finite"),
        ("epochs=1e999", r"^epochs=inf: .*finite"),
        ("batch_size=1.5", r"^batch_size=1\.5: .*integer"),
        ("holdout=0.5", r"^holdout=0\.5: .*less than 0\.5"),
        ("label_smoothing=1", r"^label_smoothing=1: .*less than 1"),
        ("views=all", r"^views='all': .*'none', 'shifts' or 'mirrored shifts'"),
        ("affine.degrees=-1", r"^affine\.degrees=-1: .*greater than or equal to 0"),
        ("input.channels=2", r"^input\.channels=2: .*1 or 3"),
        ("flip=perhaps", r"^flip='perhaps': .*boolean"),
        ("arguments=3", r"^arguments=3: .*dictionary"),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(setting: str, message: str) -> None:
    with pytest.raises(RecipeInvalid, match=message):
        override(TINY, [setting])


def test_a_recipe_survives_being_written_and_read() -> None:
    for original in RECIPES.values():
        assert Recipe.model_validate_json(original.model_dump_json()) == original
