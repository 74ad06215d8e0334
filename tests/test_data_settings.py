from __future__ import annotations

import subprocess
import sys

from stackllama.data.pairs.rules import PairRules
from stackllama.data.text.cleaning import Cleaning
from stackllama.data_settings import build_settings
from stackllama.recipe import Recipe


def recipe(**data: object) -> Recipe:
    return Recipe.model_validate({"name": "x", "data": {"source": "dump", **data}})


def test_a_recipe_s_settings_reach_the_build() -> None:
    given = recipe(
        max_pairs=3,
        allow_truncated=True,
        links="all",
        preferences={"time": "off", "near_copies": None, "margin": 0.5},
        splits={"sft": 0.2, "reward": 0.2, "judge": 0.2, "ppo": 0.2, "eval": 0.2},
    )
    settings = build_settings(given)
    assert settings.rules == PairRules(max_pairs=3, margin=0.5)
    assert settings.fractions == dict.fromkeys(("sft", "reward", "judge", "ppo", "eval"), 0.2)
    assert settings.allow_truncated
    assert settings.clustering.links == "all"
    assert settings.clustering.near_copies
    assert not build_settings(recipe(source="embedded")).clustering.near_copies


def test_posts_are_cleaned_as_the_recipe_says_and_the_embedded_community_has_one_language() -> None:
    assert build_settings(recipe(source="embedded")).cleaning == Cleaning("break", "mask", "mask", "drop", "off")
    given = {"control_tokens": "drop", "link_only": "keep", "language": "drop"}
    assert build_settings(recipe(cleaning=given)).cleaning == Cleaning("drop", "mask", "mask", "keep", "drop")


def test_the_frame_is_what_the_template_puts_around_a_question() -> None:
    assert build_settings(recipe()).frame == ("Question: ", "\n\nAnswer:")


def test_it_comes_without_torch() -> None:
    code = "import sys, stackllama.data_settings, stackllama.data_commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
