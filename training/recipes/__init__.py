"""Recipes: the frozen settings of a training run. A recipe holds numbers and reasons; the loop holds neither."""

from training.recipes.classics import CLASSICS
from training.recipes.recipe import SGD as SGD
from training.recipes.recipe import Adam as Adam
from training.recipes.recipe import Affine as Affine
from training.recipes.recipe import Muon as Muon
from training.recipes.recipe import Recipe as Recipe
from training.recipes.recipe import RecipeInvalid as RecipeInvalid
from training.recipes.recipe import Smaller as Smaller
from training.recipes.recipe import Teacher as Teacher
from training.recipes.recipe import override as override
from training.recipes.records import RECORDS
from training.recipes.shipped import SHIPPED

RECIPES = {recipe.name: recipe for recipe in (*SHIPPED, *RECORDS, *CLASSICS)}


def recipe(name: str) -> Recipe:
    """Raises RecipeInvalid, naming those that exist."""
    if name not in RECIPES:
        raise RecipeInvalid(f"no recipe is called {name!r}; there is {', '.join(RECIPES)}")
    return RECIPES[name]
