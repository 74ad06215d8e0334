"""What holds over writing and reading together: a store goes out and comes back as far as the format holds it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stackllama.data.interchange.formats import FORMATS, SCHEMAS, fixed_pairs, frame, site_address, site_of, votes_for
from stackllama.data.interchange.reading import pieces, read, read_piece
from stackllama.data.interchange.rows import merge
from stackllama.data.interchange.writing import write
from stackllama.data.pairs.rules import PairRules, answer_score, pairs_by
from stackllama.data.posts import Answer, Attribution, Question
from stackllama.data.store import store
from stackllama.tokens.template import question_text, root_text
from tests.data.dumps import shared_dumps
from tests.data.reading import pair_questions, read_questions


def render(title: str, body: str) -> str:
    return root_text(question_text(title, body))


def by(kind: str, number: int, *, author: str = "Ada") -> Attribution:
    return Attribution(f"https://beer.test/{kind}/{number}", author, 7, "https://beer.test/users/7", "CC BY-SA 4.0")


def answer(number: int, text: str, votes: int, accepted: bool = False) -> Answer:
    return Answer(number, text, votes, accepted, "2020-02-03T00:00:00.000", by("a", number))


def question(number: int, answers: list[Answer], *, title: str = "T", text: str = "why?") -> Question:
    day = "2020-02-01T10:00:00.000"
    return Question("beer.test", number, title, text, ("x",), 3, day, by("q", number), tuple(answers))


words = st.text(st.characters(exclude_categories=["Cc", "Cs"], include_characters="\n\t"), min_size=1, max_size=30)
texts = words.map(str.strip).filter(bool)
scores = st.tuples(st.integers(-9, 3000), st.booleans())


@st.composite
def stores(draw: st.DrawFn) -> list[Question]:
    """Questions as a store has them, pairs included; texts of a question's answers differ, and so do questions."""
    found = []
    for number in sorted(draw(st.sets(st.integers(1, 10**12), min_size=1, max_size=5))):
        told = draw(st.lists(texts, unique=True, max_size=4))
        answers = []
        for place, text in enumerate(told):
            votes, accepted = draw(scores)
            answers.append(answer(number * 10 + place, text, votes, accepted and place == 0))
        found.append(question(number, answers, text=f"{number} {draw(texts)}", title=draw(st.just("") | texts)))
    return [fixed_pairs(one, max_pairs=99)[0] for one in found]


def there_and_back(questions: list[Question], form: str) -> list[Question]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.write_questions(folder / "store", "sft", questions)
        write(folder / "store", folder / "out", format=form, render=render)
        back, dropped = read(folder / "out", frame=frame(render))
        assert dropped == {}
        return back


def pair_texts(one: Question) -> set[tuple[str, str]]:
    return {(one.answers[pair.better].text, one.answers[pair.worse].text) for pair in one.pairs}


quick = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(stores())
def test_preferences_bring_back_questions_answers_and_scores(questions: list[Question]) -> None:
    answered = [one for one in questions if one.answers]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.write_questions(folder / "store", "sft", questions)
        write(folder / "store", folder / "out", format="preferences")
        back, dropped = read(folder / "out")
    assert dropped == ({"row: no answers": len(questions) - len(answered)} if len(answered) < len(questions) else {})
    assert [(one.site, one.id, one.text, one.date[:10]) for one in back] == [
        (one.site, one.id, one.text, one.date[:10]) for one in answered
    ]
    for old, new in zip(answered, back, strict=True):
        assert new.attribution.url == old.attribution.url
        assert new.attribution.profile_url == old.attribution.profile_url
        assert new.attribution.license == "CC BY-SA 4.0"
        for before, after in zip(old.answers, new.answers, strict=True):
            assert (after.id, after.text, after.accepted) == (before.id, before.text, before.accepted)
            assert answer_score(after.votes, after.accepted) == answer_score(before.votes, before.accepted)
            assert after.attribution.author == before.attribution.author
            assert after.attribution.author_id == before.attribution.author_id
        assert fixed_pairs(new, max_pairs=99)[0].pairs == old.pairs


@quick
@given(stores())
def test_paired_brings_back_exactly_the_pairs(questions: list[Question]) -> None:
    back = there_and_back(questions, "paired")
    expected = {(one.site, one.id): (one.text, pair_texts(one)) for one in questions if one.pairs}
    assert {(one.site, one.id): (one.text, pair_texts(one)) for one in back} == expected
    assert sum(len(one.pairs) for one in back) == sum(len(one.pairs) for one in questions)


@quick
@given(stores())
def test_jsonl_brings_back_the_question_without_its_template_and_the_pairs(questions: list[Question]) -> None:
    back = there_and_back(questions, "jsonl")
    expected = {question_text(one.title, one.text): pair_texts(one) for one in questions if one.pairs}
    assert {one.text: pair_texts(one) for one in back} == expected
    for one in back:
        for pair in one.pairs:  # the invented votes agree with what was stated
            better, worse = one.answers[pair.better], one.answers[pair.worse]
            assert answer_score(better.votes, False) - answer_score(worse.votes, False) == pair.gap


@quick
@given(stores(), st.sampled_from(["paired", "jsonl"]), st.randoms(use_true_random=False))
def test_small_pieces_in_any_order_give_the_same_questions(questions: list[Question], form: str, rng: object) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store.write_questions(folder / "store", "sft", questions)
        write(folder / "store", folder / "out", format=form, render=render)
        whole, _ = read(folder / "out")
        cut = pieces(folder / "out", piece_bytes=50)
        rng.shuffle(cut)  # type: ignore[attr-defined]
        parts: dict[tuple[str, int], list[Question]] = {}
        for piece in cut:
            for one in read_piece(piece, Counter()):
                parts.setdefault((one.site, one.id), []).append(one)
    assert [merge(parts[key]) for key in sorted(parts)] == whole


@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("score", range(-1, 63))
def test_pseudo_votes_have_the_score_again(score: int, selected: bool) -> None:
    votes = votes_for(score, selected)
    if score == 0 and selected:
        assert votes is None  # an accepted answer has at least 1
    else:
        assert votes is not None
        assert votes < 2**63
        assert answer_score(votes, selected) == score


@pytest.mark.parametrize("score", [-2, 63, 10**9])
def test_scores_that_the_rule_never_gives_have_no_votes(score: int) -> None:
    assert votes_for(score, False) is None


def test_the_schemas_are_those_of_the_published_data() -> None:
    assert SCHEMAS["preferences"].names == ["qid", "question", "answers", "date", "metadata"]
    answers = SCHEMAS["preferences"].field("answers").type.value_type
    assert [(field.name, str(field.type)) for field in answers] == [
        ("answer_id", "int64"),
        ("author", "string"),
        ("author_id", "int64"),
        ("author_profile", "string"),
        ("pm_score", "int64"),
        ("selected", "bool"),
        ("text", "string"),
    ]
    assert SCHEMAS["paired"].names == ["qid", "question", "date", "metadata", "response_j", "response_k"]
    assert SCHEMAS["paired"].field("metadata").type == pa.list_(pa.string())
    assert FORMATS == ("preferences", "paired", "jsonl")


def test_fixed_pairs_are_the_first_in_the_order_of_ids_whatever_order_the_answers_come_in() -> None:
    # scores by id: 0, 1, 2, 3, 4, 4 -> 15 pairs of positions, 14 that differ, 10 stay
    told = [answer(number, f"a{number}", votes) for number, votes in enumerate([0, 1, 3, 7, 15, 15])]
    paired, counts = fixed_pairs(question(1, told[::-1]))
    assert [one.id for one in paired.answers] == [0, 1, 2, 3, 4, 5]
    first_ten = [two for two in combinations(range(6), 2) if two != (4, 5)][:10]
    assert [(pair.worse, pair.better) for pair in paired.pairs] == first_ten
    assert [pair.gap for pair in paired.pairs[:5]] == [1, 2, 3, 4, 4]
    assert counts == {"pairs kept": 10, "pair: tied score": 1, "pair: over the limit of pairs a question": 4}


def test_a_tied_question_gets_no_pair_of_the_question_before_it(tmp_path: Path) -> None:
    first = question(1, [answer(1, "one", 0), answer(2, "two", 5)])
    tied = question(2, [answer(3, "three", 1), answer(4, "four", 1)], text="tied")
    store.write_questions(tmp_path / "store", "sft", [first, tied])
    write(tmp_path / "store", tmp_path / "out", format="paired", fixed_order=True)
    back, _ = read(tmp_path / "out")
    assert [(one.id, pair_texts(one)) for one in back] == [(1, {("two", "one")})]


def test_the_frame_of_the_template_is_found_and_sites_survive_their_addresses() -> None:
    assert frame(render) == ("Question: ", "\n\nAnswer:")
    for site in ("beer.stackexchange.com", "a b/ü", "embedded", "localhost:80"):
        assert site_of(site_address(site) + "/q/1") == ("" if "/" in site else site)


@pytest.mark.dumps
def test_a_real_dump_goes_through_every_format(tmp_path: Path) -> None:
    name = "beer.stackexchange.com.7z"
    expected = json.loads((shared_dumps() / "expected.json").read_text())[name]
    questions, _ = read_questions(shared_dumps() / name)
    capped, _ = pair_questions(questions, PairRules())
    store.write_questions(tmp_path / "store", "sft", capped)
    back = {}
    for form in FORMATS:
        write(tmp_path / "store", tmp_path / form, format=form, render=render)
        back[form], dropped = read(tmp_path / form, frame=frame(render))
        assert dropped == ({"row: no answers": 42} if form == "preferences" else {})  # questions without any answer
    scored = [[answer_score(one.votes, one.accepted) for one in asked.answers] for asked in back["preferences"]]
    assert sum(len(pairs_by(one)) for one in scored) == expected["pairs_by_score_rule"]
    for form in ("paired", "jsonl"):
        assert sum(len(one.pairs) for one in back[form]) == expected["pairs_by_score_rule_capped_at_10"]
        assert len(back[form]) == expected["questions_by_score_rule"]
    again, _ = pair_questions(back["preferences"], PairRules())
    assert {one.id: one.pairs for one in again if one.pairs} == {one.id: one.pairs for one in capped if one.pairs}
    write(tmp_path / "store", tmp_path / "fixed", format="paired", fixed_order=True)
    fixed, _ = read(tmp_path / "fixed")
    assert sum(len(one.pairs) for one in fixed) == expected["pairs_by_score_rule_capped_at_10"]
