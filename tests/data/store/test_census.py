from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stackllama.data.posts import Attribution, Document
from stackllama.data.store import census, store
from stackllama.data.store.census import LENGTH_STARTS, SMALL_STARTS, VOTE_STARTS, Bin, Spread, take, to_json
from stackllama.errors import DataError
from tests.data.small_store import FIRST, write


def test_what_a_store_holds_by_hand(tmp_path: Path) -> None:
    found = take(write(tmp_path))
    assert found.splits == {
        "eval": {"questions": 1, "answers": 2, "pairs": 1},
        "sft": {"questions": 2, "answers": 3, "pairs": 2},
    }
    assert found.sites == [("a.test", 2, 5, 3), ("b.test", 1, 0, 0)]
    assert (found.tags, found.different_tags) == ([("x", 2), ("y", 1)], 2)
    assert found.answers_per_question.counts == {0: 1, 2: 1, 3: 1}
    assert found.pairs_per_question.counts == {0: 1, 1: 1, 2: 1}
    assert found.gaps.counts == {1: 2, 3: 1}
    assert found.accepted == 1
    asked, answered = found.questions, found.answers
    assert (asked.count, answered.count) == (3, 5)
    assert asked.votes.counts == {-1: 1, 0: 1, 5: 1}
    assert answered.votes.counts == {-2: 1, 0: 2, 1: 1, 3: 1}
    # "$$x$$ ![shown]" and "?" without the address
    assert asked.lengths.counts == {22: 1, 14: 1, 1: 1}
    assert answered.lengths.counts == {8: 1, 10: 2, 17: 1, 30: 1}
    assert asked.years == {"": 1, "2010": 1, "2011": 1}
    assert (asked.first, asked.last) == ("2010-03-01T00:00:00.000", "2011-05-01T00:00:00.000")
    assert asked.licenses == {"CC BY-SA 2.5": 2, "CC BY-SA 3.0": 1}
    assert answered.licenses == {"CC BY-SA 2.5": 5}


def test_code_formulas_links_and_images_are_told_apart(tmp_path: Path) -> None:
    found = take(write(tmp_path))
    assert found.questions.content == {"code block": 0, "inline code": 1, "LaTeX": 1, "link": 1, "image": 1}
    # A formula in code is none, money is none, and an address without brackets is a link.
    assert found.answers.content == {"code block": 1, "inline code": 0, "LaTeX": 1, "link": 1, "image": 0}


def test_baselines_are_means_over_questions(tmp_path: Path) -> None:
    row = take(write(tmp_path)).baselines
    assert (row["rules"], row["questions"], row["pairs"]) == (census.AS_THEY_ARE, 2, 3)
    # longer: (1/2 + 1) / 2, deviation 1/4; earlier: (1 + 0) / 2, deviation 1/2
    assert row["longer_wins"] == pytest.approx(3 / 4)
    assert row["longer_error"] == pytest.approx(1 / 4 / 2**0.5)
    assert row["earlier_wins"] == pytest.approx(1 / 2)
    assert row["earlier_error"] == pytest.approx(1 / 2 / 2**0.5)


def test_equally_long_and_equally_old_answers_count_one_half(tmp_path: Path) -> None:
    same = FIRST.answers[0]
    question = replace(FIRST, answers=(same, replace(same, id=99)), pairs=(FIRST.pairs[0],))
    store.write_questions(tmp_path, "sft", [question])
    row = take(tmp_path).baselines
    assert (row["longer_wins"], row["earlier_wins"]) == (0.5, 0.5)


def test_the_census_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    write(tmp_path / "one")
    store.write_questions(tmp_path / "two", "sft", store.read_questions(tmp_path / "one", "sft"), rows_per_shard=1)
    store.write_questions(tmp_path / "two", "eval", store.read_questions(tmp_path / "one", "eval"))
    assert take(tmp_path / "two") == take(tmp_path / "one")


def test_without_a_pair_there_are_no_baselines(tmp_path: Path) -> None:
    store.write_questions(tmp_path, "sft", [replace(FIRST, pairs=(), tags=())])
    found = take(tmp_path)
    assert (found.baselines["questions"], found.baselines["longer_wins"], found.baselines["earlier_error"]) == (
        0,
        None,
        None,
    )
    assert (found.gaps.counts, found.tags, found.different_tags) == ({}, [], 0)
    assert to_json(found)["gaps"]["median"] is None


def test_nothing_to_count_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no preference data"):
        take(tmp_path)
    by = Attribution("", "", None, None, "")
    store.write_documents(tmp_path, "sft", [Document("s", 1, "text", by)])
    with pytest.raises(DataError, match="holds no question"):
        take(tmp_path)


def test_a_shard_that_is_gone_or_another_is_an_error(tmp_path: Path) -> None:
    shard = next(write(tmp_path).glob("questions-eval*"))
    size = shard.stat().st_size
    shard.write_bytes(b"x" * size)
    with pytest.raises(DataError, match="cannot be read"):
        take(tmp_path)
    shard.write_bytes(b"x")
    with pytest.raises(DataError, match="not the one in the manifest"):
        take(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match="not the one in the manifest"):
        take(tmp_path)


def test_quantiles_by_hand() -> None:
    spread = Spread({1: 3, 5: 1, 100: 1})  # 1 1 1 5 100
    assert (spread.count, spread.total) == (5, 108)
    assert [spread.quantile(share) for share in (0.2, 0.6, 0.61, 0.8, 1.0)] == [1, 1, 5, 5, 100]
    told = spread.summary()
    assert (told["mean"], told["least"], told["median"], told["q95"], told["greatest"]) == (21.6, 1, 1, 100, 100)
    assert Spread({}).quantile(0.5) is None


def test_bins_by_hand() -> None:
    spread = Spread({-7: 1, 0: 2, 3: 1, 4: 1, 40: 1})
    assert spread.bins((0, 1, 3, 5)) == [Bin(-7, -1, 1), Bin(0, 0, 2), Bin(1, 2, 0), Bin(3, 4, 2), Bin(5, 40, 1)]
    assert Spread({3: 2}).bins((0, 1, 3, 5)) == [Bin(3, 4, 2)]
    assert Spread({9: 2}).bins((0, 1)) == [Bin(1, 9, 2)]
    assert Spread({}).bins((0, 1)) == []


def test_bins_of_votes_are_as_wide_below_0_as_above() -> None:
    bins = Spread({-20: 1, 20: 1}).bins(VOTE_STARTS)
    edges = [(one.low, one.high) for one in bins]
    assert edges[-5:] == [(2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    assert edges == [(-high, -low) for low, high in reversed(edges)]


def test_two_bins_of_lengths_double() -> None:
    for start in (8, 64, 1024, 4096):
        at = LENGTH_STARTS.index(start)
        assert LENGTH_STARTS[at + 2] == 2 * start
    assert SMALL_STARTS[:12] == tuple(range(12))


def test_plain_data_add_up(tmp_path: Path) -> None:
    told = json.loads(json.dumps(to_json(take(write(tmp_path))), allow_nan=False))
    assert (told["questions"]["count"], told["answers"]["count"], told["pairs"]) == (3, 5, 3)
    for name in ("votes", "lengths"):
        assert sum(count for _, _, count in told["answers"][name]["histogram"]) == 5
    assert told["gaps"]["histogram"] == [[1, 1, 2], [2, 2, 0], [3, 3, 1]]
    assert told["sites"][0] == {"site": "a.test", "questions": 2, "answers": 5, "pairs": 3}
