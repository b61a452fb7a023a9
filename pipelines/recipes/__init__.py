"""Recipes: functions that return one complete `RunSpec`, one file a family of models.

The name of a recipe is what `python -m jobs.train` takes. The tables in README.md and models/README.md are made from
them (`python -m jobs.recipes --write`).
"""

from __future__ import annotations

from pipelines.recipes import classifier, gan, infogan, semi_supervised, vae
from pipelines.recipes.recipe import Recipe

FAMILIES: dict[str, dict[str, Recipe]] = {
    "Generative adversarial networks": gan.RECIPES,
    "Generative adversarial networks whose images show codes": infogan.RECIPES,
    "Semi-supervised classifiers": semi_supervised.RECIPES,
    "Variational autoencoders": vae.RECIPES,
    "Classifiers whose features samples are measured by": classifier.RECIPES,
}

RECIPES: dict[str, Recipe] = {name: recipe for family in FAMILIES.values() for name, recipe in family.items()}
