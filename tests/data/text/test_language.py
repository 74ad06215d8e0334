"""A site's language is told by a sample that does not depend on how the dump is cut; foreign posts can be dropped."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from stackllama.data.text import language
from stackllama.data.text.language import (
    OTHER_LANGUAGE,
    detect,
    in_own_language,
    look,
    own_languages,
    told,
    write_sample,
)
from tests.data.cleaned import post, posts_table

ENGLISH = (
    "I have been trying to brew beer at home for some months now, and every time the foam falls apart within a minute. "
    "Is there anything about the temperature of the glass that I should know before I try again?"
)
GERMAN = (
    "Seit einigen Monaten versuche ich, zu Hause Bier zu brauen, und jedes Mal fällt der Schaum nach einer Minute in "
    "sich zusammen. Gibt es etwas über die Temperatur des Glases, das ich wissen sollte, bevor ich es wieder versuche?"
)
RUSSIAN = (
    "Уже несколько месяцев я пытаюсь варить пиво дома, и каждый раз пена исчезает через минуту. Есть ли что-нибудь о "
    "температуре стакана, что мне следует знать, прежде чем я попробую снова?"
)
JAPANESE = (
    "数か月前から自宅でビールを醸造しようとしていますが、毎回一分ほどで泡が消えてしまいます。もう一度試す前に知っておくべき"
    "グラスの温度についての注意点はありますか。また、瓶の保存方法についても教えていただけると助かります。よろしくお願いします。"
)
CODE = "```\nfor (int i = 0; i < n; i++) { total += values[i] * weights[i]; }\n```\n\n$$\\sum_i v_i w_i$$"


@pytest.mark.parametrize(("text", "code"), [(ENGLISH, "en"), (GERMAN, "de"), (RUSSIAN, "ru"), (JAPANESE, "ja")])
def test_a_language_is_told_with_code_around_it(text: str, code: str) -> None:
    assert detect(text) == code
    assert detect(f"{CODE}\n\n{text} `x = y`\n\n{CODE}") == code


@pytest.mark.parametrize(
    "text", ["", "Thank you very much!", "Danke, das hat mir sehr geholfen.", CODE * 5, "1 2 3 " * 99]
)
def test_of_short_texts_and_of_code_nothing_is_said(text: str) -> None:
    assert detect(text) is None


def questions(count: int, texts: list[str]) -> list[tuple[int, str]]:
    return [(number, texts[number % len(texts)]) for number in range(1, count + 1)]


def sampled(folder: Path, parts: list[list[tuple[int, str]]], site: str = "beer") -> list[Path]:
    folder.mkdir()
    paths = []
    for number, part in enumerate(parts):
        posts = [post(key, text, "A title") for key, text in part]
        posts += [post(key + 10_000, RUSSIAN, parent=key) for key, _ in part]  # answers are not looked at
        paths.append(folder / f"{number:03}.sample")
        write_sample(posts_table(posts, site), paths[-1])
    return paths


def test_the_sample_is_the_same_however_the_posts_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SAMPLE", 20)
    posts = questions(90, [ENGLISH, ENGLISH, GERMAN])
    whole = look(sampled(tmp_path / "whole", [posts]))
    random.Random(0).shuffle(posts)
    cut = look(sampled(tmp_path / "cut", [posts[:5], [], posts[5:33], posts[20:], posts[:1]]))
    assert whole == cut
    assert whole["beer"]["questions"] == 20
    assert whole["beer"]["language"] == "en"
    assert 0.3 < whole["beer"]["share"] < 1
    assert sum(whole["beer"]["shares"].values()) == pytest.approx(1, abs=1e-3)


def test_each_site_has_its_own(tmp_path: Path) -> None:
    paths = sampled(tmp_path / "a", [questions(8, [GERMAN])], "german")
    paths += sampled(tmp_path / "b", [questions(8, [ENGLISH])], "english")
    paths += sampled(tmp_path / "c", [questions(8, ["Why?", CODE])], "short")
    found = look(paths)
    assert {site: one["language"] for site, one in found.items()} == {"german": "de", "english": "en", "short": None}
    assert told(found["german"]) == "language de, 100.0% of the 8 questions looked at"
    assert told(found["short"]) == "its language is not clear: no question has enough prose"


def test_no_questions_are_no_error(tmp_path: Path) -> None:
    assert look(sampled(tmp_path / "none", [[]])) == {}


def test_languages_of_a_tenth_of_the_questions_are_a_sites_own() -> None:
    report = {"language": "ru", "share": 0.6, "questions": 100, "shares": {"ru": 0.6, "en": 0.31, "uk": 0.09}}
    unclear: language.Report = {"language": None, "share": None, "questions": 0, "shares": {}}
    assert own_languages({"a": report, "b": unclear}) == {"a": {"ru", "en"}, "b": frozenset()}


def test_posts_that_are_clearly_in_another_language_are_dropped_and_counted() -> None:
    texts = [ENGLISH, GERMAN, "Danke!", CODE, RUSSIAN, f"{ENGLISH}\n\n> Ein kurzes Zitat auf Deutsch."]
    table = posts_table([post(number, text, parent=number % 2 or None) for number, text in enumerate(texts, 1)], "beer")
    dropped: Counter[str] = Counter()
    kept = in_own_language(table, {"beer": frozenset({"en"})}, dropped)
    assert kept["id"].to_pylist() == [1, 3, 4, 6]
    assert dropped == {OTHER_LANGUAGE: 2}
    for own in ({"beer": frozenset({"en", "de", "ru"})}, {"beer": frozenset[str]()}, {}):
        assert in_own_language(table, own, dropped).num_rows == 6
    assert isinstance(kept, pa.Table)


def test_the_title_counts_for_a_question() -> None:
    table = posts_table([post(1, "Siehe Titel.", GERMAN)], "beer")
    assert in_own_language(table, {"beer": frozenset({"en"})}, Counter()).num_rows == 0


def test_each_question_may_be_of_a_site_of_its_own(tmp_path: Path) -> None:
    count = 150_000
    made = posts_table([post(number, text="words") for number in range(1, 101)], "beer")
    many = pa.concat_tables([made] * (count // 100)).combine_chunks()
    sites = pa.array([f"s{number}" for number in range(count)])
    started = time.process_time()
    write_sample(many.set_column(0, many.schema.field("site"), sites), tmp_path / "x.sample")
    assert time.process_time() - started < 4  # 12, were all questions looked through for each site
    assert pa.ipc.open_file(tmp_path / "x.sample").read_all().num_rows == count
