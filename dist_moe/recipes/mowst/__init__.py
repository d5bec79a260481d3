"""Mowst: a weak and a strong expert trained in turns, and what answers at the end."""

from dist_moe.recipes.mowst.recipe import MowstRecipe

__all__ = ["MowstRecipe"]
