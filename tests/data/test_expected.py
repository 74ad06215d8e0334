"""The counts of independent code over ten real dumps (`expected.json` beside them)."""

from __future__ import annotations

import json
from itertools import groupby

import pytest

from stackllama.data.pairs.rules import PairRules, answer_score, earlier_wins, longer_wins, pairs_by
from stackllama.data.posts import Pair, Question
from tests.data.dumps import shared_dumps
from tests.data.reading import pair_questions, read_questions

NAMES = (
    "ai-2017/Posts.xml",
    "beer.stackexchange.com.7z",
    "coffee-2015-03/Posts.xml",
    "datascience.meta-2024-01/Posts.xml",
    "history.meta-2018-08/Posts.xml",
    "interpersonal.meta.stackexchange.com.7z",
    "linguistics.meta-2020-11/Posts.xml",
    "quantumcomputing-2018-09/Posts.xml",
    "scifi-2011-sample/Posts.xml",
    "stackoverflow-2008-first-rows/Posts.xml",
)


def pairs_by_votes(questions: list[Question]) -> list[tuple[Question, Pair]]:
    """The baselines of `expected.json` are over all pairs with differing votes, whatever their scores."""
    return [
        (question, pair) for question in questions for pair in pairs_by([answer.votes for answer in question.answers])
    ]


@pytest.mark.dumps
@pytest.mark.parametrize("name", NAMES)
def test_counts_agree(name: str) -> None:
    folder = shared_dumps()
    expected = json.loads((folder / "expected.json").read_text())[name]
    questions, report = read_questions(folder / name)
    scores = [[answer_score(answer.votes, answer.accepted) for answer in question.answers] for question in questions]
    capped, counts = pair_questions(questions, PairRules())
    by_votes = pairs_by_votes(questions)
    found = {
        "rows": report.rows,
        "questions": report.questions,
        "answers": report.answers,
        "questions_with_two_or_more_answers": sum(len(question.answers) > 1 for question in questions),
        "questions_with_differing_votes": len([key for key, _ in groupby(by_votes, lambda item: item[0].id)]),
        "pairs_by_votes": len(by_votes),
        "pairs_by_score_rule": sum(len(pairs_by(one)) for one in scores),
        "questions_by_score_rule": sum(bool(question.pairs) for question in capped),
        "pairs_by_score_rule_capped_at_10": sum(len(question.pairs) for question in capped),
        "longer_wins_all_pairs": round(sum(longer_wins(*item) for item in by_votes) / len(by_votes), 4),
        "earlier_wins_all_pairs": round(sum(earlier_wins(*item) for item in by_votes) / len(by_votes), 4),
        "orphan_answers": report.orphans,
    }
    assert found == expected
    assert counts["pairs kept"] == expected["pairs_by_score_rule_capped_at_10"]
    kinds = {reason for reason in report.dropped if not reason.startswith(("post: PostTypeId", "accepted mark"))}
    assert kinds == set()  # real dumps lose nothing but wiki pages and the like


@pytest.mark.dumps
def test_every_data_set_is_compared() -> None:
    assert sorted(json.loads((shared_dumps() / "expected.json").read_text())) == sorted(NAMES)
