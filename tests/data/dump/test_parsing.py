"""Rows become columns: each is judged on its own, and what is left out is counted under one reason."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackllama.data.building.shuffle import POSTS
from stackllama.data.dump.attributes import of_rows
from stackllama.data.dump.parsing import parse_links, parse_posts, parse_users, parse_votes
from stackllama.data.posts import license_of
from tests.data.dumps import answer, question

Rows = list[dict[str, Any]]


def posts(*rows: dict[str, str]) -> tuple[Rows, dict[str, int]]:
    dropped: Counter[str] = Counter()
    found = parse_posts(of_rows(rows), "beer", dropped)
    assert found.schema == POSTS
    return found.to_pylist(), dict(dropped)


def without(row: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in row.items() if key != name}


def test_a_question_and_an_answer_as_columns() -> None:
    found, dropped = posts(
        question(5, AcceptedAnswerId="6", Title=" Why? ", Tags="|beer|hops|", OwnerDisplayName=" Ada "),
        answer(6, 5, Score="-2", Body="<p>See <code>x_y</code></p>", ContentLicense="CC BY-SA 4.0", OwnerUserId="-1"),
    )
    assert dropped == {}
    asked, answered = found
    assert asked == {
        "site": "beer",
        "id": 5,
        "question": 5,
        "answers": False,
        "accepted_answer": 6,
        "title": "Why?",
        "tags": ["beer", "hops"],
        "text": "Question 5?",
        "length": len("Question 5?"),
        "votes": 3,
        "date": "2019-05-01T10:00:00.000",
        "owner": 7,
        "owner_name": "Ada",
        "license": license_of("2019-05-01"),
        "pairs": None,
        "url": None,
        "profile_url": None,
    }
    assert (answered["question"], answered["answers"], answered["votes"], answered["owner"]) == (5, True, -2, -1)
    assert (answered["text"], answered["length"], answered["license"]) == ("See `x_y`", 7, "CC BY-SA 4.0")


def test_what_belongs_to_a_question_is_not_read_from_an_answer() -> None:
    (found,), _ = posts(answer(6, 5, AcceptedAnswerId="9", Title="No", Tags="<a>"))
    assert (found["accepted_answer"], found["title"], found["tags"]) == (None, "", [])
    (found,), _ = posts(question(5, ParentId="9"))
    assert found["question"] == 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (question(1, PostTypeId="4"), "post: PostTypeId 4 is neither question nor answer"),
        (question(1, PostTypeId="-4"), "post: PostTypeId -4 is neither question nor answer"),
        (question(1, PostTypeId="x"), "post: no PostTypeId"),
        (without(question(1), "PostTypeId"), "post: no PostTypeId"),
        (question(0), "post: no Id, or not a whole number"),
        (question(1, Id="-1"), "post: no Id, or not a whole number"),
        (question(1, Id="1.5"), "post: no Id, or not a whole number"),
        (question(1, Id="1" * 19), "post: no Id, or not a whole number"),
        (question(1, Id="١"), "post: no Id, or not a whole number"),
        (question(1, Id="1\n"), "post: no Id, or not a whole number"),
        (question(1000000001), "post: fabricated row"),
        (without(question(1), "Score"), "post: no Score, or not a whole number"),
        (question(1, Score="+1"), "post: no Score, or not a whole number"),
        (without(answer(2, 1), "ParentId"), "answer: no ParentId, or not a whole number"),
        (without(question(1), "CreationDate"), "post: no CreationDate, or not a date"),
        (question(1, CreationDate=""), "post: no CreationDate, or not a date"),
        (question(1, CreationDate="2019-05-01"), "post: no CreationDate, or not a date"),
        (question(1, CreationDate="2019-05-01T10:00:00.000\n"), "post: no CreationDate, or not a date"),
        (question(1, Title="x" * 2001), "post: over 2000 signs in a field"),
        (question(1, Tags="|a" * 1001), "post: over 2000 signs in a field"),
        (question(1, OwnerDisplayName="ä" * 2001), "post: over 2000 signs in a field"),
        (question(1, ContentLicense="x" * 2001), "post: over 2000 signs in a field"),
        (without(question(1), "Body"), "post: no Body"),
        (question(1, Body="<p> </p>"), "post: empty Body"),
        (question(1, Body="x" * 300_001), "post: Body has over 300000 characters, or far more as Markdown"),
        (
            question(1, Body="<blockquote>" * 30 + "a\n" * 50_000),
            "post: Body has over 300000 characters, or far more as Markdown",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_and_the_others_stay(row: dict[str, str], reason: str) -> None:
    found, dropped = posts(question(5), row, answer(7, 5))
    assert [post["id"] for post in found] == [5, 7]
    assert dropped == {reason: 1}


def test_the_first_reason_that_holds_is_counted() -> None:
    wrong = question(0, Score="x", CreationDate="never", Title="x" * 9999, Body="")
    assert posts(wrong)[1] == {"post: no Id, or not a whole number": 1}
    assert posts(wrong | {"Id": "1"})[1] == {"post: no Score, or not a whole number": 1}
    assert posts(wrong | {"PostTypeId": "5"})[1] == {"post: PostTypeId 5 is neither question nor answer": 1}


def test_texts_as_long_as_they_may_be() -> None:
    assert len(posts(question(5, Body="x" * 300_000, Title="ä" * 2000))[0]) == 1


def test_numbers_and_dates_as_they_may_be_written() -> None:
    (found,), _ = posts(question(5, Id="007", Score="-0", OwnerUserId="9" * 18, CreationDate="2019-05-01T10:00:00.12Z"))
    assert (found["id"], found["votes"], found["owner"]) == (7, 0, 10**18 - 1)
    assert found["date"] == "2019-05-01T10:00:00.120"
    for written, read in (("", ".000"), (".123456789", ".123"), (".000", ".000")):
        (found,), _ = posts(question(5, CreationDate=f"2019-05-01T10:00:00{written}"))
        assert found["date"] == f"2019-05-01T10:00:00{read}"


SOME = [question(1), answer(2, 1), question(3, Score="x"), answer(4, 1, Body="")]


@given(st.lists(st.sampled_from(SOME), max_size=8))
def test_what_becomes_of_a_row_depends_on_nothing_but_the_row(rows: list[dict[str, str]]) -> None:
    alone = [posts(row) for row in rows]
    together = posts(*rows)
    assert together[0] == [post for found, _ in alone for post in found]
    assert Counter(together[1]) == sum((Counter(dropped) for _, dropped in alone), Counter[str]())
    assert posts(*(dict(reversed(row.items())) for row in rows)) == together


def test_no_rows_make_no_posts() -> None:
    assert posts() == ([], {})


def test_users() -> None:
    dropped: Counter[str] = Counter()
    rows = [
        {"Id": "3", "DisplayName": " a\tb "},
        {"Id": "-1", "DisplayName": "Community"},
        {"Id": "x", "DisplayName": "y"},
        {"Id": "4", "DisplayName": "x" * 2001},
        {"Id": "5", "DisplayName": " "},
        {"Id": "6"},
    ]
    found = parse_users(of_rows(rows), dropped)
    assert found.to_pylist() == [{"id": 3, "name": "a b"}, {"id": -1, "name": "Community"}]
    assert dropped == {
        "user: no Id, or not a whole number": 1,
        "user: over 2000 signs in a name": 1,
        "user: no DisplayName": 2,
    }


def test_votes_of_other_kinds_are_passed_over() -> None:
    dropped: Counter[str] = Counter()
    rows = [
        {"PostId": "8", "VoteTypeId": "2", "CreationDate": "1970-01-03T00:00:00.000"},
        {"PostId": "9", "VoteTypeId": "3", "CreationDate": "1970-01-01T00:00:00.000"},
        {"PostId": "9", "VoteTypeId": "1", "CreationDate": "1970-01-01T00:00:00.000"},
        {"PostId": "-9", "VoteTypeId": "2", "CreationDate": "1970-01-01T00:00:00.000"},
        {"PostId": "9", "VoteTypeId": "2", "CreationDate": "1970-02-30T00:00:00.000"},
        {"PostId": "9", "VoteTypeId": "2"},
    ]
    found = parse_votes(of_rows(rows), dropped)
    assert found.to_pylist() == [{"id": 8, "day": 2, "change": 1}, {"id": 9, "day": 0, "change": -1}]
    assert dropped == {"vote: no PostId, or not a whole number": 1, "vote: no CreationDate, or not a date": 2}


def test_links() -> None:
    dropped: Counter[str] = Counter()
    rows = [
        {"PostId": "8", "RelatedPostId": "9", "LinkTypeId": "3"},
        {"PostId": "8", "RelatedPostId": "9", "LinkTypeId": str(2**31)},
        {"PostId": "8", "RelatedPostId": "9", "LinkTypeId": "-1"},
        {"PostId": "8", "LinkTypeId": "3"},
    ]
    assert parse_links(of_rows(rows), dropped).to_pylist() == [{"id": 8, "related": 9, "kind": 3}]
    assert dropped == {"link: no PostId, RelatedPostId or LinkTypeId, or not a whole number": 3}
