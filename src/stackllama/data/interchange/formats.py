"""The three formats in which other tools hold preference data, and what reading and writing them have in common.

    preferences   HuggingFaceH4/stack-exchange-preferences: a question with its scored answers in a row; Parquet
    paired        lvwerra/stack-exchange-paired: a question with a better and a worse answer in a row; Parquet
    jsonl         {"prompt", "chosen", "rejected"} in a line, as TRL and axolotl take them

`interchange_write.py` writes them, `interchange_read.py` finds and cuts what is to be read, `interchange_rows.py` turns
rows into questions. What each format cannot hold is listed in docs/interchange.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from urllib.parse import quote, unquote

import pyarrow as pa

from stackllama.data.pairs.rules import ALL_TIED, KEPT, ONE_ANSWER, OVER_LIMIT, TIED, answer_score, pairs_by
from stackllama.data.posts import Question

ATTRIBUTION = "ATTRIBUTION.jsonl"
"""The file beside the data that names the author, address and licence of every text in it."""

MARKDOWN = {b"stackllama.text": b"markdown"}
"""Metadata of the Parquet files that we write: their texts are Markdown, so nothing in them is taken for HTML."""

FIXED_MAX_PAIRS = 10
"""Pairs a question in the original data, at most."""

BEST_SCORE = 62
"""The highest score that is read: its votes, 2**62 - 1, still fit 64 bits."""

_ANSWER = pa.struct(
    [
        ("answer_id", pa.int64()),
        ("author", pa.string()),
        ("author_id", pa.int64()),
        ("author_profile", pa.string()),
        ("pm_score", pa.int64()),
        ("selected", pa.bool_()),
        ("text", pa.string()),
    ]
)
SCHEMAS: Mapping[str, pa.Schema] = {
    "preferences": pa.schema(
        [
            ("qid", pa.int64()),
            ("question", pa.string()),
            ("answers", pa.list_(_ANSWER)),
            ("date", pa.string()),
            ("metadata", pa.list_(pa.string())),
        ]
    ),
    "paired": pa.schema(
        [
            ("qid", pa.int64()),
            ("question", pa.string()),
            ("date", pa.string()),
            ("metadata", pa.list_(pa.string())),
            ("response_j", pa.string()),
            ("response_k", pa.string()),
        ]
    ),
    "jsonl": pa.schema([("prompt", pa.string()), ("chosen", pa.string()), ("rejected", pa.string())]),
}
"""Format -> its columns, in their order. `jsonl` is written as JSON, but is read from Parquet too."""

FORMATS = tuple(SCHEMAS)

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "preferences": ("qid", "question", "answers"),
    "paired": ("qid", "question", "response_j", "response_k"),
    "jsonl": ("prompt", "chosen", "rejected"),
}
"""Format -> the columns by which it is recognised, and without which it cannot be read."""

_MARK = "\0"
_HOST = re.compile(r"https?://([^/?#\s]{1,250})")
_NO_HOST = re.compile(r"[/\\\x00-\x1f\ufffd]")


def votes_for(score: int, selected: bool) -> int | None:
    """Votes that have `score` under `preferences.answer_score`: 2**(score - selected) - 1, or -1 for a negative score.

    None where the rule never gives that score: a selected answer has at least 1, or -1; and none is below -1 or above
    BEST_SCORE.
    """
    if score == -1:
        return -1
    level = score - int(selected)
    return 2**level - 1 if level >= 0 and score <= BEST_SCORE else None


def fixed_pairs(question: Question, *, max_pairs: int = FIXED_MAX_PAIRS) -> tuple[Question, dict[str, int]]:
    """The question with the pairs of the original score rule in fixed order, and how many were kept or dropped.

    Answers are taken by id, every two of them (first with second, first with third, ...) whose scores differ make a
    pair, and the first `max_pairs` stay. This is what the builder of the original data meant. Its slips do not occur:

    - a question whose answers were all tied made no new list of pairs, so it got the list of the question before it:
      answers to something else. Here it has no pair.
    - beyond 10 pairs, 10 were drawn from numpy's global state without a seed, so no two builds agreed. Here it is the
      first 10, so every build agrees.
    """
    answers = tuple(sorted(question.answers, key=lambda answer: answer.id))
    if len(answers) < 2:
        return replace(question, answers=answers, pairs=()), {ONE_ANSWER: 1}
    pairs = pairs_by([answer_score(answer.votes, answer.accepted) for answer in answers])
    kept = pairs[:max_pairs]
    every = len(answers) * (len(answers) - 1) // 2
    counts = {
        KEPT: len(kept),
        TIED: every - len(pairs),
        OVER_LIMIT: len(pairs) - len(kept),
        ALL_TIED: int(not pairs),
    }
    return replace(question, answers=answers, pairs=tuple(kept)), {key: count for key, count in counts.items() if count}


def frame(render: Callable[[str, str], str]) -> tuple[str, str]:
    r"""What `render(title, body)` writes before and after a question, such as ("Question: ", "\n\nAnswer:").

    Reading takes it off again. Found by rendering a mark, so `render` has to put the body into its text as it is.
    """
    before, mark, after = render("", _MARK).partition(_MARK)
    assert mark, "render(title, body) has to contain the body as it is"
    return before.lstrip(), after.rstrip()


def site_address(site: str) -> str:
    """The address of a site, as in `posts.attribute`."""
    return f"https://{quote(site, safe='.-:')}"


def site_of(address: str) -> str:
    """The site in an address ("https://beer.stackexchange.com/q/1" -> "beer.stackexchange.com"), or nothing."""
    found = _HOST.match(address)
    site = unquote(found[1]) if found else ""
    return "" if _NO_HOST.search(site) else site
