"""From dumps to the store: each question once, in one split, every number accounted for, and the same however it is
built.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from stackllama.data.building import build, convert
from stackllama.data.building.build import Machine, Settings
from stackllama.data.dump.pieces import Piece
from stackllama.data.interchange import writing as interchange_write
from stackllama.data.interchange.formats import SCHEMAS
from stackllama.data.pairs.pairing import MOST_ANSWERS
from stackllama.data.pairs.rules import PairRules
from stackllama.data.posts import Question
from stackllama.data.split.assigning import assign
from stackllama.data.split.clusters import Clustering
from stackllama.data.store import store
from stackllama.data.synthetic.community import SITE, world_documents, write_dump
from stackllama.errors import DataError, DumpError, RunError
from tests.data.dumps import Row, answer, question, site, table

FRACTIONS = {"sft": 0.4, "reward": 0.3, "judge": 0.0, "ppo": 0.1, "eval": 0.2}
SETTINGS = Settings(FRACTIONS, PairRules(max_pairs=2), clustering=Clustering(near_copies=False))
ALONE = Machine()


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump") / "site"
    write_dump(folder, questions=150, seed=0, fractions=FRACTIONS)
    return folder


def built(folder: Path, *dumps: Path, settings: Settings = SETTINGS, machine: Machine = ALONE) -> build.Counts:
    dumped, ledger = build.sources(dumps, SITE), folder / "ledger.parquet"
    return build.build(dumped, folder, settings, machine, ledger=ledger, fingerprint=0)


def questions(folder: Path) -> list[Question]:
    return [one for split in build.wanted(FRACTIONS) for one in store.read_questions(folder, split)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and buckets so small that a small dump has many."""
    monkeypatch.setattr("stackllama.data.building.gathering.piece_size", lambda total: 20_000)
    monkeypatch.setattr("stackllama.data.building.gathering.bucket_count", lambda total, piece: 5)


def test_every_question_is_in_exactly_one_split_with_its_pairs(dump: Path, tmp_path: Path) -> None:
    counts = built(tmp_path, dump)
    found = questions(tmp_path)
    assert sorted(one.id for one in found) == sorted({one.id for one in found})
    assert len(found) == 150
    assert counts["rows"] == 150 + sum(len(one.answers) for one in found) + sum(counts["dropped"].values())
    possible = sum(len(one.answers) * (len(one.answers) - 1) // 2 for one in found)
    assert possible == sum(len(one.pairs) for one in found) + sum(
        count for reason, count in counts["pairs_dropped"].items() if reason.startswith("pair: ")
    )
    assert not (tmp_path / "work").exists()
    assert "questions/judge" not in store.read_manifest(tmp_path).parts


def test_a_dump_given_twice_is_counted_and_used_once(dump: Path, tmp_path: Path) -> None:
    once, twice = built(tmp_path / "once", dump), built(tmp_path / "twice", dump, dump)
    assert questions(tmp_path / "once") == questions(tmp_path / "twice")
    assert twice["rows"] == 2 * once["rows"]
    assert twice["dropped"]["question: its site and Id were read before"] == 150
    assert sum(twice["dropped"].values()) == once["rows"] + sum(once["dropped"].values())  # each row of the second


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_the_same_bytes_come_out_whoever_does_the_work(dump: Path, tmp_path: Path) -> None:
    machines = [Machine(1), Machine(2), Machine(3)] + ([Machine(2, "ray")] if find_spec("ray") else [])
    for number, machine in enumerate(machines):
        built(tmp_path / str(number), dump, machine=machine)
    contents = [{file.name: file.read_bytes() for file in (tmp_path / str(n)).iterdir()} for n in range(len(machines))]
    assert len(contents[0]) == 6
    assert all(content == contents[0] for content in contents)


@pytest.mark.usefixtures("small_pieces")
def test_many_pieces_and_buckets_hold_what_one_holds(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = built(tmp_path / "many", dump)
    parts = store.read_manifest(tmp_path / "many").parts
    assert all(len(part.shards) > 3 for part in parts.values())
    monkeypatch.undo()
    one = built(tmp_path / "one", dump)
    assert many == one
    key = lambda question: question.id  # noqa: E731
    assert sorted(questions(tmp_path / "many"), key=key) == sorted(questions(tmp_path / "one"), key=key)


@pytest.mark.usefixtures("small_pieces")
def test_a_build_that_was_stopped_keeps_what_is_done(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path / "whole", dump)
    seen: list[str] = []
    honest, stop_after = convert.convert, 3

    def stopping(conversion: convert.Conversion, piece: Piece) -> convert.Converted:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(piece.name)
        return honest(conversion, piece)

    monkeypatch.setattr("stackllama.data.building.gathering.convert", stopping)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "stopped", dump)
    stop_after = 10**6
    built(tmp_path / "stopped", dump)
    assert len(seen) == len(set(seen)) > 6  # no piece was converted twice
    contents = [{file.name: file.read_bytes() for file in (tmp_path / n).iterdir()} for n in ("whole", "stopped")]
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("small_pieces")
def test_what_was_done_for_another_dump_is_not_gone_on_with(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackllama.data.building.build._commit", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        built(tmp_path / "out", dump)
    before = sorted((tmp_path / "out" / "work").glob("*.json"))
    assert len(before) > 6
    monkeypatch.undo()
    other = site(tmp_path / "other", [question(1), answer(2, 1, Score="0"), answer(3, 1, Score="9")])
    built(tmp_path / "out", other)
    assert [one.id for one in questions(tmp_path / "out")] == [1]


def test_what_another_version_has_done_is_not_gone_on_with(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackllama.data.building.build._commit", lambda *given: 1 / 0)
    kept = []
    for version in ("1.0", "1.0", "1.1"):
        monkeypatch.setattr(
            "stackllama.data.building.gathering.package_version", lambda _name, version=version: version
        )
        with pytest.raises(ZeroDivisionError):
            built(tmp_path, dump)
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*-posts-*.arrow")})
    assert kept[0] == kept[1]
    assert kept[1].keys() == kept[2].keys()
    assert all(kept[2][path] > kept[1][path] for path in kept[1])


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["preferences", "paired", "jsonl"])
def test_what_was_written_for_others_is_built_again(
    dump: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(tmp_path / "first", dump)
    interchange_write.write(tmp_path / "first", tmp_path / "out", format=name, render=lambda title, body: body)
    monkeypatch.setattr("stackllama.data.interchange.reading.PIECE_BYTES", 5000)  # a question's rows in several pieces
    counts = built(tmp_path / "again", tmp_path / "out", settings=replace(SETTINGS, rules=PairRules(max_pairs=100)))
    before, after = questions(tmp_path / "first"), questions(tmp_path / "again")

    def pairs(some: list[Question]) -> set[tuple[str, str, str]]:
        found = {(q.text, q.answers[p.better].text, q.answers[p.worse].text) for q in some for p in q.pairs}
        return {one for one in found if one[1] != one[2]}  # of two answers that say the same, others keep one

    assert counts["rows"] == len(after) + sum(len(one.answers) for one in after) + sum(counts["dropped"].values())
    assert pairs(after) >= pairs(before)
    if name != "preferences":  # which has scores, and so every pair again
        assert pairs(after) == pairs(before)
    if name != "jsonl":
        assert {one.site for one in after} == {SITE}
        assert {one.attribution.url for one in after} <= {one.attribution.url for one in before}


def test_a_dump_without_a_usable_pair_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    tied = site(tmp_path / "tied", [question(1), answer(2, 1), answer(3, 1)])
    with pytest.raises(DataError, match=r"no usable pair of answers in 1 questions .*tied"):
        built(tmp_path / "out", tied)
    assert not (tmp_path / "out" / store.MANIFEST).exists()
    with pytest.raises(DumpError, match="no question"):
        built(tmp_path / "out", site(tmp_path / "none", [answer(2, 1)]))


def test_documents_are_shared_out_without_loss(tmp_path: Path) -> None:
    build.write_documents(tmp_path, world_documents(200, 0), fractions={"sft": 0.9, "eval": 0.1})
    numbers = [one.id for split in ("sft", "eval") for one in store.read_documents(tmp_path, split)]
    assert sorted(numbers) == list(range(1, 201))


@pytest.mark.parametrize("name", ["x.jsonl", "blank.jsonl", "folder", "x.parquet"])
@pytest.mark.parametrize("with_dump", [False, True])
def test_preference_data_without_rows_are_named(dump: Path, tmp_path: Path, name: str, with_dump: bool) -> None:
    (tmp_path / "x.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "y.jsonl").write_text("\n")
    pq.write_table(SCHEMAS["paired"].empty_table(), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"{name} has no rows; give preference data"):
        built(tmp_path / "out", tmp_path / name, *[dump] * with_dump)


def test_a_folder_whose_name_is_no_utf8_is_built(tmp_path: Path) -> None:
    folder = site(tmp_path / os.fsdecode(b"caf\xe9"), [question(1), answer(2, 1, Score="0"), answer(3, 1, Score="9")])
    dumped = build.sources([folder])
    ledger = tmp_path / "ledger.parquet"
    build.build(dumped, tmp_path / "out", SETTINGS, ALONE, ledger=ledger, fingerprint=0)
    assert [one.site for one in questions(tmp_path / "out")] == ["caf?"]


def test_a_question_of_very_many_answers_takes_seconds(tmp_path: Path) -> None:
    answers = [answer(number, 1, Score=str(number % 50)) for number in range(2, 1300)]
    started = time.process_time()
    counts = built(tmp_path / "out", site(tmp_path / "in", [question(1), *answers]))
    assert time.process_time() - started < 5
    assert counts["notes"]["answer: beyond the most that are compared"] == 1298 - MOST_ANSWERS


def test_every_row_may_come_from_a_site_of_its_own(tmp_path: Path) -> None:
    rows = [
        {"qid": 1, "question": "q", "response_j": "j", "response_k": "k", "metadata": [f"https://s{number}.test/q/1"]}
        for number in range(12_000)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = replace(SETTINGS, clustering=Clustering())
    started = time.process_time()
    counts = built(tmp_path / "out", tmp_path / "x.jsonl", settings=settings)
    built(tmp_path / "out", tmp_path / "x.jsonl", settings=settings)  # now the ledger knows them
    assert time.process_time() - started < 15  # 30 where all rows are looked through for each site
    assert counts["rows"] == 36_000


def with_table(folder: Path, name: str, rows: list[Row]) -> Path:
    (folder / f"{name}.xml").write_bytes(table(name, rows))
    return folder


def pairs_of(one: Question) -> list[tuple[int, int, int, float]]:
    """(id of the better, id of the worse, gap, margin) of its pairs."""
    return [(one.answers[p.better].id, one.answers[p.worse].id, p.gap, p.margin) for p in one.pairs]


@pytest.mark.parametrize(("rule", "weights"), [("equal", (1, 1)), ("pairs", (3, 1)), ("votes", (np.log2(12), 3))])
def test_margins_and_weights_reach_the_store(tmp_path: Path, rule: Any, weights: tuple[float, float]) -> None:
    # log2(1 + votes): 9 gives 3.3, so 3; 2 gives 1.6, so 2; 0 gives 0; 7 gives 3. An accepted mark adds 1.
    first = [question(1), answer(2, 1, Score="9"), answer(3, 1, Score="2"), answer(4, 1, Score="0")]
    second = [question(5, AcceptedAnswerId="6"), answer(6, 5, Score="7"), answer(7, 5, Score="-1")]
    rules = PairRules(margin=0.5, weight=rule)
    built(tmp_path / "out", site(tmp_path / "in", first + second), settings=replace(SETTINGS, rules=rules))
    found = {one.id: one for one in questions(tmp_path / "out")}
    assert pairs_of(found[1]) == [(2, 3, 1, 0.5), (2, 4, 3, 1.5), (3, 4, 2, 1.0)]
    assert pairs_of(found[5]) == [(6, 7, 5, 2.5)]
    assert (found[1].weight, found[5].weight) == pytest.approx(weights)


def test_gaps_and_margins_of_stated_pairs_are_those_of_the_scores(tmp_path: Path) -> None:
    # Each letter is better than the next: A has the score 4, E 0. Nothing here doubles from step to step.
    rows = [{"prompt": "why?", "chosen": one, "rejected": other} for one, other in ("AB", "BC", "CD", "DE", "AE", "BE")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = replace(SETTINGS, rules=PairRules(margin=0.5))
    built(tmp_path / "out", tmp_path / "x.jsonl", settings=settings)
    (found,) = questions(tmp_path / "out")
    text = {one.id: one.text for one in found.answers}
    assert {(text[better] + text[worse], gap, margin) for better, worse, gap, margin in pairs_of(found)} == {
        ("AB", 1, 0.5), ("BC", 1, 0.5), ("CD", 1, 0.5), ("DE", 1, 0.5), ("AE", 4, 2.0), ("BE", 3, 1.5)
    }  # fmt: skip


@pytest.mark.parametrize("twice", [False, True])
def test_votes_are_dated_by_the_sum_of_each_day(tmp_path: Path, twice: bool) -> None:
    # Answer 2: 5 up on the 2nd, then 2 up and 1 down on the 12th: 6, of which 1 since the later answer's day. Answer 3:
    # 2 up on the 10th, then 2 up and 1 down on the 11th: 3, all of them.
    posts = [
        question(1),
        answer(2, 1, Score="6", CreationDate="2019-05-01T12:00:00.000"),
        answer(3, 1, Score="3", CreationDate="2019-05-10T12:00:00.000"),
    ]
    posts += posts[1:] if twice else []  # an answer that is read twice has its votes once
    days = {2: "02+ 02+ 02+ 02+ 02+ 12+ 12+ 12-", 3: "10+ 10+ 11+ 11+ 11-"}
    votes = [
        {"PostId": str(post), "VoteTypeId": "2" if one[2] == "+" else "3", "CreationDate": f"2019-05-{one[:2]}"}
        for post, said in days.items()
        for one in said.split()
    ]
    dump = with_table(site(tmp_path / "in", posts), "Votes", [{"Id": str(at)} | vote for at, vote in enumerate(votes)])
    rules = PairRules(score="votes", time="since_later")
    counts = built(tmp_path / "out", dump, settings=replace(SETTINGS, rules=rules))
    assert counts["notes"]["questions judged by the votes that both answers could have"] == 1
    assert [pairs_of(one) for one in questions(tmp_path / "out")] == [[(3, 2, 2, 0.0)]]
    assert counts["dropped"] == ({"post: its Id occurs twice": 2} if twice else {})


def splits_of(folder: Path) -> dict[int, str]:
    return {one.id: split for split in build.wanted(FRACTIONS) for one in store.read_questions(folder, split)}


OTHERS = replace(SETTINGS, fractions={"sft": 0.1, "reward": 0.1, "ppo": 0.1, "eval": 0.7})


def test_the_ledger_is_followed_under_other_fractions(dump: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.parquet"
    for name, settings in (("first", SETTINGS), ("again", OTHERS)):
        build.build(build.sources([dump], SITE), tmp_path / name, settings, ALONE, ledger=ledger, fingerprint=0)
    built(tmp_path / "alone", dump, settings=OTHERS)
    assert splits_of(tmp_path / "again") == splits_of(tmp_path / "first")
    assert splits_of(tmp_path / "alone") != splits_of(tmp_path / "first")


def first_in(split: str) -> int:
    return next(number for number in range(1, 1000) if assign(SITE, number, FRACTIONS) == split)


def test_a_split_of_the_ledger_stays_where_it_gets_no_share_any_more(tmp_path: Path) -> None:
    held_out, trained = first_in("eval"), first_in("sft")
    dump = site(tmp_path / "in", asked(held_out, trained))
    built(tmp_path / "out", dump)
    counts = built(tmp_path / "out", dump, settings=replace(SETTINGS, fractions={"sft": 0.5, "ppo": 0.5}))
    assert counts["rows"] == 6
    assert splits_of(tmp_path / "out") == {held_out: "eval", trained: "sft"}


def asked(*numbers: int) -> list[Row]:
    """Questions with a pair of answers each."""
    return [
        post
        for number in numbers
        for post in (
            question(number),
            answer(1000 + number, number, Score="0"),
            answer(2000 + number, number, Score="9"),
        )
    ]


def test_a_duplicate_of_a_held_out_question_that_is_gone_is_held_out(tmp_path: Path) -> None:
    held_out, new = first_in("eval"), first_in("sft")
    link = {"Id": "1", "PostId": str(new), "RelatedPostId": str(held_out), "LinkTypeId": "3"}
    before = site(tmp_path / "before", asked(held_out))
    after = with_table(site(tmp_path / "after", asked(new)), "PostLinks", [link])
    built(tmp_path / "alone", after)
    assert splits_of(tmp_path / "alone") == {new: "sft"}  # where its hash points
    built(tmp_path / "out", before)
    built(tmp_path / "out", after)
    assert splits_of(tmp_path / "out") == {new: "eval"}


def test_a_second_build_waits_for_the_ledger_of_the_first(tmp_path: Path) -> None:
    dumped, ledger = build.sources([site(tmp_path / "in", asked(1, 2))], SITE), tmp_path / "ledger.parquet"
    refused: list[str] = []

    @contextmanager
    def meanwhile(title: str, _unit: str) -> Iterator[Callable[[int, int], None]]:
        with pytest.raises(RunError, match=r"ledger\.parquet is in use.*wait for it"):
            build.build(dumped, tmp_path / "second", SETTINGS, ALONE, ledger=ledger, fingerprint=0)
        refused.append(title)
        yield lambda _done, _total: None

    build.build(dumped, tmp_path / "first", SETTINGS, ALONE, ledger=ledger, fingerprint=0, show=meanwhile)
    assert refused == ["data: converting", "data: joining", "data: writing"]
    build.build(dumped, tmp_path / "second", SETTINGS, ALONE, ledger=ledger, fingerprint=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "in", "ledger.parquet", "second"]
