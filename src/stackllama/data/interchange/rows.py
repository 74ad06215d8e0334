"""Rows of the three formats, from anybody, to questions.

A row is judged on its own: what cannot be used is dropped under a named reason, never an error. Texts lose control
characters and the white space at their ends; CRLF becomes LF.

Where a row is a pair, the rows of one question (of one prompt) are put together: equal texts are one answer, each
stated pair stays, once. Such answers have no votes. They get pseudo-votes from the pairs: the score of an answer is the
length of the longest chain of answers below it, so that the score rule puts the better one of each pair above the worse
one (unless pairs contradict each other in a circle).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from stackllama.data.interchange.formats import site_address, site_of, votes_for
from stackllama.data.posts import TOO_LONG, Answer, Attribution, Pair, Question, body_text, license_of

MAX_TEXT = 1_000_000
"""Characters of a text; the largest post of Stack Exchange has some 60,000."""
MAX_ANSWERS = 1000
"""Answers to a question; a hostile file could have as many as it has rows."""
WINDOW = 32_000_000
"""Characters of rows that are held to be put together; beyond that a question comes out in parts (see `merge`)."""

ANONYMOUS = "anonymous"
UNKNOWN = "unknown"
SAME_PAIR = "row: the same pair was there before"

_WHOLE = 2**63
_BEST_LEVEL = 40
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_DAY = re.compile(r"(\d{4})[/-](\d\d)[/-](\d\d)", re.ASCII)
# A post's HTML begins with one of these, almost always with <p>; Markdown that does, and closes it too, is rare.
_HTML = re.compile(r"\s*<(p|pre|ul|ol|h[1-6]|blockquote|div|table)\b[^<>]*>", re.IGNORECASE)

Row = Mapping[str, Any]
Frame = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """What a row does not say itself: the site where it names none, what stands around a prompt (`interchange.frame`),
    and whether texts are known to be Markdown.
    """

    site: str
    frame: Frame = ("", "")
    markdown: bool = False


class _RowError(Exception):
    """A row, or an answer in it, cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _PairRow:
    question: Question
    better: str
    worse: str


def from_preferences(rows: Iterable[Row], source: Source, dropped: Counter[str]) -> Iterator[Question]:
    """A question for each row, with its answers by id and no pairs; adds to `dropped` what was left out, by reason.

    Votes are those of `interchange.votes_for`, so `preferences.answer_score` gives each answer its pm_score again. The
    Hub's data set holds HTML (it is the pairs that were made of it which are Markdown); a row of HTML is converted.
    """
    for row in rows:
        try:
            yield _scored_question(row, source, dropped)
        except _RowError as reason:
            dropped[str(reason)] += 1


def from_paired(rows: Iterable[Row], source: Source, dropped: Counter[str]) -> Iterator[Question]:
    """The questions of rows that are pairs, see the top of this file."""
    return _gathered((_paired, rows), source, dropped)


def from_jsonl(rows: Iterable[Row], source: Source, dropped: Counter[str]) -> Iterator[Question]:
    """The questions of rows {prompt, chosen, rejected}, see the top of this file. Ids are hashes of the texts."""
    return _gathered((_prompted, rows), source, dropped)


READERS = {"preferences": from_preferences, "paired": from_paired, "jsonl": from_jsonl}
"""Format -> the function that turns its rows into questions."""


def merge(parts: Sequence[Question]) -> Question:
    """One question out of parts of it that came out of different pieces, whatever their order.

    Answers are united by their text, pairs by the texts of their two sides; pseudo-votes are reckoned again.
    """
    if len(parts) == 1:
        return parts[0]
    head = max((replace(part, answers=(), pairs=()) for part in parts), key=repr)
    answers: dict[str, Answer] = {}
    for answer in (answer for part in parts for answer in part.answers):
        there = answers.get(answer.text)
        answers[answer.text] = answer if there is None else max(there, answer, key=repr)
    pairs = {(part.answers[pair.better].text, part.answers[pair.worse].text) for part in parts for pair in part.pairs}
    return _with_pairs(head, answers, pairs)


def _scored_question(row: Row, source: Source, dropped: Counter[str]) -> Question:
    text = _text(row.get("question"), "question")
    number = _id(row.get("qid"), "row: no qid, or not a whole number")
    site, by, date = _origin(row, source)
    given = row.get("answers")
    if not isinstance(given, list) or not given:
        raise _RowError("row: no answers")
    html = not source.markdown and _is_html([text, *(one.get("text") for one in given if isinstance(one, dict))])
    answers: dict[int, Answer] = {}
    texts: set[str] = set()
    for one in given[:MAX_ANSWERS]:
        try:
            answer = _scored_answer(one, site, date, html, dropped)
            _check_new(answer, answers, texts)
        except _RowError as reason:
            dropped[str(reason)] += 1
        else:
            answers[answer.id] = answer
            texts.add(answer.text)
    if len(given) > MAX_ANSWERS:
        dropped[f"answer: over {MAX_ANSWERS} to a question"] += len(given) - MAX_ANSWERS
    if not answers:
        raise _RowError("row: no answers")
    text = _converted(text, "row: question")[0] if html else text
    if not text:
        raise _RowError("row: no question")
    return _question(site, number, text, date, by, tuple(answers[key] for key in sorted(answers)))


def _check_new(answer: Answer, answers: Mapping[int, Answer], texts: set[str]) -> None:
    if answer.text in texts:
        raise _RowError("answer: its text was there before")
    if answer.id in answers:
        raise _RowError("answer: its answer_id was there before")


def _scored_answer(given: Any, site: str, date: str, html: bool, dropped: Counter[str]) -> Answer:
    if not isinstance(given, dict):
        raise _RowError("answer: not a record")
    text = _text(given.get("text"), "text", "answer")
    number = _id(given.get("answer_id"), "answer: no answer_id, or not a whole number")
    score = _id(given.get("pm_score"), "answer: no pm_score, or not a whole number")
    selected = given.get("selected") is True
    votes = votes_for(score, selected)
    if votes is None and selected and score == 0:
        dropped["accepted mark: pm_score is 0, which no accepted answer has"] += 1
        selected, votes = False, votes_for(score, False)
    if votes is None:
        raise _RowError("answer: a pm_score that the score rule never gives")
    markdown, length = _converted(text, "answer: text") if html else (text, None)
    if not markdown:
        raise _RowError("answer: no text")
    by = Attribution(
        url=f"{site_address(site)}/a/{number}",
        author=_name(given.get("author")),
        author_id=_id(given["author_id"], "") if _is_whole(given.get("author_id")) else None,
        profile_url=_short(given.get("author_profile")) or None,
        license=_answer_license(date),
    )
    return Answer(number, markdown, votes, selected, date, by, length)


def _converted(html: str, what: str) -> tuple[str, int]:
    if (found := body_text(html)) is None:
        raise _RowError(TOO_LONG.format(what))
    return found


def _paired(row: Row, source: Source) -> _PairRow:
    text = _text(row.get("question"), "question")
    number = _id(row.get("qid"), "row: no qid, or not a whole number")
    better, worse = _sides(row, "response_j", "response_k")
    site, by, date = _origin(row, source)
    return _PairRow(_question(site, number, text, date, by, ()), better, worse)


def _prompted(row: Row, source: Source) -> _PairRow:
    prompt = _text(row.get("prompt"), "prompt")
    better, worse = _sides(row, "chosen", "rejected")
    before, after = source.frame
    if prompt.startswith(before) and prompt.endswith(after) and len(prompt) > len(before) + len(after):
        prompt = prompt[len(before) : len(prompt) - len(after)].strip() or prompt
    by = Attribution("", ANONYMOUS, None, None, UNKNOWN)
    return _PairRow(_question(source.site, _hash(prompt), prompt, "", by, ()), better, worse)


def _sides(row: Row, better: str, worse: str) -> tuple[str, str]:
    sides = _text(row.get(better), better), _text(row.get(worse), worse)
    if sides[0] == sides[1]:
        raise _RowError(f"row: {better} and {worse} are the same")
    return sides


def _gathered(read: tuple[Any, Iterable[Row]], source: Source, dropped: Counter[str]) -> Iterator[Question]:
    """Rows of pairs put together to questions, in the order in which each first occurs."""
    parse, rows = read
    heads: dict[tuple[str, int], Question] = {}
    texts: dict[tuple[str, int], dict[str, None]] = {}
    pairs: dict[tuple[str, int], set[tuple[str, str]]] = {}
    held = 0
    for row in rows:
        try:
            one: _PairRow = parse(row, source)
            key = (one.question.site, one.question.id)
            mine = texts.setdefault(key, {})
            sides = (one.better, one.worse)
            _check_room(sides, mine, pairs.get(key, set()))
        except _RowError as reason:
            dropped[str(reason)] += 1
            continue
        heads.setdefault(key, one.question)
        mine.update(dict.fromkeys(sides))
        pairs.setdefault(key, set()).add(sides)
        held += len(one.question.text) + len(one.better) + len(one.worse)
        if held > WINDOW:
            yield from (_built(heads[key], texts[key], pairs[key]) for key in heads)
            heads, texts, pairs, held = {}, {}, {}, 0
    yield from (_built(heads[key], texts[key], pairs[key]) for key in heads)


def _check_room(sides: tuple[str, str], texts: Mapping[str, None], pairs: set[tuple[str, str]]) -> None:
    if len(texts) + sum(side not in texts for side in sides) > MAX_ANSWERS:
        raise _RowError(f"row: over {MAX_ANSWERS} answers to a question")
    if sides in pairs:
        raise _RowError(SAME_PAIR)


def _built(head: Question, texts: Iterable[str], pairs: set[tuple[str, str]]) -> Question:
    by = replace(head.attribution, author=ANONYMOUS, author_id=None, profile_url=None)
    by = replace(by, license=UNKNOWN if not head.date else _answer_license(head.date))
    return _with_pairs(head, {text: Answer(_hash(text), text, 0, False, head.date, by) for text in texts}, pairs)


def _with_pairs(head: Question, by_text: Mapping[str, Answer], pairs: set[tuple[str, str]]) -> Question:
    """The question with its answers by id and its pairs in their order; pseudo-votes where pairs are stated."""
    answers = sorted(by_text.values(), key=lambda answer: (answer.id, answer.text))
    if not pairs:
        return replace(head, answers=tuple(answers))
    place = {answer.text: number for number, answer in enumerate(answers)}
    edges = sorted((place[better], place[worse]) for better, worse in pairs)
    levels = _levels(len(answers), edges)
    voted = (replace(answer, votes=2**level - 1) for answer, level in zip(answers, levels, strict=True))
    stated = (Pair(better, worse, max(1, levels[better] - levels[worse])) for better, worse in edges)
    return replace(head, answers=tuple(voted), pairs=tuple(stated))


def _levels(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """For each answer the longest chain of worse ones below it, at most _BEST_LEVEL; circles end a chain."""
    above: list[list[int]] = [[] for _ in range(count)]
    open_below = [0] * count
    for better, worse in edges:
        above[worse].append(better)
        open_below[better] += 1
    levels = [0] * count
    ready = [number for number in range(count) if not open_below[number]]
    for number in ready:  # grows while it is walked
        for better in above[number]:
            levels[better] = max(levels[better], min(levels[number] + 1, _BEST_LEVEL))
            open_below[better] -= 1
            if not open_below[better]:
                ready.append(better)
    return levels


def _origin(row: Row, source: Source) -> tuple[str, Attribution, str]:
    """Site, attribution and date of a question, from `metadata` (its URL, its site's, its asker's) and `date`."""
    given = row.get("metadata")
    links = [_short(link) for link in given[:3]] if isinstance(given, list) else []
    url, address, profile = [*links, "", "", ""][:3]
    day = _DAY.fullmatch(_short(row.get("date")))
    date = f"{day[1]}-{day[2]}-{day[3]}T00:00:00.000" if day else ""
    by = Attribution(url, ANONYMOUS, None, profile or None, license_of(date[:10]) if date else UNKNOWN)
    return site_of(address) or site_of(url) or source.site, by, date


def _answer_license(date: str) -> str:
    """The licence of an answer of which only the question's date is known: certain once 4.0 was in force."""
    if not date:
        return UNKNOWN
    newest = license_of("9999-12-31")
    return newest if license_of(date[:10]) == newest else newest.rpartition(" ")[0]


def _question(site: str, number: int, text: str, date: str, by: Attribution, answers: tuple[Answer, ...]) -> Question:
    return Question(site, number, "", text, (), 0, date, by, answers)


def _text(value: Any, what: str, where: str = "row") -> str:
    if value is None:
        raise _RowError(f"{where}: no {what}")
    if not isinstance(value, str):
        raise _RowError(f"{where}: {what} is not text")
    if len(value) > MAX_TEXT:
        raise _RowError(f"{where}: {what} has over {MAX_TEXT} characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _RowError(f"{where}: {what} has half a character (a lone surrogate)") from error
    if _CONTROL.search(value):
        value = _CONTROL.sub("", value.replace("\r\n", "\n").replace("\r", "\n"))
    text: str = value.strip()
    if not text:
        raise _RowError(f"{where}: no {what}")
    return text


def _short(value: Any) -> str:
    """An address, a date or a name; nothing where it is not text or cannot be one."""
    try:
        return _text(value, "")[:2000]
    except _RowError:
        return ""


def _name(value: Any) -> str:
    return " ".join(_short(value).split()) or ANONYMOUS


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_WHOLE <= value < _WHOLE


def _id(value: Any, reason: str) -> int:
    if not _is_whole(value):
        raise _RowError(reason)
    return int(value)


def _is_html(texts: Iterable[Any]) -> bool:
    for text in texts:
        opened = _HTML.match(text) if isinstance(text, str) else None
        if opened and f"</{opened[1].lower()}>" in text.lower():
            return True
    return False


def _hash(text: str) -> int:
    """62 bits of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8, person=b"interchange").digest(), "big") >> 2
