from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stackllama.data.posts import Attribution, Document
from stackllama.data.store import store
from stackllama.data.store.picking import Picked, find, sample
from stackllama.errors import DataError
from tests.data.small_store import FIRST, LONELY, SECOND, write


def many(folder: Path, *, rows_per_shard: int) -> Path:
    questions = [replace(FIRST, id=number, site=site) for number in range(1, 41) for site in ("a", "b")]
    store.write_questions(folder, "sft", questions[:50], rows_per_shard=rows_per_shard)
    store.write_questions(folder, "eval", questions[50:], rows_per_shard=rows_per_shard)
    return folder


def test_a_question_comes_whole_with_its_split(tmp_path: Path) -> None:
    write(tmp_path)
    assert find(tmp_path, 20) == Picked(SECOND, "eval")
    assert find(tmp_path, 1, "a.test") == Picked(FIRST, "sft")
    assert find(tmp_path, 1, "b.test") == Picked(LONELY, "sft")


def test_the_right_row_of_the_right_shard(tmp_path: Path) -> None:
    many(tmp_path, rows_per_shard=7)
    for number in (1, 7, 25, 26, 40):
        found = find(tmp_path, number, "b")
        assert (found.question.site, found.question.id) == ("b", number)
        assert found.split == ("sft" if number <= 25 else "eval")


@pytest.mark.parametrize(
    ("number", "site", "message"),
    [
        (1, None, "2 sites have a question 1; add --site with one of a.test, b.test"),
        (20, "b.test", "b.test has no question 20, but it is one of a.test"),
        (19, None, "no question 19 is among the 3; the nearest are 20, 1, 1"),
        (19, "b.test", "no question 19 is among the 3; the nearest of b.test are 1"),
        (19, "c.test", "no question 19 is among the 3, none of which is of c.test; leave --site out"),
        (2**63 - 1, None, "the nearest are 20, 1, 1"),
        (22, None, "no question 22 is among the 3; it is an answer to question 20 of a.test"),
    ],
)
def test_what_is_not_there_is_told(tmp_path: Path, number: int, site: str | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        find(write(tmp_path), number, site)
    assert message in str(error.value)


def test_a_sample_is_the_same_however_the_store_is_cut(tmp_path: Path) -> None:
    small, large = (many(tmp_path / str(rows), rows_per_shard=rows) for rows in (7, 100))
    drawn = sample(small, 10, 0)
    assert drawn == sample(large, 10, 0)
    assert len({(one.question.site, one.question.id) for one in drawn}) == 10
    assert sample(large, 10, 1) != drawn


def test_every_question_with_a_pair_can_be_drawn_and_no_other(tmp_path: Path) -> None:
    assert {one.question.id for one in sample(write(tmp_path / "small"), 10, 0)} == {FIRST.id, SECOND.id}
    store = many(tmp_path / "many", rows_per_shard=7)
    seen = {(one.question.site, one.question.id) for seed in range(60) for one in sample(store, 10, seed)}
    assert len(seen) == 80  # a chance of 80 * (7/8)**60, 3%, for another seed to leave one out


def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    assert find(write(tmp_path / "a[b]*?"), 20).question == SECOND


def test_plain_documents_have_no_question_to_look_at(tmp_path: Path) -> None:
    store.write_documents(tmp_path, "sft", [Document("a.test", 1, "text", Attribution("", "Ada", None, None, "MIT"))])
    for look in (lambda: find(tmp_path, 1), lambda: sample(tmp_path, 10, 0)):
        with pytest.raises(DataError, match="holds no question, so there is nothing to look at"):
            look()
