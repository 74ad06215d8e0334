"""Rows of Posts, Users, Votes and PostLinks as columns: judged, and converted.

Every row is judged on its own: what becomes of it depends on nothing but its attributes. What is left out is counted
under the first reason that holds.

Legend: N rows that were given, K rows that are kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stackllama.data.building.shuffle import POSTS
from stackllama.data.dump.attributes import Attributes
from stackllama.data.pairs.votes import CHANGES, day_number
from stackllama.data.posts import LONGEST_FIELD, TOO_LONG, body_text, license_of

FABRICATED = (1000000001, 1000000010)
"""Ids of rows that some dumps of 2025-06-30 hold and no site ever had."""

USERS = pa.schema({"id": pa.int64(), "name": pa.string()})
VOTES = pa.schema({"id": pa.int64(), "day": pa.int32(), "change": pa.int32()})
LINKS = pa.schema({"id": pa.int64(), "related": pa.int64(), "kind": pa.int32()})

_WHOLE = r"^-?[0-9]{1,18}$"
_UNSIGNED = r"^[0-9]{1,18}$"
_DATE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z?", re.ASCII)
_USUAL_DATE = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}$"
_TAGS = re.compile(r"[^<>|]+")
_SHORT = ("Title", "Tags", "OwnerDisplayName", "ContentLicense")

_LONG = f"{{}}: over {LONGEST_FIELD} signs in a {{}}"

Mask = NDArray[np.bool_]


class _Judgement:
    """Which of some rows stay (`kept_N`); the others are counted, each once."""

    def __init__(self, rows: int, dropped: Counter[str]) -> None:
        self.kept_N = np.ones(rows, bool)
        self.dropped = dropped

    def drop(self, wrong_N: Mask, reason: str | None) -> None:
        """Leaves out what is wrong of the rows that are still there; without a reason it is not counted."""
        wrong_N = wrong_N & self.kept_N
        if wrong_N.any():
            self.kept_N &= ~wrong_N
            if reason is not None:
                self.dropped[reason] += int(np.count_nonzero(wrong_N))

    def drop_kept(self, wrong_K: Sequence[bool], reason: str) -> None:
        """Leaves out what is wrong of the rows that are still there, told of these alone."""
        wrong_N = np.zeros_like(self.kept_N)
        wrong_N[self.kept_N] = wrong_K
        self.drop(wrong_N, reason)

    def kept(self, column: pa.Array) -> pa.Array:
        """A column (N,) of the rows that stay (K,)."""
        return column.filter(pa.array(self.kept_N))


def parse_posts(given: Attributes, site: str, dropped: Counter[str]) -> pa.Table:
    """The questions and answers among rows of Posts, in the schema `shuffle.POSTS`."""
    judgement = _Judgement(given.rows, dropped)
    kind = given.column("PostTypeId")
    asks_N = _is(kind, "1")
    _drop_other_kinds(kind, asks_N | _is(kind, "2"), judgement)
    number, votes, parent = (_whole(given.column(name)) for name in ("Id", "Score", "ParentId"))
    judgement.drop(_null(number) | _holds(pc.less(number, 1)), "post: no Id, or not a whole number")
    judgement.drop(_holds(pc.is_in(number, pa.array(FABRICATED))), "post: fabricated row")
    judgement.drop(_null(votes), "post: no Score, or not a whole number")
    judgement.drop(~asks_N & _null(parent), "answer: no ParentId, or not a whole number")
    date = _moments(given.column("CreationDate"))
    judgement.drop(_null(date), "post: no CreationDate, or not a date")
    short = [given.column(name) for name in _SHORT]
    judgement.drop(np.logical_or.reduce([_is_long(column) for column in short]), _LONG.format("post", "field"))
    text, length = _texts(given.column("Body"), judgement)
    asks = judgement.kept(pa.array(asks_N))
    number, date = judgement.kept(number), judgement.kept(date)
    title, tags, owner_name, terms = (pc.fill_null(judgement.kept(column), "").to_pylist() for column in short)
    days = pc.utf8_slice_codeunits(date, 0, 10).to_pylist()
    asked = asks.to_pylist()
    columns = {
        "site": pa.repeat(pa.scalar(site), len(number)),
        "id": number,
        "question": pc.if_else(asks, number, judgement.kept(parent)),
        "answers": pc.invert(asks),
        "accepted_answer": _where(asks, _whole(judgement.kept(given.column("AcceptedAnswerId")))),
        "title": [one.strip() if question else "" for one, question in zip(title, asked, strict=True)],
        "tags": [_TAGS.findall(one) if question else [] for one, question in zip(tags, asked, strict=True)],
        "text": text,
        "length": length,
        "votes": judgement.kept(votes),
        "date": date,
        "owner": _whole(judgement.kept(given.column("OwnerUserId"))),
        "owner_name": [name.strip() for name in owner_name],
        "license": [one.strip() or license_of(day) for one, day in zip(terms, days, strict=True)],
    }
    nothing = pa.nulls(len(number))
    return pa.table([columns.get(field.name, nothing) for field in POSTS], schema=POSTS)


def parse_users(given: Attributes, dropped: Counter[str]) -> pa.Table:
    """Ids and display names of rows of Users."""
    judgement = _Judgement(given.rows, dropped)
    number, name = _whole(given.column("Id")), given.column("DisplayName")
    judgement.drop(_null(number), "user: no Id, or not a whole number")
    judgement.drop(_is_long(name), _LONG.format("user", "name"))  # it goes to each post of this user
    names = [" ".join(one.split()) for one in pc.fill_null(name, "").to_pylist()]
    judgement.drop(np.array([not one for one in names], bool), "user: no DisplayName")
    return pa.table([judgement.kept(number), judgement.kept(pa.array(names, pa.string()))], schema=USERS)


def parse_votes(given: Attributes, dropped: Counter[str]) -> pa.Table:
    """The votes up and down among rows of Votes: post, day since 1970-01-01, and what the vote changes."""
    judgement = _Judgement(given.rows, dropped)
    kind = given.column("VoteTypeId")
    change_N = np.select([_is(kind, one) for one in CHANGES], list(CHANGES.values()), 0)
    judgement.drop(change_N == 0, None)
    post, day = _whole(given.column("PostId"), _UNSIGNED), _days(given.column("CreationDate"))
    judgement.drop(_null(post), "vote: no PostId, or not a whole number")
    judgement.drop(_null(day), "vote: no CreationDate, or not a date")
    return pa.table([*map(judgement.kept, (post, day, pa.array(change_N, pa.int32())))], schema=VOTES)


def parse_links(given: Attributes, dropped: Counter[str]) -> pa.Table:
    """Rows of PostLinks: post, related post, kind."""
    judgement = _Judgement(given.rows, dropped)
    columns = [_whole(given.column(name)) for name in ("PostId", "RelatedPostId", "LinkTypeId")]
    wrong_N = np.logical_or.reduce([_null(column) for column in columns])
    wrong_N |= ~_holds(pc.and_(pc.greater_equal(columns[2], 0), pc.less(columns[2], 2**31)))
    judgement.drop(wrong_N, "link: no PostId, RelatedPostId or LinkTypeId, or not a whole number")
    return pa.table([judgement.kept(column) for column in columns], LINKS.names).cast(LINKS)


def _drop_other_kinds(kind: pa.Array, wanted_N: Mask, judgement: _Judgement) -> None:
    judgement.drop(~wanted_N, None)
    for one, count in Counter(pc.fill_null(kind.filter(pa.array(~wanted_N)), "").to_pylist()).items():
        known = re.fullmatch(_WHOLE, one)
        reason = f"post: PostTypeId {one} is neither question nor answer" if known else "post: no PostTypeId"
        judgement.dropped[reason] += count


def _texts(body: pa.Array, judgement: _Judgement) -> tuple[list[str], list[int]]:
    """The bodies that stay of those given (N,): as Markdown (K,), and the lengths that a reader sees."""
    judgement.drop(_null(body), "post: no Body")
    found = [body_text(html) for html in judgement.kept(body).to_pylist()]
    judgement.drop_kept([one is None for one in found], TOO_LONG.format("post: Body"))
    there = [one for one in found if one is not None]
    judgement.drop_kept([not text for text, _ in there], "post: empty Body")
    return [text for text, _ in there if text], [length for text, length in there if text]


def _whole(column: pa.Array, pattern: str = _WHOLE) -> pa.Array:
    """Whole numbers; null where there is none."""
    plain = pc.and_(pc.ascii_is_decimal(column), pc.less_equal(pc.binary_length(column), 18))
    if pc.all(plain, min_count=0).as_py():  # which is told faster
        return column.cast(pa.int64())
    return _where(pc.match_substring_regex(column, pattern), column).cast(pa.int64())


def _moments(column: pa.Array) -> pa.Array:
    """Dates as "2012-01-31T12:00:00.000"; null where there is none."""
    usual = pc.match_substring_regex(column, _USUAL_DATE)
    if pc.all(usual, skip_nulls=False).as_py():
        return column
    return pa.array([None if one is None else _moment(one) for one in column.to_pylist()], pa.string())


def _moment(date: str) -> str | None:
    match = _DATE.fullmatch(date)
    return f"{match[1]}.{(match[2] or '')[:3]:0<3}" if match else None


def _days(column: pa.Array) -> pa.Array:
    """Days since 1970-01-01 of dates; null where there is none. Many rows share a day, and each day is read once."""
    day = pc.utf8_slice_codeunits(column, 0, 10).dictionary_encode()
    return pa.array(map(day_number, day.dictionary.to_pylist()), pa.int32()).take(day.indices)


def _where(holds: pa.Array, column: pa.Array) -> pa.Array:
    """The column, null where a condition does not hold."""
    return pc.if_else(holds, column, pa.scalar(None, column.type))


def _is(column: pa.Array, value: str) -> Mask:
    return _holds(pc.equal(column, value))


def _is_long(column: pa.Array) -> Mask:
    return _holds(pc.greater(pc.utf8_length(column), LONGEST_FIELD))


def _null(column: pa.Array) -> Mask:
    return _holds(pc.is_null(column))


def _holds(column: pa.Array) -> Mask:
    """Whether a condition holds; where it is null it does not."""
    holds: Mask = pc.fill_null(column, False).to_numpy(zero_copy_only=False)
    return holds
