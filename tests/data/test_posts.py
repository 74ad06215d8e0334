from __future__ import annotations

from pathlib import Path

import py7zr
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackllama.data.posts import Attribution, license_of
from stackllama.errors import DumpError, TruncatedDumpError
from tests.data.dumps import answer, question, site, table
from tests.data.reading import read_questions

USERS = [{"Id": "7", "DisplayName": "Ada  Lovelace "}, {"Id": "-1", "DisplayName": "Community"}]


def test_a_question_with_its_answers(tmp_path: Path) -> None:
    posts = [
        answer(30, 10, Score="-2", Body="<p>See <code>x_y</code></p>", ContentLicense="CC BY-SA 4.0"),
        question(10, AcceptedAnswerId="20", Tags="|beer|hops|", Title=" Why? "),
        answer(20, 10, OwnerUserId="7", CreationDate="2011-04-07T23:59:59.1"),
    ]
    (found,), report = read_questions(site(tmp_path / "beer", posts, USERS), site="beer.stackexchange.com")
    assert (found.site, found.id, found.title, found.text) == ("beer.stackexchange.com", 10, "Why?", "Question 10?")
    assert (found.tags, found.votes, found.pairs) == (("beer", "hops"), 3, ())
    first, second = found.answers
    assert (first.id, first.votes, first.accepted, first.date) == (20, 1, True, "2011-04-07T23:59:59.100")
    assert (second.id, second.votes, second.accepted, second.text) == (30, -2, False, "See `x_y`")
    assert second.length == len("See x_y")
    root = "https://beer.stackexchange.com"
    assert found.attribution == Attribution(f"{root}/q/10", "Ada Lovelace", 7, f"{root}/users/7", "CC BY-SA 4.0")
    assert first.attribution == Attribution(f"{root}/a/20", "Ada Lovelace", 7, f"{root}/users/7", "CC BY-SA 2.5")
    assert second.attribution == Attribution(f"{root}/a/30", "user8", 8, f"{root}/users/8", "CC BY-SA 4.0")
    assert (report.rows, report.questions, report.answers, report.orphans, report.users) == (3, 1, 2, 0, 2)
    assert report.dropped == {}
    assert report.truncated_at == {}


@pytest.mark.parametrize(
    ("row", "author", "author_id"),
    [
        ({"OwnerUserId": "7", "OwnerDisplayName": "old name"}, "Ada Lovelace", 7),
        ({"OwnerUserId": "9", "OwnerDisplayName": "user9 of old"}, "user9 of old", 9),
        ({"OwnerUserId": "", "OwnerDisplayName": "user123"}, "user123", None),
        ({"OwnerUserId": "-1"}, "Community", -1),
        ({"OwnerUserId": ""}, "anonymous", None),
    ],
)
def test_who_is_named(tmp_path: Path, row: dict[str, str], author: str, author_id: int | None) -> None:
    folder = site(tmp_path / "s", [question(1, **{key: value for key, value in row.items() if value})], USERS)
    if not row["OwnerUserId"]:
        folder = site(tmp_path / "s", [{k: v for k, v in (question(1) | row).items() if v}], USERS)
    (found,), _ = read_questions(folder)
    assert (found.attribution.author, found.attribution.author_id) == (author, author_id)
    assert found.attribution.profile_url == (None if author_id is None else f"https://s/users/{author_id}")


def test_licences_change_on_their_days() -> None:
    days = ["2008-09-01", "2011-04-07", "2011-04-08", "2018-05-01", "2018-05-02", "2024-01-01"]
    assert [license_of(day)[-3:] for day in days] == ["2.5", "2.5", "3.0", "3.0", "4.0", "4.0"]


def test_every_row_that_is_left_out_has_a_reason(tmp_path: Path) -> None:
    def without(row: dict[str, str], key: str) -> dict[str, str]:
        return {name: value for name, value in row.items() if name != key}

    posts = [
        question(1, AcceptedAnswerId="99"),
        answer(2, 1),
        without(answer(3, 1), "Id"),
        answer(4, 1) | {"Id": "four"},
        answer(5, 1, Score="1.5"),
        without(answer(6, 1), "Score"),
        without(answer(7, 1), "Body"),
        answer(8, 1, Body="<p> </p>"),
        answer(9, 1) | {"ParentId": "x"},
        answer(10, 77),
        answer(11, 1, CreationDate="yesterday"),
        answer(1000000001, 1),
        {"Id": "12", "PostTypeId": "5", "Body": "wiki"},
        without(answer(13, 1), "PostTypeId"),
        answer(2, 1),
        answer(14, 1) | {"Id": "٣"},
    ]
    (found,), report = read_questions(site(tmp_path / "s", posts, [{"Id": "1"}, {"DisplayName": "x"}]))
    assert [one.id for one in found.answers] == [2]
    assert report.dropped == {
        "accepted mark: its answer is not there": 1,
        "answer: its question is not there": 1,
        "answer: no ParentId, or not a whole number": 1,
        "post: PostTypeId 5 is neither question nor answer": 1,
        "post: empty Body": 1,
        "post: fabricated row": 1,
        "post: its Id occurs twice": 1,
        "post: no Body": 1,
        "post: no CreationDate, or not a date": 1,
        "post: no Id, or not a whole number": 3,
        "post: no PostTypeId": 1,
        "post: no Score, or not a whole number": 2,
        "user: no DisplayName": 1,
        "user: no Id, or not a whole number": 1,
    }
    assert report.rows == len(posts)
    posts_dropped = sum(
        count for reason, count in report.dropped.items() if not reason.startswith(("user", "accepted"))
    )
    assert report.questions + report.answers + posts_dropped == len(posts)
    assert report.orphans == 1


ROWS = [
    question(1, AcceptedAnswerId="4"),
    question(2),
    question(9),
    *[answer(number, 1 + number % 2, Score=str(number)) for number in range(3, 9)],
    answer(20, 50),
    answer(5, 1, Body="<p>another body under the same id</p>"),
    question(30, Body=""),
]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(ROWS), st.booleans())
def test_the_order_of_the_rows_does_not_matter(tmp_path: Path, order: list[dict[str, str]], users_first: bool) -> None:
    expected = read_questions(site(tmp_path / "s", ROWS, USERS), site="s")
    assert [len(one.answers) for one in expected[0]] == [4, 2, 0]  # Id 5 occurs with the questions 1 and 2
    assert read_questions(site(tmp_path / "s", order, USERS), site="s") == expected
    names = ["Posts", "Users"][:: -1 if users_first else 1]
    contents = {"Posts": table("Posts", order), "Users": table("Users", USERS)}
    with py7zr.SevenZipFile(tmp_path / "s.7z", "w") as packed:
        for name in names:
            packed.writestr(contents[name], f"{name}.xml")
    assert read_questions(tmp_path / "s.7z") == expected


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = site(tmp_path / "s", [question(number, Body="x" * 4000) for number in range(1, 300)], USERS)
    read_questions(folder, tell=lambda done, total: seen.append((done, total)))
    total = (folder / "Posts.xml").stat().st_size + (folder / "Users.xml").stat().st_size
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_cut_dump_goes_on_only_when_asked(tmp_path: Path) -> None:
    folder = site(tmp_path / "s", [question(1), answer(2, 1), answer(3, 1)], USERS)
    content = (folder / "Posts.xml").read_bytes()
    (folder / "Posts.xml").write_bytes(content[: content.rindex(b"Answer 3")])
    with pytest.raises(TruncatedDumpError) as caught:
        read_questions(folder)
    (found,), report = read_questions(folder, allow_truncated=True)
    assert [one.id for one in found.answers] == [2]
    assert report.truncated_at == {"Posts": caught.value.byte}
    assert content[: caught.value.byte].endswith(b"/>")


def test_a_dump_without_questions_is_refused(tmp_path: Path) -> None:
    for rows in ([], [answer(2, 1)]):
        with pytest.raises(DumpError, match="no question"):
            read_questions(site(tmp_path / "s", rows))
