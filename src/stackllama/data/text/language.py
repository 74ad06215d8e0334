"""The language of a site, and the posts that are in another one.

A site's language is looked at in a sample of its questions: those with the smallest hashes, so that the same ones are
taken however the dump is cut. Every language in which a tenth of them is written counts as the site's own: on a site
about Russian, questions are asked in Russian and in English. A post is in another language only where that is clear:
its prose is long enough and the detector is certain.

The detector is py3langid (naive Bayes over byte n-grams, 4.6 MB, no download), loaded beside the first pieces: 0.7 s
and 106 MB. See docs/cleaning.md for the choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stackllama.data.building.shuffle import hashed
from stackllama.data.text.prose import prose

OTHER_LANGUAGE = "post: in a language that is not its site's"
SAMPLE = 200
"""Questions of a site that are looked at: a standard error of 3.5 points at most."""
OWN = 0.1
"""Share of those questions from which on a language is one of the site's own."""
LETTERS, CERTAIN = 100, 0.9
"""Letters of prose, and probability of the likeliest language, from which on a text's language counts as known."""

_READ = 1000  # characters of prose that are judged
_KEPT = 4000  # characters of a text in the sample; code and formulas are still in it
_NONE = "zxx"  # the detector's word for what is no language
_SAMPLED = pa.schema({"site": pa.string(), "point": pa.uint64(), "text": pa.string()})

Report = dict[str, Any]


def load() -> Thread:
    """Begin to load the detector beside other work; who asks it waits for the thread first, and is told what fails."""

    def work() -> None:
        with suppress(Exception):  # whoever asks tries again, and hears of it
            _detector()

    thread = Thread(target=work, name="stackllama-language", daemon=True)
    thread.start()
    return thread


def detect(text: str) -> str | None:
    """The language of a text in Markdown (mostly ISO 639-1, such as "en"), or None where that is not clear."""
    words = prose(text)[:_READ]
    if sum(map(str.isalpha, words)) < LETTERS:
        return None
    language, probability = _detector()(words)
    return language if probability >= CERTAIN and language != _NONE else None


def write_sample(posts: pa.Table, path: Path) -> None:
    """Write, of each site, the questions among `posts` that may be in its sample."""
    at_N = np.flatnonzero(~posts["answers"].to_numpy())
    sites, id_N = posts["site"].take(pa.array(at_N)).combine_chunks().dictionary_encode(), posts["id"].to_numpy()[at_N]
    point_N = hashed(pa.chunked_array([sites.dictionary.take(sites.indices)]), id_N)
    chosen_N = _smallest(sites.indices.to_numpy(), point_N)
    asked = posts.select(["site", "title", "text"]).take(pa.array(at_N[chosen_N]))
    texts = pc.utf8_slice_codeunits(pc.binary_join_element_wise(asked["title"], asked["text"], "\n\n"), 0, _KEPT)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SAMPLED) as writer:
        writer.write_table(pa.table([asked["site"], point_N[chosen_N], texts], schema=_SAMPLED))


def look(paths: Iterable[Path]) -> dict[str, Report]:
    """What the sampled questions of each site are written in: "language" is that of most of them (None where none is
    clear), "share" its share among the "questions" that were clear, and "shares" has all languages.
    """
    sample = _SAMPLED.empty_table()
    for path in paths:
        with pa.OSFile(str(path), "rb") as file:
            sample = pa.concat_tables([sample, pa.ipc.open_file(file).read_all()])
        sites = sample["site"].combine_chunks().dictionary_encode().indices
        sample = sample.take(pa.array(_smallest(sites.to_numpy(), sample["point"].to_numpy())))
    counts: dict[str, Counter[str]] = {}
    for row in sample.to_pylist():
        of_site = counts.setdefault(row["site"], Counter())
        if language := detect(row["text"]):
            of_site[language] += 1
    return {site: _report(counts[site]) for site in sorted(counts)}


def told(report: Report) -> str:
    """What was found of a site, in a line."""
    if report["language"] is None:
        return "its language is not clear: no question has enough prose"
    return f"language {report['language']}, {report['share']:.1%} of the {report['questions']} questions looked at"


def own_languages(reports: Mapping[str, Report]) -> dict[str, frozenset[str]]:
    """Of each site the languages that its posts may be in; of one whose language is not clear, none is told."""
    return {
        site: frozenset(language for language, share in report["shares"].items() if share >= OWN)
        for site, report in reports.items()
    }


def in_own_language(posts: pa.Table, own: Mapping[str, frozenset[str]], dropped: Counter[str]) -> pa.Table:
    """Without the posts that are clearly in another language than their site's."""
    rows = zip(posts["site"].to_pylist(), posts["title"].to_pylist(), posts["text"].to_pylist(), strict=True)
    stays = [
        not (allowed := own.get(site)) or (found := detect(f"{title}\n\n{text}")) is None or found in allowed
        for site, title, text in rows
    ]
    dropped[OTHER_LANGUAGE] += len(stays) - sum(stays)
    return posts.filter(pa.array(stays, pa.bool_()))


def _smallest(site_N: NDArray[np.int32], point_N: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The places of the smallest points of each site; of equal points the first."""
    order_N = np.lexsort((point_N, site_N))
    starts_N = np.append([True], np.diff(site_N[order_N]) != 0)[: len(order_N)]
    new_N = starts_N | np.append([True], np.diff(point_N[order_N]) != 0)[: len(order_N)]
    order_N, starts_N = order_N[new_N], starts_N[new_N]
    place_N = np.arange(len(order_N))
    place_N -= np.maximum.accumulate(np.where(starts_N, place_N, 0))
    chosen_N: NDArray[np.int64] = order_N[place_N < SAMPLE]
    return chosen_N


def _report(counts: Counter[str]) -> Report:
    total = counts.total()
    shares = {language: round(count / total, 4) for language, count in sorted(counts.items(), key=_most)}
    language, share = next(iter(shares.items()), (None, None))
    return {"language": language, "share": share, "questions": total, "shares": shares}


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


@cache
def _detector() -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector: Callable[[str], tuple[str, float]] = LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True
    ).classify
    return detector
