"""A stage's clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from stackllama.errors import RunError
from stackllama.recipe_load import load_recipe
from stackllama.run import open_run
from stackllama.stages.data import run_data
from tests.stages.test_journey import write_recipe


@pytest.mark.parametrize("damaged", ['"abc"', "[]", "null", "true", "-1", "NaN", "Infinity"])
def test_a_broken_clock_is_named(tmp_path: Path, damaged: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path), {"folder": str(tmp_path)})
    with open_run(recipe) as run:
        run.begin("data")
        (run.stage("data") / "half").touch()
        (run.stage("data") / "seconds.json").write_text(damaged)
        with pytest.raises(RunError, match=r"data/seconds.json holds no number of seconds; delete it"):
            run_data(recipe, run)
