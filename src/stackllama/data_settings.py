"""What a recipe says about building preference data, as the data layer wants it. Without torch."""

from __future__ import annotations

from dataclasses import replace

from stackllama.data.building.build import Settings
from stackllama.data.interchange.formats import frame
from stackllama.data.pairs.rules import PairRules
from stackllama.data.split.clusters import Clustering
from stackllama.data.text.cleaning import OFF, Cleaning
from stackllama.recipe import EMBEDDED, Recipe
from stackllama.tokens.template import question_text, root_text


def build_settings(recipe: Recipe) -> Settings:
    """What decides the outcome of a build, beside the sources."""
    return Settings(
        fractions=recipe.data.splits.model_dump(),
        rules=_pair_rules(recipe),
        clustering=_clustering(recipe),
        cleaning=_cleaning(recipe),
        allow_truncated=recipe.data.allow_truncated,
        frame=_prompt_frame(recipe),
    )


def _pair_rules(recipe: Recipe) -> PairRules:
    """What makes two answers a pair."""
    return PairRules(max_pairs=recipe.data.max_pairs, **recipe.data.preferences.model_dump())


def _clustering(recipe: Recipe) -> Clustering:
    """What makes two questions one cluster. Those of the embedded community come from templates, so there near-copies
    of a text ask different things.
    """
    return Clustering(recipe.data.near_copies and recipe.data.source != (EMBEDDED,), recipe.data.links)


def _cleaning(recipe: Recipe) -> Cleaning:
    """What is taken out of posts. The embedded community is in one language."""
    asked = Cleaning(**recipe.data.cleaning.model_dump())
    return replace(asked, language=OFF) if recipe.data.source == (EMBEDDED,) else asked


def _prompt_frame(recipe: Recipe) -> tuple[str, str]:
    """What the template writes before and after a question; it is taken off prompts of other tools."""
    return frame(lambda title, body: root_text(question_text(title if recipe.data.titles else "", body)))
