"""Single questions out of a store, each with its split: the one that has an id, or a sample.

Ids are looked through first and texts are read of nothing else, so a store may be of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackllama.data.posts import Question
from stackllama.data.store.shards import Ask, queries, question_shards
from stackllama.data.store.store import to_questions
from stackllama.errors import DataError

NEAREST = 5
"""How many ids are told in place of one that is not there."""

_PLACES = """
select site, id, filename, file_row_number as row
from read_parquet($files, filename = true, file_row_number = true)
"""
_ROW = """
select * exclude (file_row_number) from read_parquet($file, file_row_number = true)
where id = $id and file_row_number = $row
"""
_NEAREST = """
select site, id from read_parquet($files)
where site = coalesce($site, site) order by abs(id::hugeint - $number), site limit $count
"""
_ANSWERED = (
    "select site, id from read_parquet($files) where list_contains([one.id for one in answers], $number) limit 1"
)


@dataclass(frozen=True, slots=True)
class Picked:
    """A question and its split."""

    question: Question
    split: str


def find(folder: Path, number: int, site: str | None = None) -> Picked:
    """The question that has an id; `site` is needed where questions of several sites have it.

    Raises DataError where there is none (with the ids that come nearest), and where there are several.
    """
    splits, shards = question_shards(folder)
    with queries(shards) as ask:
        there = ask(f"{_PLACES} where id = $number order by site", number=number)
        found = [one for one in there if site in (None, one["site"])]
        if len(found) == 1:
            return next(_read(ask, found, shards))
        if found:
            raise DataError(f"{len(found)} sites have a question {number}; add --site with one of {_names(found)}")
        if there:
            raise DataError(f"{site} has no question {number}, but it is one of {_names(there)}; change --site")
        every = sum(counts["questions"] for counts in splits.values())
        raise DataError(f"no question {number} is among the {every:,}{_instead(ask, number, site)}")


def sample(folder: Path, count: int, seed: int) -> list[Picked]:
    """So many of the questions that have a pair, drawn by a hash of the seed, the site and the id: the same ones
    however the store is cut into shards.
    """
    _, shards = question_shards(folder)
    drawn = f"{_PLACES} where len(pairs) > 0 order by md5(concat_ws('/', $seed, site, id)) limit $count"
    with queries(shards) as ask:
        return list(_read(ask, ask(drawn, seed=seed, count=count), shards))


def _read(ask: Ask, places: Iterable[Mapping[str, Any]], shards: Mapping[str, str]) -> Iterator[Picked]:
    for place in places:
        rows = ask(_ROW, file=place["filename"], id=place["id"], row=place["row"])
        yield Picked(next(to_questions(rows)), shards[place["filename"]])


def _names(places: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(place["site"] for place in places)


def _instead(ask: Ask, number: int, site: str | None) -> str:
    """What to look at instead: the question of an answer that has this id, or the ids that come nearest."""
    answered = ask(_ANSWERED, number=number)
    if answered:
        return f"; it is an answer to question {answered[0]['id']} of {answered[0]['site']}"
    near = ask(_NEAREST, number=number, site=site, count=NEAREST)
    if not near:
        return f", none of which is of {site}; leave --site out"
    where = f" of {site}" if site else ""
    return f"; the nearest{where} are {', '.join(str(one['id']) for one in near)}"
