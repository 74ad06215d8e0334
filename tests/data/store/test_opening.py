from __future__ import annotations

import json
from pathlib import Path

import pytest

from stackllama.data.building import build
from stackllama.data.interchange import writing as interchange_write
from stackllama.data.pairs.rules import PairRules
from stackllama.data.store.census import take
from stackllama.data.store.opening import Opened, opened, store_at
from stackllama.data.store.store import read_questions
from stackllama.errors import DataError, RunError, StackllamaError
from tests.data.dumps import answer, question, site
from tests.data.small_store import write

SETTINGS = build.Settings({"sft": 0.5, "eval": 0.5}, PairRules(), allow_truncated=True)


def look(where: Path | str) -> Opened:
    """What is opened; its folder may be gone."""
    with opened(str(where), SETTINGS, build.Machine(), build.silent) as data:
        assert take(data.folder).questions.count
        return data


def dump(folder: Path) -> Path:
    rows = [
        question(1),
        answer(2, 1, Score="5"),
        answer(3, 1),
        question(4),
        answer(5, 9),
        {"Id": "6", "PostTypeId": "4"},
    ]
    return site(folder, rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write(tmp_path / "runs" / "mine" / "data")
    (tmp_path / "runs" / "mine" / "recipe.yaml").write_text("name: mine\n")
    return tmp_path / "runs" / "mine"


def test_a_run_is_found_by_its_folder_its_data_or_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    for where in (run, run / "data", "mine"):
        data = look(where)
        assert (data.kind, data.folder.resolve(), data.rebuilt, data.report) == ("run", run / "data", False, {})
    Path("mine").mkdir()  # what is there goes before a name
    assert store_at("mine") is None
    assert store_at("x" * 300) is None


def test_the_report_of_a_build_comes_along(run: Path) -> None:
    report = {"rows": 6, "dropped": {"post: no Score": 1}, "baselines": [], "extra": [1]}
    (run / "data" / "report.json").write_text(json.dumps(report))
    assert look(run).report == report


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        '{"dropped": 3}',
        '{"notes": {"a": "b"}}',
        '{"truncated": {"a": 1}}',
        '{"baselines": [{}]}',
        '{"baselines": {}}',
        '{"clusters": {"a": true}}',
    ],
)
def test_a_report_that_no_build_has_written_is_an_error(run: Path, report: str) -> None:
    (run / "data" / "report.json").write_text(report)
    with pytest.raises(DataError, match=r"report\.json is not what a build writes"):
        look(run)


def test_a_broken_report_is_an_error(run: Path) -> None:
    (run / "data" / "report.json").write_text("{")
    with pytest.raises(RunError, match=r"report\.json is not JSON"):
        look(run)


def test_a_dump_is_built_and_gone_afterwards(tmp_path: Path) -> None:
    for where in (dump(tmp_path / "a.test"), tmp_path / "a.test" / "Posts.xml"):
        with opened(str(where), SETTINGS, build.Machine(), build.silent) as data:
            found = [one for split in ("sft", "eval") for one in read_questions(data.folder, split)]
            assert [(one.site, one.id) for one in sorted(found, key=lambda one: one.id)] == [
                ("a.test", 1),
                ("a.test", 4),
            ]
        assert (data.kind, data.rebuilt) == ("dump", True)
        assert data.report["rows"] == 6
        assert data.report["dropped"] == {
            "answer: its question is not there": 1,
            "post: PostTypeId 4 is neither question nor answer": 1,
        }
        assert not data.folder.exists()
        assert sorted(path.name for path in (tmp_path / "a.test").iterdir()) == ["Posts.xml"]


def test_a_dump_that_breaks_off_can_be_looked_at(tmp_path: Path) -> None:
    posts = dump(tmp_path / "a.test") / "Posts.xml"
    posts.write_bytes(posts.read_bytes()[:-40])
    data = look(posts)
    assert list(data.report["truncated"]) == [str(posts)]


@pytest.mark.parametrize("form", ["preferences", "paired", "jsonl"])
def test_data_of_another_tool_are_built(tmp_path: Path, form: str) -> None:
    def render(title: str, body: str) -> str:
        return f"{title} {body}"

    interchange_write.write(write(tmp_path / "store"), tmp_path / "out", format=form, render=render)
    data = look(tmp_path / "out")
    assert (data.kind, data.rebuilt) == (f"preference data of another tool ({form})", True)


def test_what_is_nothing_of_these_says_what_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("# notes")
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "notes.txt", tmp_path / "empty", tmp_path / "nowhere", "x" * 300):
        with pytest.raises(DataError, match=r"give a run .* or a dump"):
            look(where)


def test_a_run_without_data_says_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(DataError, match="first type: stackllama data "):
        look(tmp_path)


def test_nothing_stays_behind_where_a_build_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "Posts.xml").write_text("<posts></posts>")
    with pytest.raises(StackllamaError, match="no question"):
        look(tmp_path / "Posts.xml")
    assert list((tmp_path / "temporary").iterdir()) == []
