"""What is taken out of posts before they are joined: control tokens, e-mail addresses, secrets, answers without words.

Of each post, in this order: what is to be dropped for its text is dropped, under the first reason that holds; what is
to be masked is masked; an answer of which nothing but links is left is dropped. A function of the post alone.

Most posts have nothing of the kind. So all texts are searched at once by one expression (RE2, in time linear in their
length), and only where it is found the rules look. `language.py` has the check that needs to know a whole site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stackllama.data.text import control_text, emails, secrets
from stackllama.data.text.prose import is_only_links

OFF, DROP, KEEP = "off", "drop", "keep"
ONLY_LINKS = "answer: nothing but links"
FEW_LETTERS = 10
"""Letters and digits outside of links below which an answer with a link says nothing itself."""


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What is done about each kind: "off", "break" or "mask", "drop"; without settings nothing is. `link_only` is
    "keep" or "drop", `language` "off", "check" or "drop".
    """

    control_tokens: str = OFF
    emails: str = OFF
    secrets: str = OFF
    link_only: str = KEEP
    language: str = OFF


class _Kind(NamedTuple):
    """`rules` has what every text with such a thing has (for RE2), and how it is masked: (text, found) -> text."""

    setting: str
    reason: str
    rules: tuple[tuple[str, Callable[[str, Counter[str]], str]], ...]


# Secrets come before addresses: a password stands before an `@`.
_KINDS = (
    _Kind("control_tokens", "post: has a control token", control_text.RULES),
    _Kind("secrets", "post: has a key or another secret", secrets.RULES),
    _Kind("emails", "post: has an e-mail address", emails.RULES),
)
# A text of nothing but links begins, but for a few letters, with a link or an image.
_BEGINS_WITH_LINK = rf"^(?:[^A-Za-z0-9]*[A-Za-z0-9]){{0,{FEW_LETTERS - 1}}}[^A-Za-z0-9]*(?:\[|https?:|ftp:|mailto:)"


def clean_posts(posts: pa.Table, cleaning: Cleaning, counts: Counter[str]) -> pa.Table:
    """Posts (in the schema `shuffle.POSTS`) as they are after cleaning, the very same where nothing is to be done; adds
    to `counts`, by reason, what was dropped ("post: ...", "answer: ...") and what was changed in texts ("text: ...").
    """
    kinds = {kind: getattr(cleaning, kind.setting) for kind in _KINDS if getattr(cleaning, kind.setting) != OFF}
    gone_N = np.zeros(posts.num_rows, bool)
    if kinds and posts.num_rows:
        posts = _masked(posts, kinds, gone_N, counts)
    if cleaning.link_only == DROP and posts.num_rows:
        suspect_N = _has(posts["text"], _BEGINS_WITH_LINK) & posts["answers"].to_numpy() & ~gone_N
        for at in np.flatnonzero(suspect_N).tolist():
            if is_only_links(posts["text"][at].as_py(), FEW_LETTERS):
                gone_N[at] = True
                counts[ONLY_LINKS] += 1
    return posts.filter(pa.array(~gone_N)) if gone_N.any() else posts


def _masked(posts: pa.Table, kinds: Mapping[_Kind, str], gone_N: NDArray[np.bool_], counts: Counter[str]) -> pa.Table:
    """The posts with their texts masked; marks in `gone_N` those that are to go."""
    rules = [(kind, *rule) for kind in kinds for rule in kind.rules]
    anything = "|".join(dict.fromkeys(f"(?:{sign})" for _, sign, _ in rules))
    all_2N = pa.chunked_array(posts["title"].chunks + posts["text"].chunks)
    suspect_S = np.flatnonzero(_has(all_2N, anything).reshape(2, -1).any(0))
    if not len(suspect_S):
        return posts
    some = posts.select(["title", "text"]).take(pa.array(suspect_S))
    both = pc.binary_join_element_wise(some["title"], some["text"], "\n")
    titles, texts = some["title"].to_pylist(), some["text"].to_pylist()
    notes = [Counter[str]() for _ in suspect_S]
    reasons: dict[int, str] = {}
    for kind, sign, mask in rules:
        for at in np.flatnonzero(_has(both, sign)).tolist():
            if at in reasons:
                continue
            found: Counter[str] = Counter()
            titles[at], texts[at] = mask(titles[at], found), mask(texts[at], found)
            notes[at] += found
            if found and kinds[kind] == DROP:
                reasons[at] = kind.reason
    gone_N[suspect_S[list(reasons)]] = True
    counts.update(reasons.values())
    for at, of_post in enumerate(notes):
        counts.update(of_post if at not in reasons else ())
    if not any(notes):
        return posts
    return _replaced(_replaced(posts, "title", suspect_S, titles), "text", suspect_S, texts)


def _has(texts: pa.ChunkedArray, pattern: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.match_substring_regex(texts, pattern).to_numpy()
    return found


def _replaced(posts: pa.Table, name: str, at_S: NDArray[np.int64], values: list[str]) -> pa.Table:
    """The posts with other values in a column, at those places (ascending)."""
    mask_N = np.zeros(posts.num_rows, bool)
    mask_N[at_S] = True
    column = pc.replace_with_mask(posts[name].combine_chunks(), pa.array(mask_N), pa.array(values, pa.string()))
    return posts.set_column(posts.schema.get_field_index(name), posts.schema.field(name), column)
