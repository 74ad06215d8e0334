"""`stackllama data stats | show | export`, from the command line."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from stackllama.cli import main
from stackllama.data.store import store
from tests.data.dumps import answer, question, site
from tests.data.small_store import FIRST, write

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "store")


def run(capsys: Capture, *words: str | Path) -> tuple[str, str]:
    """Output and errors of a command that succeeds."""
    code = main(["data", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out, captured.err


def test_stats_as_tables_then_the_command_to_see_a_question(folder: Path, capsys: Capture) -> None:
    out, err = run(capsys, "stats", folder)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert ["questions with a pair", "2 (66.7%)"] in rows
    assert ["votes of an answer", "0.4", "-2", "-2", "0", "0", "1", "3", "3"] in rows
    assert ["x", "2", "66.7%"] in rows
    assert ["the pairs as they are here", "2", "3", "0.750±0.177", "0.500±0.354"] in rows
    (following,) = re.findall(r"^next: stackllama data (.*)$", err, re.MULTILINE)
    shown, _ = run(capsys, *shlex.split(following))
    assert "--- pairs, better > worse:" in shown


def test_stats_as_json_alone(folder: Path, capsys: Capture) -> None:
    out, _ = run(capsys, "stats", folder, "--json")
    told = json.loads(out)
    assert (told["kind"], told["rebuilt"], told["build"]) == ("preference data", False, {})
    assert (told["answers"]["count"], told["pairs"], told["baselines"]["longer_wins"]) == (5, 3, 0.75)


def test_stats_of_a_dump(folder: Path, capsys: Capture) -> None:
    dump = site(folder.parent / "a.test", [question(1), answer(2, 1, Score="5"), answer(3, 1)])
    told = json.loads(run(capsys, "stats", dump, "--json")[0])
    assert (told["kind"], told["rebuilt"], told["build"]["rows"], told["pairs"]) == ("dump", True, 3, 1)
    assert [row["rules"] for row in told["build"]["baselines"]][:2] == ["the original rules", "time: since_later"]


def test_stats_as_a_page(folder: Path, capsys: Capture) -> None:
    out, err = run(capsys, "stats", folder, "--page", "out/page.html", "--seed", "3")
    assert out == ""
    assert "out/page.html: written" in err
    page = Path("out/page.html").read_text("utf-8")
    assert "drawn by the seed 3" in page
    assert page.count("<article>") == 2


def test_show_writes_control_characters_out(folder: Path, capsys: Capture) -> None:
    store.write_questions(folder, "sft", [replace(FIRST, title="\x1b[31m\u202ered", text="a\x07b")])
    out, _ = run(capsys, "show", folder, "--question", "1")
    assert out.startswith("\\x1b[31m\\u202ered\n")
    assert "a\\x07b" in out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", out)


def test_show_asks_for_the_site_where_several_have_the_question(folder: Path, capsys: Capture) -> None:
    assert main(["data", "show", str(folder), "--question", "1"]) == 2
    assert "add --site with one of a.test, b.test" in capsys.readouterr().err
    out, err = run(capsys, "show", folder, "--question", "1", "--site", "b.test")
    assert out.startswith("Lonely\n")
    assert err == f"next: stackllama data stats {folder}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stats", "nowhere"], "nowhere is not there; give a run"),
        (["show", "nowhere", "--question", "1"], "nowhere is not there; give a run"),
        (["show", "store", "--question", "7"], "no question 7 is among the 3; the nearest are 1, 1, 20"),
        (["stats", "store", "--page", "store"], "store cannot be written: Is a directory; give --page another file"),
        (["stats", "store", "--page", "store/manifest.json/x"], "give --page another file"),
        (["stats", "embedded-text"], "embedded-text is not there; give a run"),
        (["stats", ""], "an empty name is given; give a run"),
        (["show", "", "--question", "1"], "an empty name is given; give a run"),
        (["export", "", "out"], "an empty name is given; give a run"),
        (["export", "nowhere", "out"], "nowhere holds no preference data"),
        (["export", "store", "x" * 300], "x cannot be written: File name too long; choose another folder"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(
    folder: Path, capsys: Capture, words: list[str], message: str
) -> None:
    before = sorted(path.name for path in Path().rglob("*"))
    assert main(["data", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
    assert sorted(path.name for path in Path().rglob("*")) == before


def test_export(folder: Path, capsys: Capture) -> None:
    out, _ = run(capsys, "export", folder, "out", "--split", "eval")
    assert out.startswith("eval: 1 rows\n")
    assert "eval is among the splits: whoever trains on it cannot examine on it; --split leaves it out\n" in out
    assert "eval" not in run(capsys, "export", folder, "trained", "--split", "sft")[0]
    (line,) = Path("out/data/eval-00000.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["chosen"] == " text"
