"""The posts of one bucket as questions with their answers, each with its attribution. Columns all the way.

    posts of a bucket -> each id once -> sorted by site, question, source, kind, id -> answers under their questions

Whatever finds no place is counted under a named reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stackllama.data.building.records import mended, merge_parts
from stackllama.data.building.shuffle import read_dealt
from stackllama.data.posts import COMMUNITY
from stackllama.data.text.language import in_own_language

NAMES, VOTES, DOUBLES, LINKS, CLUSTERS = (
    f"{name}.joined" for name in ("names", "votes", "doubles", "links", "clusters")
)
"""Files of what was joined by id, sorted by bucket (`keys.py`, `clusters.py`): (source, id, name); (source, id, day,
change); (source, id, question); (source, id, related, kind, id_here, related_here), without a bucket; (site, id,
cluster, split).
"""

TWICE = "post: its Id occurs twice"
ORPHAN = "answer: its question is not there"
READ_BEFORE = "question: its site and Id were read before"
ANSWER_READ_BEFORE = "answer: its question was read before"
NO_ACCEPTED = "accepted mark: its answer is not there"

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Joined:
    """`questions` sorted by site and id; the answers of number i are rows `starts[i]` to `starts[i + 1]` of `answers`,
    sorted by id. Both have the columns of `shuffle.POSTS`, "site", "source" and those of the attribution; answers have
    "accepted". `dropped` counts posts, `notes` other things, by reason.
    """

    questions: pa.Table
    answers: pa.Table
    starts: Numbers
    dropped: Counter[str]
    notes: Counter[str]


def join_bucket(
    folder: Path, pieces: Sequence[tuple[Path, int]], bucket: int, own: Mapping[str, frozenset[str]] | None = None
) -> Joined:
    """Join what `pieces` (their files of posts, and the number of the source of each) dealt to a bucket; `folder` has
    what was joined by id. `own` has the languages that the posts of each site may be in; without it, in any.
    """
    dropped: Counter[str] = Counter()
    parts: dict[int, list[pa.Table]] = {}
    for (_, source), part in zip(pieces, read_dealt([path for path, _ in pieces], bucket), strict=True):
        parts.setdefault(source, []).append(part)
    merged = [merge_parts(pa.concat_tables(of_source), dropped) for of_source in parts.values()]
    source_N = np.repeat(np.array([*parts], np.int32), [table.num_rows for table in merged])
    posts = pa.concat_tables(merged).append_column("source", pa.array(source_N))
    posts = _once(posts, read_joined(folder, DOUBLES, bucket), dropped)
    if own is not None and (left := in_own_language(posts, own, dropped)).num_rows < posts.num_rows:
        posts = mended(left, dropped)
    posts = _placed(_sorted(posts), dropped)
    posts = _attributed(posts, read_joined(folder, NAMES, bucket))
    return _split(posts, dropped)


def read_joined(folder: Path, name: str, bucket: int) -> pa.Table:
    """The rows of a join that fall into a bucket."""
    return pq.read_table(folder / name, filters=[("bucket", "=", bucket)], use_threads=False)


def numbers(table: pa.Table, name: str) -> Numbers:
    """A column without nulls as an array."""
    found: Numbers = table[name].to_numpy()
    return found


def _once(posts: pa.Table, doubles: pa.Table, dropped: Counter[str]) -> pa.Table:
    """Each (source, id) once: of several the one with the smallest question, and of those with one question the
    largest by its fields, so that the order of the rows decides nothing.
    """
    if not doubles.num_rows:
        return posts
    kept_with = {(row["source"], row["id"]): row["question"] for row in doubles.to_pylist()}
    place = list(zip(posts["source"].to_pylist(), posts["id"].to_pylist(), strict=True))
    best: dict[tuple[int, int], tuple[str, int]] = {}
    lost: set[int] = set()
    for at, key in enumerate(place):
        if key not in kept_with:
            continue
        row = posts.slice(at, 1).to_pylist()[0]
        lost.add(at)
        if row["question"] == kept_with[key]:
            best[key] = max(best.get(key, ("", -1)), (repr(row), at))
    lost -= {at for _, at in best.values()}
    dropped[TWICE] += len(lost)
    return posts.filter(pa.array([at not in lost for at in range(len(place))], pa.bool_()))


def _sorted(posts: pa.Table) -> pa.Table:
    """Sorted by site, question, source, kind (the question first) and id."""
    keys = ("id", "answers", "source", "question")
    return posts.take(pa.array(np.lexsort([*(numbers(posts, key) for key in keys), _rank(posts["site"])])))


def _rank(names: pa.ChunkedArray) -> Numbers:
    """For each name its place among all of them, in the order of the alphabet."""
    encoded = names.combine_chunks().dictionary_encode()
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    rank_S = np.empty_like(order)
    rank_S[order] = np.arange(len(order))
    ranks: Numbers = rank_S[encoded.indices.to_numpy()].astype(np.int64)
    return ranks


def _starts(*columns: Any) -> Flags:
    """Where a row differs from the one before it in any of the columns."""
    starts_N = np.ones(len(columns[0]), bool)
    for column in columns:
        starts_N[1:] &= column[1:] == column[:-1]
    starts_N[1:] ^= True
    return starts_N


def _placed(posts: pa.Table, dropped: Counter[str]) -> pa.Table:
    """Without the answers that have no question, and without what another source brought before."""
    if not posts.num_rows:
        return posts
    answers_N, source_N, question_N = (numbers(posts, name) for name in ("answers", "source", "question"))
    site_N = _rank(posts["site"])
    first_N = _starts(site_N, question_N, source_N)
    group_N = np.cumsum(first_N) - 1
    asked_G = ~answers_N[first_N]  # a group that has its question begins with it
    # The first group of a site and question that has the question is the one that counts.
    topic_G = np.cumsum(_starts(site_N, question_N)[first_N]) - 1
    before_G = np.cumsum(asked_G) - asked_G
    counts_G = asked_G & (before_G == before_G[np.searchsorted(topic_G, topic_G)])
    dropped[ORPHAN] += int((~asked_G)[group_N].sum())
    again_N = (asked_G & ~counts_G)[group_N]
    dropped[READ_BEFORE] += int((again_N & ~answers_N).sum())
    dropped[ANSWER_READ_BEFORE] += int((again_N & answers_N).sum())
    return posts.filter(pa.array(counts_G[group_N]))


def _attributed(posts: pa.Table, names: pa.Table) -> pa.Table:
    """With "author", and with "url" and "profile_url" where they were not given.

    The name comes from the table Users, else from the row; a user whose name is in neither is "user" and the number, as
    Stack Exchange itself shows them; nobody at all is "anonymous".
    """
    owner = posts["owner"]
    fallback = pc.if_else(
        pc.fill_null(pc.equal(owner, COMMUNITY), False),
        "Community",
        pc.fill_null(pc.binary_join_element_wise("user", owner.cast(pa.string()), ""), "anonymous"),
    )
    given = pc.if_else(pc.equal(posts["owner_name"], ""), None, posts["owner_name"])
    author = pc.coalesce(_looked_up(posts, names), given, fallback)
    site = posts["site"].combine_chunks().dictionary_encode()
    roots = pa.array([f"https://{quote(name, safe='.-:')}" for name in site.dictionary.to_pylist()], pa.string())
    root = roots.take(site.indices)
    kind = pc.if_else(posts["answers"], "/a/", "/q/")
    url = pc.binary_join_element_wise(root, kind, posts["id"].cast(pa.string()), "")
    profile = pc.if_else(
        pc.is_valid(posts["url"]), None, pc.binary_join_element_wise(root, "/users/", owner.cast(pa.string()), "")
    )
    posts = posts.append_column("author", author)
    for name, made in (("url", url), ("profile_url", profile)):
        posts = posts.set_column(posts.schema.get_field_index(name), name, pc.coalesce(posts[name], made))
    return posts


def _looked_up(posts: pa.Table, names: pa.Table) -> pa.Array:
    """The name that the table Users has for the owner of each post, or null. `names` is sorted by the post's id."""
    id_M, id_N = numbers(names, "id"), numbers(posts, "id")
    source_M, source_N = numbers(names, "source"), numbers(posts, "source")
    at_N = np.full(posts.num_rows, -1)
    for source in np.unique(source_M):
        mine_M, mine_N = np.flatnonzero(source_M == source), np.flatnonzero(source_N == source)
        near = np.searchsorted(id_M[mine_M], id_N[mine_N]).clip(max=len(mine_M) - 1)
        at_N[mine_N] = np.where(id_M[mine_M[near]] == id_N[mine_N], mine_M[near], -1)
    return names["name"].take(pa.array(at_N, mask=at_N < 0)).combine_chunks()


def _split(posts: pa.Table, dropped: Counter[str]) -> Joined:
    """Questions and their answers apart."""
    answers_N = numbers(posts, "answers")
    question_N = np.flatnonzero(~answers_N)
    starts = np.searchsorted(np.flatnonzero(answers_N), np.append(question_N, len(answers_N)))
    questions, answers = posts.take(pa.array(question_N)), posts.filter(pa.array(answers_N))
    wanted = pc.fill_null(questions["accepted_answer"], -1).to_numpy()
    accepted_A = np.repeat(wanted, np.diff(starts)) == numbers(answers, "id")
    there = np.add.reduceat(np.append(accepted_A, False), starts[:-1]) * (np.diff(starts) > 0)
    missing = int(((wanted != -1) & (there == 0)).sum())
    notes = Counter({NO_ACCEPTED: missing} if missing else {})
    return Joined(questions, answers.append_column("accepted", pa.array(accepted_A)), starts, +dropped, notes)
