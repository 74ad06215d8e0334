"""What was joined, as the columns that pairs are chosen from and as the nested table that the store keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stackllama.data.building.joining import Joined
from stackllama.data.pairs.pairing import Answers, Pairs
from stackllama.data.pairs.rules import answer_score
from stackllama.data.pairs.votes import Ballots
from stackllama.data.split.duplicates import Texts
from stackllama.data.store import store

_QUESTIONS = store.SCHEMAS["questions"]


def nested(
    joined: Joined, pairs: Pairs, weight_Q: NDArray[np.float64], clusters: Sequence[str], *, margin: float = 0.0
) -> pa.Table:
    """The questions in the schema of the store; `margin` is that of a pair for each point of its gap."""
    questions, answers = joined.questions, joined.answers
    kind = _QUESTIONS.field("answers").type.value_type
    fields = [_attribution(answers) if field.name == "attribution" else _whole(answers[field.name]) for field in kind]
    made = {
        "attribution": _attribution(questions),
        "answers": _lists(joined.starts, pa.StructArray.from_arrays(fields, fields=list(kind)), "answers"),
        "pairs": _pairs(pairs, questions.num_rows, margin),
        "weight": pa.array(weight_Q),
        "cluster": pa.array(clusters, pa.string()),
    }
    columns = [made[field.name] if field.name in made else questions[field.name] for field in _QUESTIONS]
    return pa.table(columns, schema=_QUESTIONS)


def to_answers(joined: Joined, votes: pa.Table | None = None) -> Answers:
    """The answers as columns to be paired; `votes` are the dated ones (`joining.VOTES`), None where nobody asks."""
    answers, questions = joined.answers, joined.questions
    votes_A = answers["votes"].to_numpy()
    return Answers(
        keys=list(zip(questions["site"].to_pylist(), questions["id"].to_pylist(), strict=True)),
        starts=joined.starts,
        id_A=answers["id"].to_numpy(),
        votes_A=votes_A,
        accepted_A=answers["accepted"].to_numpy(),
        date_A=answers["date"].to_pylist(),
        length_A=pc.coalesce(answers["length"], pc.utf8_length(answers["text"]).cast(pa.int64())).to_numpy(),
        texts=Texts(answers["text"]),
        ballots=None if votes is None else _ballots(answers, votes, votes_A),
    )


def _ballots(answers: pa.Table, votes: pa.Table, votes_A: NDArray[np.int64]) -> Ballots:
    source_A, id_A, source_V, id_V = (t[name].to_numpy() for t in (answers, votes) for name in ("source", "id"))
    answer_V = np.full(votes.num_rows, -1)
    for source in np.unique(source_V):
        mine_A, mine_V = np.flatnonzero(source_A == source), np.flatnonzero(source_V == source)
        mine_A = mine_A[np.argsort(id_A[mine_A])]
        near_V = np.searchsorted(id_A[mine_A], id_V[mine_V]).clip(max=len(mine_A) - 1)
        if len(mine_A):
            answer_V[mine_V] = np.where(id_A[mine_A[near_V]] == id_V[mine_V], mine_A[near_V], -1)
    there = answer_V >= 0
    return Ballots(answer_V[there], votes["day"].to_numpy()[there], votes["change"].to_numpy()[there], votes_A)


def stated_pairs(joined: Joined) -> Pairs:
    """The pairs that questions came with (preference data of other tools), whatever the rules say. Their gap is the
    difference of the two scores, at least 1: pseudo-votes grow by powers of two, scores by ones.
    """
    stated_S = np.flatnonzero(pc.is_valid(joined.questions["pairs"]).to_numpy())
    if not len(stated_S):
        return Pairs(*[np.zeros(0, np.int64)] * 4)
    starts, ids = joined.starts, joined.answers["id"].to_pylist()
    marks = zip(joined.answers["votes"].to_pylist(), joined.answers["accepted"].to_pylist(), strict=True)
    scores = [answer_score(votes, accepted) for votes, accepted in marks]
    rows: list[tuple[int, int, int, int]] = []
    for at in stated_S.tolist():
        start = int(starts[at])
        place = {ids[number]: number - start for number in range(start, int(starts[at + 1]))}
        sides = [place[number] for number in joined.questions["pairs"][at].as_py()]
        for better, worse in zip(sides[::2], sides[1::2], strict=True):
            rows.append((at, better, worse, max(1, scores[start + better] - scores[start + worse])))
    return Pairs(*np.array(rows, np.int64).reshape(-1, 4).T)


def _attribution(posts: pa.Table) -> pa.StructArray:
    kind = _QUESTIONS.field("attribution").type
    names = [{"author_id": "owner"}.get(field.name, field.name) for field in kind]
    return pa.StructArray.from_arrays([_whole(posts[name]) for name in names], fields=list(kind))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _lists(starts: Any, values: pa.Array, name: str) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values, type=_QUESTIONS.field(name).type)


def _pairs(pairs: Pairs, count: int, margin: float) -> pa.ListArray:
    kind = _QUESTIONS.field("pairs").type.value_type
    starts = np.searchsorted(pairs.question_P, np.arange(count + 1))
    given = {"better": pairs.better_P, "worse": pairs.worse_P, "gap": pairs.gap_P, "margin": margin * pairs.gap_P}
    columns = [pa.array(given[field.name]).cast(field.type) for field in kind]
    return _lists(starts, pa.StructArray.from_arrays(columns, fields=list(kind)), "pairs")
