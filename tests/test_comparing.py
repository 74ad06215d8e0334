"""`stackllama compare` as a user types it: tables, JSON, a page, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackllama.cli import main
from tests.report.test_rivals import make_run

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "first", best_of=16)
    make_run(tmp_path / "runs" / "second", advantage="rloo", up_to=2)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("two_runs")
def test_tables_by_name_and_the_next_command(capsys: Capture) -> None:
    assert main(["compare", "first", "runs/second"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("On held-out questions\n")
    assert "at 1.84 nats of KL" in told.out
    assert "reached 1.00 nats at most" in told.out
    assert told.err == "next: stackllama report runs/first\n"
    assert main(["compare", "first", "second", "--at", "0.5"]) == 0
    assert "at most" not in capsys.readouterr().out


@pytest.mark.usefixtures("two_runs")
def test_json_and_a_page(capsys: Capture) -> None:
    assert main(["compare", "first", "second", "--json", "--page", "page.html"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["groups"][0]["rows"]] == ["SFT", "best of 16", "first", "second"]
    assert Path("page.html").read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("two_runs")
def test_mistakes_say_what_to_do(capsys: Capture) -> None:
    Path("runs/second/evaluate/complete.json").unlink()
    for words, message in (
        (["compare", "nope"], "nope is not a run; give a run's folder or name. In runs/ there is: first, second"),
        (["compare", "first", "second"], "first type: stackllama evaluate runs/second/recipe.yaml"),
        (["compare", "first", "first"], "runs/first is given twice"),
        (["compare", "first", "--page", "runs"], "give --page another file"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    for at in ("0", "-1", "much"):
        with pytest.raises(SystemExit) as ended:
            main(["compare", "first", "--at", at])
        assert ended.value.code == 2
