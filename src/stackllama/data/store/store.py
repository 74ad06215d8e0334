"""Preference data on disk: Parquet shards and a manifest.

    FOLDER/
        manifest.json                             what is there: counts, and the sha256 of every shard
        questions-sft-00000-5f2c9a1b7e08.parquet  questions with nested answers, pairs and attribution, zstd
        documents-sft-00000-....parquet

Shards carry the beginning of their hash in their names and are never changed; the manifest is replaced in one step, and
only what it names exists for a reader. So a writer can be killed at any moment: the old data stay valid, and the next
write clears the leftovers. The same records give the same bytes (under one version of pyarrow).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackllama.data.posts import Answer, Attribution, Document, Pair, Question
from stackllama.errors import DataError, RunError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 20_000


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_ATTRIBUTION = pa.struct(
    [
        _required("url", pa.string()),
        _required("author", pa.string()),
        pa.field("author_id", pa.int64()),
        pa.field("profile_url", pa.string()),
        _required("license", pa.string()),
    ]
)
_ANSWER = pa.struct(
    [
        _required("id", pa.int64()),
        _required("text", pa.string()),
        _required("votes", pa.int64()),
        _required("accepted", pa.bool_()),
        _required("date", pa.string()),
        _required("attribution", _ATTRIBUTION),
        pa.field("length", pa.int64()),
    ]
)
_PAIR = pa.struct(
    [*(_required(name, pa.int64()) for name in ("better", "worse", "gap")), _required("margin", pa.float64())]
)
SCHEMAS = {
    "questions": pa.schema(
        [
            _required("site", pa.string()),
            _required("id", pa.int64()),
            _required("title", pa.string()),
            _required("text", pa.string()),
            _required("tags", pa.list_(_required("element", pa.string()))),
            _required("votes", pa.int64()),
            _required("date", pa.string()),
            _required("attribution", _ATTRIBUTION),
            _required("answers", pa.list_(_required("element", _ANSWER))),
            _required("pairs", pa.list_(_required("element", _PAIR))),
            _required("weight", pa.float64()),
            _required("cluster", pa.string()),
        ]
    ),
    "documents": pa.schema(
        [
            _required("site", pa.string()),
            _required("id", pa.int64()),
            _required("text", pa.string()),
            _required("attribution", _ATTRIBUTION),
        ]
    ),
}
_REPEATED = {
    "questions": [
        "site",
        "tags.list.element",
        *(f"{place}attribution.{name}" for place in ("", "answers.list.element.") for name in ("author", "license")),
    ],
    "documents": ["site", "attribution.author", "attribution.license"],
}
"""Columns whose values repeat, so that a dictionary pays; trying one on texts costs time."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the store."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Part:
    """All shards of one kind ("questions" or "documents") in one split, and what they hold together.

    `counts` has questions, answers and pairs, or documents.
    """

    counts: Mapping[str, int]
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store holds; the keys of `parts` are "questions/sft", "documents/sft" and so on."""

    schema: int = SCHEMA_VERSION
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A sha256 over the hashes of all shards: changes with any byte of the data."""
        lines = [f"{key} {shard.sha256}\n" for key in sorted(self.parts) for shard in self.parts[key].shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def total(self, what: str) -> int:
        """The sum of one count ("questions", "answers", "pairs", "documents") over all splits."""
        return sum(part.counts.get(what, 0) for part in self.parts.values())


def write_questions(
    folder: Path, split: str, questions: Iterable[Question], *, rows_per_shard: int = ROWS_PER_SHARD
) -> Manifest:
    """Puts the questions of a split in place of those that the store had; a store that is not there is made.

    Raises RunError where the disk is full or cannot be written; the store is then as it was.
    """
    counts = {"questions": 0, "answers": 0, "pairs": 0}

    def records() -> Iterator[dict[str, Any]]:
        for question in questions:
            counts["questions"] += 1
            counts["answers"] += len(question.answers)
            counts["pairs"] += len(question.pairs)
            yield asdict(question)

    return _write(Path(folder), "questions", split, records(), counts, rows_per_shard)


def write_documents(
    folder: Path, split: str, documents: Iterable[Document], *, rows_per_shard: int = ROWS_PER_SHARD
) -> Manifest:
    """Like `write_questions`, for documents."""
    counts = {"documents": 0}

    def records() -> Iterator[dict[str, Any]]:
        for document in documents:
            counts["documents"] += 1
            yield asdict(document)

    return _write(Path(folder), "documents", split, records(), counts, rows_per_shard)


def read_questions(folder: Path, split: str) -> list[Question]:
    """The questions of a split, in the order in which they were written; DataError where a shard is not what was
    written.
    """
    return list(iterate_questions(folder, split))


def iterate_questions(folder: Path, split: str) -> Iterator[Question]:
    """Like `read_questions`, one after the other: never more in memory than one shard's bytes and 1024 questions."""
    return to_questions(_read(Path(folder), "questions", split))


def to_questions(rows: Iterable[dict[str, Any]]) -> Iterator[Question]:
    """Rows in the schema of questions as records."""
    return map(_question, rows)


def read_documents(folder: Path, split: str) -> list[Document]:
    """Like `read_questions`, for documents."""
    rows = _read(Path(folder), "documents", split)
    return [Document(**(row | {"attribution": Attribution(**row["attribution"])})) for row in rows]


def read_manifest(folder: Path) -> Manifest:
    """What the store holds. Raises DataError where there is no store, or one of another version."""
    path = Path(folder) / MANIFEST
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        if given["schema"] != SCHEMA_VERSION:
            raise DataError(
                f"{path} is of schema {given['schema']}, this version reads {SCHEMA_VERSION}; build the data again"
            )
        parts = {
            key: Part(dict(part["counts"]), tuple(Shard(**shard) for shard in part["shards"]))
            for key, part in given["parts"].items()
        }
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no preference data: there is no {MANIFEST}; build the data first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no manifest of preference data ({error}); build the data again") from error
    return Manifest(SCHEMA_VERSION, parts)


def _question(row: dict[str, Any]) -> Question:
    answers = tuple(
        Answer(**(answer | {"attribution": Attribution(**answer["attribution"])})) for answer in row["answers"]
    )
    return Question(
        **(
            row
            | {
                "tags": tuple(row["tags"]),
                "attribution": Attribution(**row["attribution"]),
                "answers": answers,
                "pairs": tuple(Pair(**pair) for pair in row["pairs"]),
            }
        )
    )


def _read(folder: Path, kind: str, split: str) -> Iterator[dict[str, Any]]:
    manifest = read_manifest(folder)
    part = manifest.parts.get(f"{kind}/{split}")
    if part is None:
        there = ", ".join(sorted(manifest.parts)) or "nothing"
        raise DataError(f"{folder} has no {kind} in the split {split!r} (it has {there}); build the data again")
    for shard in part.shards:
        path = folder / shard.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the shard {path} cannot be read: {error.strerror or error}; build the data again"
            ) from error
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise DataError(
                f"the shard {path} is not the one in the manifest: its sha256 differs; build the data again"
            )
        for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches(1024):
            yield from batch.to_pylist()


def count_questions(table: pa.Table) -> dict[str, int]:
    """How many questions, answers and pairs a table of questions holds."""
    nested = {name: pc.sum(pc.list_value_length(table[name]), min_count=0).as_py() for name in ("answers", "pairs")}
    return {"questions": table.num_rows, **nested}


def write_shard(folder: Path, kind: str, split: str, number: int, table: pa.Table) -> Shard:
    """Write one shard; for a reader it exists once `commit` has named it. Raises RunError where the disk is full."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", compression_level=1, row_group_size=4096, use_dictionary=_REPEATED[kind]
    )
    content = sink.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    file = f"{kind}-{split}-{number:05}-{sha256[:12]}.parquet"
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / file, content)
    return Shard(file, table.num_rows, len(content), sha256)


def commit(folder: Path, parts: Mapping[str, Part]) -> Manifest:
    """Put the parts, whose shards are written, in place of those of the same names. Raises RunError where the disk is
    full; the store is then as it was.
    """
    old = read_manifest(folder) if (folder / MANIFEST).exists() else Manifest()
    new = Manifest(SCHEMA_VERSION, dict(old.parts) | dict(parts))
    text = json.dumps(asdict(new), indent=1, sort_keys=True) + "\n"
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / MANIFEST, text.encode())
        _clear(folder, new)
    return new


def _write(
    folder: Path, kind: str, split: str, records: Iterator[dict[str, Any]], counts: dict[str, int], rows_per_shard: int
) -> Manifest:
    """Write all shards of a part, at least one, and commit them."""
    if not split.isidentifier():
        raise DataError(f"{split!r} is no name of a split; letters, digits and _ are allowed")
    shards: list[Shard] = []
    try:
        while (block := list(islice(records, rows_per_shard))) or not shards:
            table = pa.Table.from_pylist(block, schema=SCHEMAS[kind])
            shards.append(write_shard(folder, kind, split, len(shards), table))
        return commit(folder, {f"{kind}/{split}": Part(dict(counts), tuple(shards))})
    except BaseException:
        with suppress(OSError, DataError):
            _clear(folder, read_manifest(folder) if (folder / MANIFEST).exists() else Manifest())
        raise


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tells what the disk refuses as a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"preference data cannot be written to {folder}: {error.strerror or error}; make room or name another "
            "folder"
        ) from error


def _replace(path: Path, content: bytes | pa.Buffer) -> None:
    """The file with this content, whole or not at all, also when the power fails."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _clear(folder: Path, manifest: Manifest) -> None:
    """Removes what a killed writer left and what the manifest no longer names; nothing that is not ours."""
    named = {MANIFEST} | {shard.file for part in manifest.parts.values() for shard in part.shards}
    for path in folder.glob("*"):
        ours = path.name.startswith((MANIFEST, *(f"{kind}-" for kind in SCHEMAS)))
        if ours and path.suffix in (".parquet", ".partial") and path.name not in named:
            path.unlink(missing_ok=True)
