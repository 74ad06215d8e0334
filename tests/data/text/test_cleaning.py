"""Posts are cleaned before they are joined: each dropped row has a reason, and the counts of a build add up."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.building import build
from stackllama.data.building.build import Machine, Settings
from stackllama.data.building.joining import NO_ACCEPTED, ORPHAN
from stackllama.data.building.records import NO_ANSWER, NO_QUESTION, SAME_ANSWERS, SAME_TEXT
from stackllama.data.building.shuffle import POSTS
from stackllama.data.pairs.rules import PairRules
from stackllama.data.posts import Question
from stackllama.data.split.clusters import Clustering
from stackllama.data.store import store
from stackllama.data.text.cleaning import ONLY_LINKS, Cleaning, clean_posts
from stackllama.data.text.language import OTHER_LANGUAGE
from tests.data.cleaned import cleaned, drawn, everything, post, posts_table
from tests.data.dumps import answer, question, shared_dumps, site
from tests.data.text.test_language import ENGLISH, GERMAN

FRACTIONS = {"sft": 0.4, "reward": 0.3, "judge": 0.0, "ppo": 0.1, "eval": 0.2}
ALONE = Machine()
DEFAULT = Cleaning("break", "mask", "mask", "drop", "check")
FOREIGN = replace(DEFAULT, language="drop")
SETTINGS = Settings(FRACTIONS, PairRules(), clustering=Clustering(near_copies=False), cleaning=DEFAULT)
MAIL = "jane" + "@" + "firm.com"
KEY = drawn("gh" + "p_", 36)
LINK = '<p><a href="https://site.org/page">The answer is there</a></p>'


def built(folder: Path, source: Path, how: Cleaning = DEFAULT, *, machine: Machine = ALONE) -> build.Counts:
    settings = replace(SETTINGS, cleaning=how)
    found = build.sources([source], "beer")
    return build.build(found, folder, settings, machine, ledger=folder / "ledger", fingerprint=0)


def questions(folder: Path) -> list[Question]:
    found = [one for split in build.wanted(FRACTIONS) for one in store.read_questions(folder, split)]
    return sorted(found, key=lambda one: one.id)


def test_without_settings_nothing_is_done() -> None:
    text = f"{MAIL} {KEY} <|im_end|>"
    table = posts_table([post(text=text), post(2, "https://x.org", parent=1)], "site")
    counts: Counter[str] = Counter()
    assert clean_posts(table, Cleaning(), counts) is table
    assert counts == {}


def test_posts_without_a_finding_come_back_as_the_same_table() -> None:
    table = posts_table([post(text="Nothing to see."), post(2, "An answer.", parent=1)], "site")
    counts: Counter[str] = Counter()
    assert clean_posts(table, DEFAULT, counts) is table
    assert clean_posts(POSTS.empty_table(), DEFAULT, counts).num_rows == 0
    assert counts == {}


def test_other_columns_and_posts_stay_as_they_were() -> None:
    posts = [post(1, "One."), post(2, f"Mail {MAIL}.", f"About {KEY}"), post(3, "https://x.org", parent=1), post(4)]
    table = posts_table(posts, "site")
    out = clean_posts(table, DEFAULT, Counter())
    assert out.schema == table.schema
    assert out["id"].to_pylist() == [1, 2, 4]
    assert out["text"].to_pylist() == ["One.", "Mail email@example.com.", "A text."]
    assert out["title"].to_pylist() == ["", "About REDACTED", ""]
    same = [name for name in POSTS.names if name not in ("title", "text")]
    assert out.select(same) == table.filter(pa.array([True, True, False, True])).select(same)


def test_a_link_is_no_answer_but_may_be_a_question() -> None:
    text = "See [this](https://x.org) and <https://y.org>"
    assert cleaned(text, answer=True, how=Cleaning(link_only="drop")).counts == {ONLY_LINKS: 1}
    assert cleaned(text, answer=False, how=Cleaning(link_only="drop")).text == text
    assert cleaned(text, answer=True, how=Cleaning(link_only="keep")).text == text
    assert cleaned("Yes.", answer=True, how=Cleaning(link_only="drop")).text == "Yes."
    assert cleaned("Да, это https://x.org поможет", answer=True, how=Cleaning(link_only="drop")).text is not None


def test_a_dropped_post_has_one_reason_and_no_notes() -> None:
    text = f"{MAIL} {KEY} <|im_end|> https://x.org"
    assert cleaned(text, answer=True, how=replace(everything("drop"), link_only="drop")).counts == {
        "post: has a control token": 1
    }
    mixed = cleaned(
        text, answer=True, how=Cleaning(control_tokens="break", emails="mask", secrets="drop", link_only="drop")
    )
    assert mixed.counts == {"post: has a key or another secret": 1}


@given(st.text(st.characters(exclude_characters="@<[:", exclude_categories=["Cs", "Nd"]), min_size=1, max_size=200))
def test_a_text_without_any_sign_stays(text: str) -> None:
    out = cleaned(text, answer=True, how=replace(everything(), link_only="drop"))
    assert (out.text, out.counts) == (text, {})


HOSTILE = [
    "a@b.",
    "jane@firm.com:",
    "[x](y \"",
    "[![a](b)",
    "[]((a)",
    "`",
    "` ``",
    "https://",
    "<|",
    "<|a",
    "</s",
    "eyJaaaaaaaaaa-",
    "eyJaaaaaaaaaa.eyJaaaaaaaaaa-",
    "http://a:bcd\x40",
    "-----BEGIN \x50RIVATE KEY-----\n" + "A1b2" * 16 + "\n",
    "-----BEGIN \x50RIVATE KEY-----",
    "Authorization: Bearer a=",
    "Server=a;Password=a1b2c3d4",
    "secret_key = 'a",
    "xoxb-111111-",
    "sk-ant-api03-a",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (10_000_000 // len(piece))
    start = time.perf_counter()
    cleaned(text, answer=True, how=replace(everything(), link_only="drop"))
    assert time.perf_counter() - start < 60  # some 2 s alone; what goes back over its way would take days


def dump(folder: Path) -> Path:
    """Forty questions with three answers each, and one of each kind of what is cleaned."""
    posts = []
    for number in range(100, 500, 10):
        posts.append(question(number, Body=f"<p>{ENGLISH}</p>", Title=f"Title {number}", Tags=""))
        bodies = (f"First {number}", f"Second {number}", f"Third {number}")
        posts += [answer(number + n, number, Body=f"<p>{b}.</p>", Score=str(n)) for n, b in enumerate(bodies, 1)]
    posts += [
        question(10, Body=f"<p>Write to {MAIL} or {MAIL}.</p>", AcceptedAnswerId="12"),
        answer(11, 10, Body=f"<pre><code>token = {KEY}</code></pre>", Score="4"),
        answer(12, 10, Body=LINK, Score="2"),
        answer(13, 10, Body="<p>It ends with <code>&lt;|im_end|&gt;</code>.</p>", Score="0"),
        question(20, Body=f"<p>{GERMAN}</p>", Title="Schaum"),
        answer(21, 20, Body=f"<p>{GERMAN}</p>"),
        answer(22, 20, Body="<p>Nichts.</p>", Score="5"),
        answer(104, 100, Body=f"<p>{GERMAN}</p>", Score="9"),
    ]
    return site(folder, posts)


def by_id(folder: Path) -> dict[int, str]:
    found = questions(folder)
    return {q.id: q.text for q in found} | {a.id: a.text for q in found for a in q.answers}


def test_a_build_with_the_defaults(tmp_path: Path) -> None:
    counts = built(tmp_path / "out", dump(tmp_path / "dump"))
    assert counts["dropped"] == {ONLY_LINKS: 1}
    assert {name: n for name, n in counts["notes"].items() if not name.startswith("questions")} == {
        "text: e-mail address masked": 2,
        "text: GitHub token masked": 1,
        "text: control token broken": 1,
        NO_ACCEPTED: 1,
    }
    texts = by_id(tmp_path / "out")
    assert texts[10] == "Write to email@example.com or email@example.com."
    assert texts[11] == "```\ntoken = REDACTED\n```"
    assert 12 not in texts
    assert texts[13] == "It ends with `<|im_end| >`."
    assert texts[21] == GERMAN
    language = counts["languages"]["beer"]
    assert (language["language"], language["questions"]) == ("en", 41)
    assert language["shares"] == {"en": round(40 / 41, 4), "de": round(1 / 41, 4)}


def test_every_row_is_accounted_for_when_all_is_dropped(tmp_path: Path) -> None:
    given = dump(tmp_path / "dump")
    counts = built(tmp_path / "out", given, Cleaning("drop", "drop", "drop", "drop", "drop"))
    assert counts["dropped"] == {
        "post: has a control token": 1,  # 13
        "post: has an e-mail address": 1,  # 10
        "post: has a key or another secret": 1,  # 11
        ONLY_LINKS: 1,  # 12
        OTHER_LANGUAGE: 3,  # 20, 21, 104
        ORPHAN: 1,  # 22
    }
    assert counts["rows"] == sum(counts["dropped"].values()) + len(by_id(tmp_path / "out"))
    assert sorted({number // 10 * 10 for number in by_id(tmp_path / "out")}) == list(range(100, 500, 10))


def test_nothing_is_looked_at_when_all_is_off(tmp_path: Path) -> None:
    counts = built(tmp_path / "out", dump(tmp_path / "dump"), Cleaning())
    assert (counts["dropped"], counts["languages"]) == ({}, {})
    assert by_id(tmp_path / "out")[11] == f"```\ntoken = {KEY}\n```"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_the_same_comes_out_whoever_does_the_work_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dump(tmp_path / "dump")
    machines = [Machine(1), Machine(2)] + ([Machine(2, "ray")] if find_spec("ray") else [])
    counts = [built(tmp_path / str(n), given, FOREIGN, machine=one) for n, one in enumerate(machines)]
    contents = [{file.name: file.read_bytes() for file in (tmp_path / str(n)).iterdir()} for n in range(len(machines))]
    assert all(one == counts[0] for one in counts)
    assert all(one == contents[0] for one in contents)
    monkeypatch.setattr("stackllama.data.building.gathering.piece_size", lambda total: 5_000)
    monkeypatch.setattr("stackllama.data.building.gathering.bucket_count", lambda total, piece: 3)
    assert built(tmp_path / "cut", given, FOREIGN) == counts[0]
    assert questions(tmp_path / "cut") == questions(tmp_path / "0")


def jsonl(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows]
    (folder / "beer.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_preference_data_of_other_tools_is_cleaned_the_same_way(tmp_path: Path) -> None:
    rows = [(f"Question {n}?", f"Good {n}.", f"Bad {n}.") for n in range(30)]
    rows += [
        (f"Who is {MAIL}?", f"Her token is {KEY}.", "<|im_end|>"),
        ("Where?", "[Here](https://x.org)", "Over there, behind the house."),
        ("Which one?", f"Ask {MAIL}.", "Ask joe" + "@" + "firm.com."),  # two texts that become one
        ("How?", "Slowly, one by one.", "At once."),
        ("How?", "At once.", "https://x.org"),
    ]
    counts = built(tmp_path / "out", jsonl(tmp_path / "in", rows))
    assert counts["dropped"] == {ONLY_LINKS: 2, SAME_TEXT: 1}
    notes = counts["notes"]
    assert {name: notes.get(name) for name in (NO_ANSWER, SAME_ANSWERS)} == {NO_ANSWER: 2, SAME_ANSWERS: 1}
    assert notes["text: e-mail address masked"] == 3
    found = {one.text: one for one in questions(tmp_path / "out")}
    assert {a.text for a in found["Who is email@example.com?"].answers} == {"Her token is REDACTED.", "<|im_end| >"}
    assert len(found["Who is email@example.com?"].pairs) == 1
    assert [a.text for a in found["Which one?"].answers] == ["Ask email@example.com."]
    how = found["How?"]
    assert [(how.answers[p.better].text, how.answers[p.worse].text) for p in how.pairs] == [
        ("Slowly, one by one.", "At once.")
    ]
    assert counts["rows"] == sum(counts["dropped"].values()) + len(by_id(tmp_path / "out"))


def test_answers_of_a_dropped_question_of_other_tools_go_with_it(tmp_path: Path) -> None:
    rows = [(f"Question {n}?", f"Good {n}.", f"Bad {n}.") for n in range(30)] + [(f"Who is {MAIL}?", "Jane.", "Joe.")]
    counts = built(tmp_path / "out", jsonl(tmp_path / "in", rows), replace(DEFAULT, emails="drop"))
    assert counts["dropped"] == {"post: has an e-mail address": 1, NO_QUESTION: 2}
    assert counts["rows"] == 93


def test_a_foreign_record_is_dropped_with_its_pairs(tmp_path: Path) -> None:
    rows = [(ENGLISH + f" Number {n}?", f"Good {n}.", f"Bad {n}.") for n in range(30)]
    rows += [("Why?", GERMAN, "Because of the glass."), (GERMAN, "Darum.", "Nein.")]
    counts = built(tmp_path / "out", jsonl(tmp_path / "in", rows), FOREIGN)
    assert counts["dropped"] == {OTHER_LANGUAGE: 2, NO_QUESTION: 2}
    assert counts["notes"][NO_ANSWER] == 1
    assert counts["rows"] == sum(counts["dropped"].values()) + len(by_id(tmp_path / "out"))


@pytest.mark.dumps
def test_what_is_found_in_real_dumps(tmp_path: Path) -> None:
    """What docs/cleaning.md tells of two of the ten."""
    found = []
    for name in ("linguistics.meta-2020-11", "stackoverflow-2008-first-rows"):
        counts = built(tmp_path / name, shared_dumps() / name)
        dropped = {reason: n for reason, n in counts["dropped"].items() if "PostTypeId" not in reason}
        found.append((dropped, {what: n for what, n in counts["notes"].items() if what.startswith("text: ")}))
        assert counts["languages"]["beer"]["shares"] == {"en": 1.0}
    assert found[0] == ({ONLY_LINKS: 1}, {"text: control token broken": 2, "text: e-mail address masked": 3})
    assert found[1] == ({}, {"text: e-mail address masked": 2})
