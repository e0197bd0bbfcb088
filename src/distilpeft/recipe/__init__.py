"""The recipe: one file per section of the YAML, and the file itself."""

from distilpeft.recipe.recipe import Recipe

__all__ = ["Recipe"]
