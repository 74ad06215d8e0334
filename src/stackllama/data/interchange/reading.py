"""Finding preference data of other tools, and cutting it into pieces that can be read by processes of their own.

    where = a file .parquet or .jsonl | a folder with such files, at any depth | hub:OWNER/NAME[/FOLDER][@REVISION]

A file's format is recognised by its columns (`interchange.REQUIRED`). A piece is a range of row groups of a Parquet
file or a range of bytes of a JSONL file, cut at line ends; it is plain data. Rows of one question that are in several
pieces come out as parts of a question with the same site and id, to be put together by `interchange_rows.merge`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from stackllama.data.interchange.formats import ATTRIBUTION, MARKDOWN, REQUIRED, SCHEMAS
from stackllama.data.interchange.rows import READERS, Frame, Row, Source, merge
from stackllama.data.posts import Question
from stackllama.errors import DataError
from stackllama.files import digest_file, digest_json

PIECE_BYTES = 16_000_000
MAX_LINE = 8_000_000
"""Bytes of a JSONL line; a longer one is dropped without being held in memory."""
SUFFIXES = (".parquet", ".jsonl")
HUB = "hub:"

_LINES_TO_JUDGE = 100
_BATCH = 16
MAX_RATIO, SMALL = 100, 1 << 25
"""A Parquet file may claim so many times its size, where that is over `SMALL` bytes: text packs 5 to 30 times smaller.
Of a piece, what is read may be twice what is stored and `SMALL` more: a text that stands in many rows is stored once.
pyarrow takes the size of a single page from the file, unchecked: one that lies there may still cost memory.
"""
SPREAD = 4
"""By so much a piece of Parquet is smaller: what is stored comes to several times as much when it is read."""
_BOMB = "no preference data do: a decompression bomb; if you trust it, write it anew as JSONL"
_SHARD = re.compile(r"-\d{5}(-of-\d{5})?$", re.ASCII)
_HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)((?:/[^@/]+)*)(?:@([\w./-]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file: the row groups or bytes from `first` up to `last`. `site` is for rows that name none."""

    path: str
    format: str
    site: str
    first: int
    last: int
    markdown: bool = False


def is_records(where: str) -> bool:
    """Whether `where` names preference data and no dump: by its beginning, its ending, or what the folder has."""
    path = Path(where)
    if where.startswith(HUB) or path.suffix in SUFFIXES:
        return True
    try:
        has_posts = path.is_dir() and any(item.name.lower() == "posts.xml" for item in path.iterdir())
        return path.is_dir() and not has_posts and any(item.suffix in SUFFIXES for item in path.rglob("*"))
    except OSError:  # a name too long, a folder that may not be read: whoever opens it as a dump says so
        return False


def digest(where: str) -> str:
    """SHA-256 over the names and contents of the files that are read there. Raises DataError where there are none."""
    files = _files(where)
    try:
        return digest_json([(file.name, digest_file(file)) for file in files])
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error}; give an intact file") from error


def pieces(where: str | Path, *, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """All that is to be read there, in the order of the paths, in pieces of about `piece_bytes` (uncompressed; of
    Parquet by `SPREAD` fewer).

    Raises DataError where nothing is found, where a file cannot be read, and where its columns fit no format.
    """
    found: list[Piece] = []
    for path in _files(where):
        site = _SHARD.sub("", path.stem) or path.stem
        try:
            cut = _cut_parquet if path.suffix == ".parquet" else _cut_jsonl
            found += cut(path.absolute(), site, piece_bytes)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}; give an intact file") from error
    return found


def read_piece(piece: Piece, dropped: Counter[str], *, frame: Frame = ("", "")) -> Iterator[Question]:
    """The questions of a piece; `dropped` gets, by reason, what was left out (complete once the last one is out).

    Questions of `paired` and `jsonl` have the pairs that the data state, those of `preferences` have none yet. `frame`
    is what the template puts around a question (`interchange.frame`); it is taken off prompts that have it. Raises
    DataError where the file is damaged.
    """
    rows = _parquet_rows if piece.path.endswith(".parquet") else _jsonl_rows
    source = Source(piece.site, frame, piece.markdown)
    return READERS[piece.format](rows(piece, dropped), source, dropped)


def read(where: str | Path, *, frame: Frame = ("", "")) -> tuple[list[Question], dict[str, int]]:
    """All questions, sorted by site and id, in memory, and what was left out, by reason. For data of modest size."""
    dropped: Counter[str] = Counter()
    parts: dict[tuple[str, int], list[Question]] = {}
    for piece in pieces(where):
        for question in read_piece(piece, dropped, frame=frame):
            parts.setdefault((question.site, question.id), []).append(question)
    return [merge(parts[key]) for key in sorted(parts)], dict(sorted(dropped.items()))


def _files(where: str | Path) -> list[Path]:
    hub = isinstance(where, str) and where.startswith(HUB)
    path = _from_hub(str(where)) if hub else Path(where)
    try:
        if path.is_dir():
            return _inside(where, path, links=hub)
        there = path.is_file()
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}; give an intact file") from error
    if not there:
        raise DataError(f"{where} is not there; give a file, a folder, or {HUB}OWNER/NAME for a data set of the Hub")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{where} ends in {path.suffix or 'nothing'}; preference data end in {' or '.join(SUFFIXES)}")
    return [path]


def _inside(where: str | Path, folder: Path, *, links: bool) -> list[Path]:
    """The files of a folder; `links` may lead out of it only where we made them (the Hub's cache has them)."""
    every = [item for item in folder.rglob("*") if item.suffix in SUFFIXES and item.name != ATTRIBUTION]
    files = sorted(item for item in every if not any(part.startswith(".") for part in item.relative_to(folder).parts))
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} cannot be read: it is no file that can be opened; take it out of {where}")
        if not (links or (real := file.resolve()).is_relative_to(folder.resolve())):
            raise DataError(
                f"{file} is a link that leads out of {where}, to {real}; put the file itself there, or name it alone "
                f"(a data set of the Hub: as {HUB}OWNER/NAME)"
            )
    if not files:
        raise DataError(f"{where} has no file that ends in {' or '.join(SUFFIXES)}; name a folder that has some")
    return files


def _from_hub(where: str) -> Path:
    """The folder, or file, of the Hub's local cache that holds what `where` names; fetched where it is missing."""
    named = _HUB.fullmatch(where)
    inside = PurePosixPath(named[2].strip("/")) if named else PurePosixPath()
    if not named or ".." in inside.parts:
        raise DataError(
            f"{where} names no data set; write {HUB}OWNER/NAME, {HUB}OWNER/NAME/FOLDER, or either @REVISION"
        )
    folder = f"{inside}/" if inside.parts else ""
    patterns = [str(inside)] if inside.suffix in SUFFIXES else [f"{folder}*{suffix}" for suffix in SUFFIXES]
    try:
        path = download(named[1], named[3], patterns) / inside
    except Exception as error:  # the client raises its own errors, those of its HTTP library, and the system's
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{where} cannot be had from the Hub: {type(error).__name__}: {reason}; look at its name, log in where it "
            "asks for that, or fetch it once while online (HF_HUB_OFFLINE forbids fetching)"
        ) from error
    if not path.exists():
        raise DataError(
            f"{where}: the data set {named[1]} has no {inside} with files ending in {' or '.join(SUFFIXES)}"
        )
    return path


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The local folder of a data set of the Hub with at least the files that fit `patterns`."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))


def _format_of(columns: list[str], path: Path) -> str:
    for name, required in REQUIRED.items():
        if set(required) <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(required)}" for name, required in REQUIRED.items())
    there = ", ".join(repr(column[:40]) for column in columns[:20]) or "none"
    raise DataError(f"{path} has the columns {there}, which fit no format of preference data ({known}); rename them")


def _cut_parquet(path: Path, site: str, piece_bytes: int) -> Iterator[Piece]:
    with pq.ParquetFile(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        form = _format_of(schema.names, path)
        if twice := sorted(set(SCHEMAS[form].names) & {name for name, n in Counter(schema.names).items() if n > 1}):
            raise DataError(f"{path} has more than one column {twice[0]!r}; leave one of them")
        _check_types(schema, form, path)
        markdown = MARKDOWN.items() <= (schema.metadata or {}).items()
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        if sum(sizes) > SMALL and sum(sizes) > MAX_RATIO * path.stat().st_size:
            raise DataError(f"{path} claims {sum(sizes)} bytes in {path.stat().st_size} packed ones; {_BOMB}")
        first = held = 0
        for group, size in enumerate(sizes if metadata.num_rows else ()):
            held += size
            if held * SPREAD >= piece_bytes or group + 1 == metadata.num_row_groups:
                yield Piece(str(path), form, site, first, group + 1, markdown)
                first, held = group + 1, 0


def _check_types(schema: pa.Schema, form: str, path: Path) -> None:
    for wanted in SCHEMAS[form]:
        if wanted.name in schema.names and not _fits(schema.field(wanted.name).type, wanted.type):
            raise DataError(
                f"{path}: the column {wanted.name!r} is {str(schema.field(wanted.name).type)[:200]}, and has to be "
                f"{wanted.type}; convert it"
            )


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a type come out as those of the other do: any width, any kind of list, with all its fields."""
    kinds = pa.types
    if kinds.is_null(found):
        return True
    if kinds.is_dictionary(found):
        return _fits(found.value_type, wanted)
    if kinds.is_list(wanted):
        lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
        return any(is_list(found) for is_list in lists) and _fits(found.value_type, wanted.value_type)
    if kinds.is_struct(wanted):
        there = {field.name: field.type for field in found} if kinds.is_struct(found) else {}
        needed = ("answer_id", "pm_score", "text")
        plain = (pa.int64(), pa.string(), pa.bool_())
        loose = all(kinds.is_floating(one) or any(_fits(one, kind) for kind in plain) for one in there.values())
        return loose and all(name in there and _fits(there[name], wanted.field(name).type) for name in needed)
    if kinds.is_integer(wanted):
        return bool(kinds.is_integer(found))
    if kinds.is_boolean(wanted):
        return bool(kinds.is_boolean(found))
    return bool(kinds.is_string(found) or kinds.is_large_string(found) or str(found) == "string_view")


def _parquet_rows(piece: Piece, dropped: Counter[str]) -> Iterator[Row]:
    groups = list(range(piece.first, piece.last))
    try:
        with pq.ParquetFile(piece.path) as file:
            columns = [name for name in SCHEMAS[piece.format].names if name in file.schema_arrow.names]
            stored, read = sum(file.metadata.row_group(group).total_byte_size for group in groups), 0
            for batch in file.iter_batches(_BATCH, row_groups=groups, columns=columns):
                read += batch.nbytes
                if read > SMALL + 2 * stored:
                    raise DataError(f"{piece.path} has over {read} bytes of text in {stored} stored ones; {_BOMB}")
                yield from _records(batch, dropped)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{piece.path}, row groups {piece.first} to {piece.last - 1}, cannot be read: {error}; give an intact file"
        ) from error


def _records(batch: pa.RecordBatch, dropped: Counter[str]) -> Iterator[Row]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            dropped["row: not UTF-8"] += 1
        else:
            for number in range(batch.num_rows):
                yield from _records(batch.slice(number, 1), dropped)


def _cut_jsonl(path: Path, site: str, piece_bytes: int) -> Iterator[Piece]:
    size = path.stat().st_size
    with path.open("rb") as file:
        form = _jsonl_format(file, path)
        first = 0
        while form and first < size:
            file.seek(min(first + piece_bytes, size))
            _to_line_end(file)
            yield Piece(str(path), form, site, first, file.tell())
            first = file.tell()


def _jsonl_format(file: BinaryIO, path: Path) -> str:
    """The format of the first line that has one; none for a file without any line."""
    whole = Piece(str(path), "", "", 0, path.stat().st_size)
    first: list[str] | None = None
    reason = ""
    for line in islice(_lines(file, whole, Counter()), _LINES_TO_JUDGE):
        one = _parse(line)
        if isinstance(one, str):
            reason = reason or one
            continue
        keys = list(one)  # nothing else is kept: a hundred lines may be too much for memory
        if any(set(required) <= set(keys) for required in REQUIRED.values()):
            return _format_of(keys, path)
        first = keys if first is None else first
    if first is None and reason:
        raise DataError(f"{path}: its first line cannot be used ({reason}); JSONL has one object in each line")
    return _format_of(first, path) if first is not None else ""


def _jsonl_rows(piece: Piece, dropped: Counter[str]) -> Iterator[Row]:
    try:
        with Path(piece.path).open("rb") as file:
            for line in _lines(file, piece, dropped):
                row = _parse(line)
                if isinstance(row, str):
                    dropped[row] += 1
                else:
                    yield row
    except OSError as error:
        raise DataError(f"{piece.path} cannot be read: {error.strerror or error}; give an intact file") from error


def _lines(file: BinaryIO, piece: Piece, dropped: Counter[str]) -> Iterator[bytes]:
    """The lines of a piece that are not empty."""
    file.seek(piece.first)
    while file.tell() < piece.last:
        at_start = file.tell() == 0
        line = file.readline(MAX_LINE)
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            _to_line_end(file)
            dropped[f"row: its line has over {MAX_LINE} bytes"] += 1
            continue
        if at_start:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield line


def _to_line_end(file: BinaryIO) -> None:
    while (part := file.readline(65536)) and not part.endswith(b"\n"):
        pass


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "row: not UTF-8"
    except RecursionError:
        return "row: JSON nested too deeply"
    except ValueError:
        return "row: broken JSON"
    return value if isinstance(value, dict) else "row: not a JSON object"
