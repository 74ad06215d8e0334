from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackllama.data.interchange import rows as interchange_rows
from stackllama.data.interchange.rows import READERS, Source, merge
from stackllama.data.pairs.rules import answer_score
from stackllama.data.posts import Question

HERE = Source("here")
LINKS = ["https://beer.stackexchange.com/questions/1", "https://beer.stackexchange.com", "https://b/users/9"]


def take(form: str, rows: list[Any], source: Source = HERE) -> tuple[list[Question], dict[str, int]]:
    dropped: Counter[str] = Counter()
    return list(READERS[form](rows, source, dropped)), dict(dropped)


def scored(number: int, text: str, score: Any = 1, **more: Any) -> dict[str, Any]:
    return {
        "answer_id": number,
        "author": "Ada",
        "author_id": 5,
        "author_profile": "https://b/users/5",
        "pm_score": score,
        "selected": False,
        "text": text,
    } | more


def preferences(*answers: Any, **more: Any) -> dict[str, Any]:
    return {"qid": 1, "question": "why?", "answers": list(answers), "date": "2012/01/02", "metadata": LINKS} | more


def pair(better: Any, worse: Any, **more: Any) -> dict[str, Any]:
    return {
        "qid": 1,
        "question": "why?",
        "date": "2012/01/02",
        "metadata": LINKS,
        "response_j": better,
        "response_k": worse,
    } | more


def test_a_question_with_scores() -> None:
    row = preferences(scored(4, "late", 3, selected=True), scored(2, "early", -1, author=None, author_id=None))
    (one,), dropped = take("preferences", [row])
    assert dropped == {}
    assert (one.site, one.id, one.title, one.text, one.pairs) == ("beer.stackexchange.com", 1, "", "why?", ())
    assert one.date == "2012-01-02T00:00:00.000"
    assert (one.attribution.url, one.attribution.profile_url) == (LINKS[0], LINKS[2])
    assert one.attribution.license == "CC BY-SA 3.0"
    early, late = one.answers
    assert (early.id, early.votes, early.attribution.author) == (2, -1, "anonymous")
    assert (late.id, late.votes, late.accepted) == (4, 3, True)  # 3 with its mark: log2(1 + 3) + 1
    assert late.attribution.url == "https://beer.stackexchange.com/a/4"
    assert late.attribution.license == "CC BY-SA"  # its own day is not known, so its version is not either


def test_the_licence_of_an_answer_is_certain_where_the_question_is_recent() -> None:
    (one,), _ = take("preferences", [preferences(scored(1, "a"), date="2018/05/02")])
    assert one.answers[0].attribution.license == "CC BY-SA 4.0"


def test_the_hubs_html_becomes_markdown_and_markdown_stays() -> None:
    row = preferences(
        scored(1, "<p>Use <code>a_b</code></p>"), scored(2, "plain & simple"), question="<p>Is <em>it</em>?</p>"
    )
    (one,), _ = take("preferences", [row])
    assert one.text == "Is *it*?"
    assert [answer.text for answer in one.answers] == ["Use `a_b`", "plain & simple"]
    assert one.answers[0].length == len("Use a_b")
    markdown = preferences(scored(1, "a <p> tag, 1 &lt; 2"), question="what is `<p>`?")
    assert take("preferences", [markdown])[0][0].answers[0].text == "a <p> tag, 1 &lt; 2"
    (kept,), _ = take("preferences", [row], Source("here", markdown=True))
    assert kept.text == "<p>Is <em>it</em>?</p>"


def test_rows_of_one_question_are_put_together() -> None:
    rows = [pair("A", "B"), pair("x", "y", qid=2), pair("B", "C"), pair("A", "C"), pair("A", "B")]
    (first, second), dropped = take("paired", rows)
    assert dropped == {"row: the same pair was there before": 1}
    told = {answer.text: answer for answer in first.answers}
    assert sorted(told) == ["A", "B", "C"]
    assert [answer.id for answer in first.answers] == sorted(answer.id for answer in first.answers)
    assert {text: answer_score(told[text].votes, False) for text in told} == {"A": 2, "B": 1, "C": 0}
    texts = [answer.text for answer in first.answers]
    assert {(texts[one.better], texts[one.worse], one.gap) for one in first.pairs} == {
        ("A", "B", 1),
        ("B", "C", 1),
        ("A", "C", 2),
    }
    assert (second.id, len(second.pairs)) == (2, 1)


def test_pairs_in_a_circle_all_stay() -> None:
    (one,), dropped = take("paired", [pair("A", "B"), pair("B", "C"), pair("C", "A"), pair("A", "D")])
    assert dropped == {}
    assert len(one.pairs) == 4
    assert all(two.gap >= 1 for two in one.pairs)


def test_a_long_chain_of_pairs_keeps_its_votes_in_64_bits() -> None:
    rows = [pair(f"{number + 1}", f"{number}") for number in range(900)]
    (one,), _ = take("paired", rows)
    assert len(one.pairs) == 900
    assert max(answer.votes for answer in one.answers) < 2**63


def test_equal_qids_of_two_sites_are_two_questions() -> None:
    other = [link.replace("beer", "tea") for link in LINKS]
    found, _ = take("paired", [pair("A", "B"), pair("A", "B", metadata=other), pair("A", "B", metadata=None)])
    assert [one.site for one in found] == ["beer.stackexchange.com", "tea.stackexchange.com", "here"]


def test_prompts_lose_their_frame_and_get_ids_of_their_own() -> None:
    source = Source("set", ("Question: ", "\n\nAnswer:"))
    row = {"prompt": "Question: why?\n\nAnswer:", "chosen": " yes", "rejected": " no"}
    (one,), _ = take("jsonl", [row, row | {"prompt": "why? "}, row | {"prompt": "why?", "chosen": "oh"}], source)
    assert (one.site, one.text) == ("set", "why?")
    assert sorted(answer.text for answer in one.answers) == ["no", "oh", "yes"]
    assert 0 <= one.id < 2**62
    assert one.attribution.license == "unknown"
    (same,), _ = take("jsonl", [row])
    assert same.text == row["prompt"]
    assert one.id == 2229035108122611602  # never to change: splits hang on it


def test_a_full_window_gives_parts_that_merge_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair("A", "B"), pair("p", "q", qid=2), pair("B", "C"), pair("C", "D"), pair("A", "D")]
    whole, _ = take("paired", rows)
    monkeypatch.setattr(interchange_rows, "WINDOW", 8)
    parts, _ = take("paired", rows)
    assert [part.id for part in parts] == [1, 2, 1, 1]
    mine = [part for part in parts if part.id == 1]
    assert merge(mine) == merge(mine[::-1]) == whole[0]


BAD_TEXTS = [
    (None, "no"),
    ("", "no"),
    (" \n\x00", "no"),
    (3, "is not text"),
    (["a"], "is not text"),
    ("\ud800", "half a character"),
    ("x" * 1_000_001, "over 1000000 characters"),
]


@pytest.mark.parametrize(("value", "reason"), BAD_TEXTS)
def test_texts_that_cannot_be_used_drop_their_row(value: Any, reason: str) -> None:
    prompted = {"prompt": "p", "chosen": "c", "rejected": "r"}
    rows = [("jsonl", prompted | {key: value}, key) for key in prompted]
    rows += [("paired", pair("a", "b") | {key: value}, key) for key in ("question", "response_j", "response_k")]
    rows += [("preferences", preferences(scored(1, "a"), question=value), "question")]
    for form, row, key in rows:
        found, dropped = take(form, [row])
        assert found == []
        ((told, count),) = dropped.items()
        assert count == 1
        assert told.startswith("row: ")
        assert reason in told
        assert key in told
    (kept,), dropped = take("preferences", [preferences(scored(1, "a"), scored(2, value))])
    assert [one.id for one in kept.answers] == [1]
    assert [told.startswith("answer: ") and reason in told for told in dropped] == [True]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("text", "answer: not a record"),
        (scored(True, "b"), "answer: no answer_id, or not a whole number"),
        (scored(2**63, "b"), "answer: no answer_id, or not a whole number"),
        (scored(2, "b", None), "answer: no pm_score, or not a whole number"),
        (scored(2, "b", 1.0), "answer: no pm_score, or not a whole number"),
        (scored(2, "b", -7), "answer: a pm_score that the score rule never gives"),
        (scored(2, "a"), "answer: its text was there before"),
        (scored(1, "b"), "answer: its answer_id was there before"),
    ],
)
def test_answers_that_cannot_be_used_are_dropped_alone(bad: Any, reason: str) -> None:
    (one,), dropped = take("preferences", [preferences(scored(1, "a"), bad)])
    assert dropped == {reason: 1}
    assert [answer.text for answer in one.answers] == ["a"]


def test_an_impossible_mark_goes_and_the_score_stays() -> None:
    (one,), dropped = take("preferences", [preferences(scored(1, "a", 0, selected=True))])
    assert (one.answers[0].votes, one.answers[0].accepted) == (0, False)
    assert list(dropped.values()) == [1]


def test_rows_that_cannot_be_used_are_counted_by_reason() -> None:
    answers = [None, [], "a", [scored(1, "")]]
    found, dropped = take("preferences", [preferences(answers=given) for given in answers])
    assert found == []
    assert dropped == {"row: no answers": 4, "answer: no text": 1}
    found, dropped = take("paired", [pair("a", "a "), pair("a", "b", qid=None), pair("a", "b", qid="1"), {}])
    assert found == []
    assert dropped == {
        "row: response_j and response_k are the same": 1,
        "row: no qid, or not a whole number": 2,
        "row: no question": 1,
    }


def test_the_number_of_answers_to_a_question_is_bounded() -> None:
    (one,), dropped = take("paired", [pair(f"a{number}", "b") for number in range(1010)])
    assert (len(one.answers), dropped) == (1000, {"row: over 1000 answers to a question": 11})
    (one,), dropped = take("preferences", [preferences(*(scored(number, f"{number}") for number in range(1010)))])
    assert (len(one.answers), dropped) == (1000, {"answer: over 1000 to a question": 10})


def test_control_characters_go_and_line_ends_are_newlines() -> None:
    (one,), _ = take("paired", [pair("a\x00b\r\nc\rd\te\x1b", "k")])
    assert {answer.text for answer in one.answers} == {"ab\nc\nd\te", "k"}


@pytest.mark.parametrize("metadata", [None, [], "https://x", [None], [3, {}], ["../..", "https://..%2f..", 1]])
@pytest.mark.parametrize("date", [None, "", 20120102, "yesterday", "2012/01"])
def test_odd_links_and_dates_cost_no_row(metadata: Any, date: Any) -> None:
    (one,), dropped = take("paired", [pair("a", "b", metadata=metadata, date=date)])
    assert (one.site, one.date, one.attribution.license, dropped) == ("here", "", "unknown", {})
    assert one.answers[0].attribution.license == "unknown"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = ["qid", "question", "answers", "date", "metadata", "response_j", "response_k", "prompt", "chosen", "rejected"]
answer_keys = st.sampled_from(["answer_id", "author", "author_id", "author_profile", "pm_score", "selected", "text"])
anything = values | st.lists(st.dictionaries(answer_keys, values, max_size=7), max_size=3)


@settings(max_examples=300)
@given(st.lists(st.dictionaries(st.sampled_from(keys), anything, max_size=10), max_size=4))
def test_no_row_breaks_the_reader(rows: list[dict[str, Any]]) -> None:
    for form in READERS:
        found, _ = take(form, rows)
        for one in found:
            assert one.text
            assert one.answers
            assert all(answer.text and -1 <= answer.votes < 2**63 for answer in one.answers)
            assert all(two.gap >= 1 and two.better != two.worse for two in one.pairs)


def test_html_that_becomes_far_more_as_markdown_is_dropped() -> None:
    quoted = "<p>a</p>" + "<blockquote>" * 30 + "a\n" * 50_000
    rows = [preferences(scored(1, quoted), scored(2, "<p>b</p>")), preferences(scored(3, "<p>b</p>"), question=quoted)]
    (one,), dropped = take("preferences", rows)
    assert [answer.text for answer in one.answers] == ["b"]
    assert dropped == {
        "answer: text has over 300000 characters, or far more as Markdown": 1,
        "row: question has over 300000 characters, or far more as Markdown": 1,
    }
