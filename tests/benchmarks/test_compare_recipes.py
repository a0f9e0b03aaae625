"""The recipes that compare_recipes.py trains, whose parts replace those of a network."""

import jax
import pytest
from compare_recipes import RECIPES, recipe_config, with_parts

from jaxgpt.model.network import init_params


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.parts])
def test_a_recipe_with_other_parts_can_be_built(name: str) -> None:
    cfg = recipe_config(name, [], 0, 10, 1.0)

    def shapes() -> list[tuple[int, ...]]:
        params = jax.eval_shape(lambda: init_params(cfg.model, jax.random.key(0)))
        return sorted(x.shape for x in jax.tree.leaves(params))

    with with_parts(name):
        found = shapes()
    assert found != shapes()
