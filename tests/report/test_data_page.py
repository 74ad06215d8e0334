"""The page of data: what it says, that it needs nothing from outside, and that no text of a stranger becomes markup."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.data.small_store import FIRST, by, write
from tests.report.test_tables import REPORT

from stackllama.data.posts import Question
from stackllama.data.store import store
from stackllama.data.store.census import take
from stackllama.data.store.opening import Opened
from stackllama.data.store.picking import Picked, sample
from stackllama.errors import RunError
from stackllama.report import data_page
from stackllama.report.data_page import render, write_page

HOSTILE = (
    "</div><script>alert(1)</script><img src=x onerror=alert(2)> [a](javascript:alert(3)) {{ 7 * 7 }} &lt;b&gt; "
    "\x1b[31m \u202eturned ![i](http://evil.test/i.png)"
)


class Seen(HTMLParser):
    """Tags, ids, attributes and policies of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""


def page_of(folder: Path, **changes: object) -> str:
    opened = Opened(str(folder), "run", folder, REPORT, rebuilt=False)
    return render(replace(opened, **changes), take(folder), sample(folder, 10, 0), seed=0)  # type: ignore[arg-type]


def words(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page.partition("<body>")[2])))


def hostile() -> Question:
    attribution = replace(by("javascript:alert(4)", HOSTILE), author=HOSTILE, profile_url="data:text/html,x")
    answers = tuple(replace(one, text=HOSTILE, attribution=attribution) for one in FIRST.answers)
    return replace(
        FIRST, title=HOSTILE, text=HOSTILE, tags=(HOSTILE,), attribution=attribution, answers=answers, site=HOSTILE
    )


def test_the_page_tells_all_of_it(tmp_path: Path) -> None:
    page = page_of(write(tmp_path))
    places = [page.index(f'id="{name}"') for name in re.findall(r'<a href="#([\w-]+)">', page)]
    assert len(places) == 7
    assert places == sorted(places)
    text = words(page)
    for told in (
        "questions with a pair 2 (66.7%)",
        "length of an answer 15.0 8 8 10 10 17 30 30",
        "answer: its question is not there 3",
        "together 13",
        "the pairs as they are here 2 3 0.750 ± 0.177 0.500 ± 0.354",
        "2 of the 2 questions that have a pair, drawn by the seed 0",
        "Answer 1 · 3 votes · 2010-03-02 · ✓ accepted",
        "better than 2 (score gap 3, margin 1.5)",
        "5 votes · 2010-03-01 · split sft · weight 2 · x, y · Ada , CC BY-SA 2.5 · https://a.test/q/1",
    ):
        assert told in text, told
    assert page.count("<article>") == 2
    assert page.count('<div class="answer">') == 5
    assert page.count('class="plot"') == 10  # answers, pairs, years; 2 of lengths, 2 of votes, gaps; 2 of baselines
    assert '<a href="https://a.test/a/11" rel="noopener noreferrer nofollow">https://a.test/a/11</a>' in page


def test_it_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(write(tmp_path))
    seen = Seen(page)
    assert seen.policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert not {"script", "link", "iframe", "object", "img", "image", "base", "form"} & set(seen.tags)
    assert not [key for key, _ in seen.attributes if key.startswith("on") or key in ("src", "srcset", "action")]
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [value for key, value in seen.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    store.write_questions(tmp_path, "sft", [hostile()])
    page = page_of(tmp_path, path=HOSTILE, kind=HOSTILE, report={**REPORT, "notes": {HOSTILE: 1}})
    seen = Seen(page)
    assert not {"script", "img"} & set(seen.tags)
    links = {value for key, value in seen.attributes if key == "href" and not value.startswith("#")}
    assert links == {"http://evil.test/i.png"}
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert "{{ 7 * 7 }}" in html.unescape(page)
    # title, texts of four posts, tag, site, author and licence of four posts, path, kind, note
    assert words(page).count("[U+202E]turned") >= 15


def test_what_is_too_long_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_page, "ANSWERS_LIMIT", 2)
    monkeypatch.setattr(data_page, "PAGE_LIMIT", 50_000)
    long = replace(FIRST, text="a" * 20_007)
    store.write_questions(tmp_path, "sft", [replace(long, id=number) for number in range(1, 6)])
    page = page_of(tmp_path)
    assert page.count("<article>") == 2
    text = words(page)
    assert "2 of the 5 questions" in text
    assert "3 more were drawn but are too long to be shown here" in text
    assert text.count("7 more characters are not shown.") == 2
    assert text.count("1 more answers are not shown.") == 2


def test_a_store_without_pairs_and_dates_has_a_page(tmp_path: Path) -> None:
    bare = replace(FIRST, pairs=(), tags=(), date="", answers=())
    store.write_questions(tmp_path, "sft", [bare])
    page = page_of(tmp_path, report={})
    text = words(page)
    assert "No question has a pair." in text
    assert "the pairs as they are here 0 0 - -" in text
    assert "No text has a date" in text


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    assert page_of(tmp_path) == page_of(tmp_path)


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "store")
    opened, census = Opened("x", "run", folder, {}, rebuilt=False), take(folder)
    write_page(tmp_path / "page.html", opened, census, [Picked(FIRST, "sft")], seed=0)
    first = (tmp_path / "page.html").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="full"):
        write_page(tmp_path / "page.html", opened, census, [], seed=0)
    assert (tmp_path / "page.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "store"]
