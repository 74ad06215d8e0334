"""The report of a run."""

from __future__ import annotations

from stackllama.recipe import Recipe
from stackllama.recipe_load import default_settings
from stackllama.report.page import write_report
from stackllama.run import Run


def run_report(recipe: Recipe, run: Run) -> None:
    """Write report.html from what the stages left."""
    write_report(run.folder, defaults=default_settings(recipe.name))
