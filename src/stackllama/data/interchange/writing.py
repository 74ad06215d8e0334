"""From the store to a folder that other tools read.

    OUT/
        README.md                 a dataset card: the splits, the licence, how to name the authors
        ATTRIBUTION.jsonl         a line a question: the rows it went to, and author, address, licence of every text
        data/sft-00000.parquet    the rows; .jsonl for the format jsonl

Columns are exactly those of the format. Authors and licences stand beside the data, not in columns of their own: tools
that read several files at once refuse files whose columns differ (docs/decisions/0015-interchange.md). The card names
the files of each split, so `datasets.load_dataset(OUT)` does not take the attribution for data.

The same store gives the same bytes (under one version of pyarrow), and memory does not grow with the store.
"""

from __future__ import annotations

import heapq
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stackllama.data.interchange.formats import ATTRIBUTION, FORMATS, MARKDOWN, SCHEMAS, fixed_pairs, site_address
from stackllama.data.pairs.rules import answer_score
from stackllama.data.posts import Attribution, Question
from stackllama.data.store import store
from stackllama.errors import DataError, RunError
from stackllama.files import atomic_folder

ROWS_PER_GROUP = 1000
ROWS_PER_FILE = 200_000
QUESTIONS_PER_RUN = 5000
"""How many questions are sorted in memory at once, where they have to be sorted."""
RUNS_AT_ONCE = 256
"""How many sorted runs are merged at once; each is an open file."""

Row = dict[str, Any]
Render = Callable[[str, str], str]
"""(title, body) of a question -> the prompt."""


@dataclass(frozen=True, slots=True)
class Export:
    """What was written: `rows` of each split, and `counts` of questions, answers, pairs and of what was left out."""

    rows: Mapping[str, int]
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A question on its way: its rows, and the line about its authors. Plain data, so that it can wait on the disk."""

    site: str
    id: int
    rows: list[Row]
    notice: Row


def write(
    store_folder: Path,
    out: Path,
    *,
    format: str,  # noqa: A002 - the user's word
    splits: Sequence[str] | None = None,
    render: Render | None = None,
    gap: str = " ",
    fixed_order: bool = False,
) -> Export:
    """Write questions of a store in `format` ("preferences", "paired" or "jsonl") to the folder `out`, replacing it.

    `splits` are all of the store's unless named. `render` is asked for by "jsonl" alone, and `gap` stands in front of
    both its answers: prompt + chosen is then the text that a model is trained on. A question without a pair has rows
    in "preferences" only; the others hold exactly the store's pairs.

    With `fixed_order` the score rule of the original data decides instead: questions by site and id (within their
    split), answers by id, pairs by `interchange.fixed_pairs`, and only questions with two answers or more.

    Raises DataError where the store, a split or the format is not there, RunError where the disk refuses; `out` is
    then as it was.
    """
    if format not in FORMATS:
        raise DataError(f"{format!r} is no format of preference data; the formats are {', '.join(FORMATS)}")
    if format == "jsonl" and render is None:
        raise DataError("the format jsonl needs a template for its prompts; give `render`")
    chosen = list(dict.fromkeys(splits)) if splits is not None else _splits(store_folder)
    rows_of = _ROWS[format]
    counts: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    rows: dict[str, int] = {}
    with atomic_folder(out) as folder:
        if out.exists() and not _is_export(out) and not (out.is_dir() and not any(out.iterdir())):
            raise RunError(
                f"{out} is there, and is no export that could be replaced, or holds something else as well; choose "
                "another folder"
            )
        (folder / "data").mkdir()
        with (folder / ATTRIBUTION).open("w", encoding="utf-8", newline="\n") as notices:
            for split in chosen:
                questions = store.iterate_questions(store_folder, split)
                taken = _original(questions, counts) if fixed_order else questions
                entries: Iterable[_Entry] = (_entry(one, rows_of(one, render, gap), counts, licenses) for one in taken)
                if fixed_order:
                    entries = _sorted(entries, folder)
                stream = _noted(entries, split, lambda line: notices.write(line + "\n"))
                rows[split] = _fill(folder / "data", split, stream, format)
        (folder / "README.md").write_text(_card(format, rows, licenses), encoding="utf-8", newline="\n")
    return Export(rows, dict(sorted(counts.items())))


def _is_export(folder: Path) -> bool:
    """Whether a folder holds an export and nothing else. A card that somebody has changed is none of ours any more."""
    path = folder / "README.md"
    card = path.read_text("utf-8", "replace") if path.is_file() else ""
    head, _, tail = card.partition(_LICENCE)
    rows, licenses = (Counter({name: int(count) for name, count in _COUNTED.findall(part)}) for part in (head, tail))
    form = _FORMAT.search(head)
    if form is None or card != _card(form[1], rows, licenses):
        return False
    names = "|".join(map(re.escape, rows))
    ours = re.compile(rf"README\.md|{re.escape(ATTRIBUTION)}|data(/({names})-\d{{5,}}\.{_suffix(form[1])})?")
    return all(ours.fullmatch(item.relative_to(folder).as_posix()) for item in folder.rglob("*"))


def _splits(folder: Path) -> list[str]:
    parts = [key.partition("/") for key in store.read_manifest(folder).parts]
    names = [split for kind, _, split in parts if kind == "questions"]
    if not names:
        raise DataError(f"{folder} has no questions; build the data from a dump first")
    return names


def _original(questions: Iterable[Question], counts: Counter[str]) -> Iterator[Question]:
    for question in questions:
        paired, reasons = fixed_pairs(question)
        counts.update(reasons)
        if len(paired.answers) > 1:
            yield paired


def _preference_rows(question: Question, _render: Render | None, _gap: str) -> list[Row]:
    answers = [
        {
            "answer_id": answer.id,
            "author": answer.attribution.author,
            "author_id": answer.attribution.author_id,
            "author_profile": answer.attribution.profile_url,
            "pm_score": answer_score(answer.votes, answer.accepted),
            "selected": answer.accepted,
            "text": answer.text,
        }
        for answer in question.answers
    ]
    return [_head(question) | {"answers": answers}]


def _paired_rows(question: Question, _render: Render | None, _gap: str) -> list[Row]:
    head = _head(question)
    texts = [answer.text for answer in question.answers]
    return [head | {"response_j": texts[pair.better], "response_k": texts[pair.worse]} for pair in question.pairs]


def _jsonl_rows(question: Question, render: Render | None, gap: str) -> list[Row]:
    assert render is not None
    prompt = render(question.title, question.text)
    texts = [gap + answer.text for answer in question.answers]
    return [{"prompt": prompt, "chosen": texts[pair.better], "rejected": texts[pair.worse]} for pair in question.pairs]


_ROWS = {"preferences": _preference_rows, "paired": _paired_rows, "jsonl": _jsonl_rows}


def _head(question: Question) -> Row:
    by = question.attribution
    return {
        "qid": question.id,
        "question": question.text,
        "date": question.date[:10].replace("-", "/"),
        "metadata": [by.url, site_address(question.site), by.profile_url or ""],
    }


def _entry(question: Question, rows: list[Row], counts: Counter[str], licenses: Counter[str]) -> _Entry:
    """The question's rows with the line that names whose texts they hold; those of answers in no row are not named."""
    scored = bool(rows) and "answers" in rows[0]
    used = {place for pair in question.pairs for place in (pair.better, pair.worse)}
    named = [answer for place, answer in enumerate(question.answers) if scored or place in used]
    ids = [answer.id for answer in question.answers]
    notice = {
        "site": question.site,
        "id": question.id,
        "title": question.title,
        **_by(question.attribution),
        "answers": [{"id": answer.id} | _by(answer.attribution) for answer in named],
    }
    if not scored:
        notice["pairs"] = [[ids[pair.better], ids[pair.worse]] for pair in question.pairs]
    if rows:
        counts.update({"questions": 1, "answers": len(named), "pairs": len(question.pairs)})
        licenses.update([question.attribution.license, *(answer.attribution.license for answer in named)])
    else:
        counts["question: no pair"] += 1
    return _Entry(question.site, question.id, rows, notice)


def _by(attribution: Attribution) -> Row:
    return {
        "url": attribution.url,
        "author": attribution.author,
        "profile_url": attribution.profile_url,
        "license": attribution.license,
    }


def _sorted(entries: Iterable[_Entry], beside: Path) -> Iterator[_Entry]:
    """By site and id. What is too much for the memory is sorted in runs, which wait in `beside` to be merged."""
    entries = iter(entries)
    with tempfile.TemporaryDirectory(dir=beside) as name:
        runs: list[Path] = []
        for number in count():
            block = sorted(islice(entries, QUESTIONS_PER_RUN), key=_key)
            if not runs and len(block) < QUESTIONS_PER_RUN:
                yield from block
                return
            if not block:
                break
            runs.append(_spill(block, Path(name) / str(number)))
            del block  # before the next one is read
            if len(runs) == RUNS_AT_ONCE:
                merged = _spill(_merged(runs), Path(name) / f"{number}-merged")
                for run in runs:
                    run.unlink()
                runs = [merged]
        yield from _merged(runs)


def _merged(runs: Iterable[Path]) -> Iterator[_Entry]:
    return heapq.merge(*map(_run, runs), key=_key)


def _spill(entries: Iterable[_Entry], path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_line([one.site, one.id, one.rows, one.notice]) + "\n" for one in entries)
    return path


def _key(entry: _Entry) -> tuple[str, int]:
    return entry.site, entry.id


def _run(path: Path) -> Iterator[_Entry]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield _Entry(*json.loads(line))


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


def _noted(entries: Iterable[_Entry], split: str, note: Callable[[str], object]) -> Iterator[Row]:
    """The rows of all entries; each entry that has any is noted with the number of its first row in the split."""
    first = 0
    for entry in entries:
        if entry.rows:
            note(_line({"split": split, "row": first, **entry.notice}))
            first += len(entry.rows)
            yield from entry.rows


def _fill(folder: Path, split: str, rows: Iterator[Row], form: str) -> int:
    """Write the rows of a split to as many files as they need, at least one; gives how many rows there were."""
    total, number = 0, 0
    while (head := list(islice(rows, ROWS_PER_GROUP))) or not number:
        block = chain(head, islice(rows, ROWS_PER_FILE - len(head)))
        name = folder / f"{split}-{number:05}"
        if form == "jsonl":
            total += _write_jsonl(name.with_suffix(".jsonl"), block)
        else:
            total += _write_parquet(name.with_suffix(".parquet"), block, SCHEMAS[form].with_metadata(MARKDOWN))
        number += 1
    return total


def _write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(_line(row) + "\n")
            count += 1
    return count


def _write_parquet(path: Path, rows: Iterator[Row], schema: pa.Schema) -> int:
    count = 0
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=3) as writer:
        while block := list(islice(rows, ROWS_PER_GROUP)):
            writer.write_table(pa.Table.from_pylist(block, schema=schema))
            count += len(block)
    return count


def _suffix(form: str) -> str:
    return "jsonl" if form == "jsonl" else "parquet"


_FORMAT = re.compile(r"^Written by stackllama in the format `(\w+)`", re.MULTILINE)
_COUNTED = re.compile(r"^\| (.+) \| (\d+) \|$", re.MULTILINE)
_LICENCE = "## Licence and attribution"
"""How a card is taken apart again: its format, the lines of its tables, and what stands between the two tables."""


def _card(form: str, rows: Mapping[str, int], licenses: Counter[str]) -> str:
    suffix = _suffix(form)
    files = "".join(f"      - split: {split}\n        path: data/{split}-*.{suffix}\n" for split in rows)
    splits = "".join(f"| {split} | {count} |\n" for split, count in rows.items())
    texts = "".join(f"| {name} | {count} |\n" for name, count in sorted(licenses.items()))
    return f"""\
---
license: other
configs:
  - config_name: default
    data_files:
{files}---
# Preference data

Written by stackllama in the format `{form}`. Texts are Markdown.

| split | rows |
| --- | --- |
{splits}
{_LICENCE}

The texts are contributions of the users of the sites that `{ATTRIBUTION}` names. Whoever passes them on, changed or
not, has to name their authors, link to them, say what was changed, and keep the licence (CC BY-SA, which is shared
alike). The bodies were converted from HTML to Markdown.

| licence | texts |
| --- | --- |
{texts}
Each line of `{ATTRIBUTION}` is about one question: `split` and `row` say where its rows begin, then come the address,
author, profile and licence of the question and of each answer. `pairs`, where it is there, has the ids of the better
and the worse answer of each of those rows.
"""
