"""One piece of a table, read, converted and cleaned, as files that the later steps join.

    NAME.arrow       posts, dealt to buckets by their question
    NAME.parquet     what joins by id: of posts (bucket, question, id, owner), users, votes or links
    NAME.*.npy       signatures of questions, and their bands; NAME.asked says whose they are
    NAME.sample      questions by which the language of their site is told
    NAME.json        counts, written last: a piece whose JSON is there is done

A function of the piece and the settings alone, so pieces are converted in any order, by any number of processes, here
or on a cluster, and a build that was stopped keeps those that are done.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stackllama.data.building.records import mended, to_rows
from stackllama.data.building.shuffle import POSTS, bucket_of, write_dealt
from stackllama.data.dump.attributes import Attributes
from stackllama.data.dump.parsing import LINKS, USERS, VOTES, parse_links, parse_posts, parse_users, parse_votes
from stackllama.data.dump.pieces import Piece
from stackllama.data.dump.rows import rows
from stackllama.data.interchange import reading as interchange_read
from stackllama.data.interchange.rows import Frame
from stackllama.data.split.duplicates import ASKED, band_keys, signatures
from stackllama.data.text import language
from stackllama.data.text.cleaning import OFF, Cleaning, clean_posts
from stackllama.errors import DumpError
from stackllama.files import atomic_write_json, raise_if_full

_SOURCE = pa.field("source", pa.int32())
KEYS = {
    "Posts": pa.schema(
        {
            "source": pa.int32(),
            "bucket": pa.int32(),
            "question": pa.int64(),
            "id": pa.int64(),
            "answers": pa.bool_(),
            "owner": pa.int64(),
        }
    ),
    "Users": pa.schema([_SOURCE, *USERS]),
    "Votes": pa.schema([_SOURCE, *VOTES]),
    "PostLinks": pa.schema([_SOURCE, *LINKS]),
}
"""What each table leaves to be joined by id."""

Dropped = Counter[str]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What decides how a piece is converted, beside the piece. `folder` is where its files go; `frame` is what the
    template puts around a question (`interchange.frame`).
    """

    folder: Path
    buckets: int
    allow_truncated: bool = False
    frame: Frame = ("", "")
    near_copies: bool = True
    cleaning: Cleaning = field(default_factory=Cleaning)


@dataclass(frozen=True, slots=True)
class Converted:
    """What came of a piece: the rows of its table, the questions kept, the rows dropped by reason (and what was changed
    in texts), and the byte after the last complete row where the table breaks off.
    """

    rows: int
    questions: int
    dropped: Mapping[str, int]
    truncated_at: int | None


def convert(conversion: Conversion, piece: Piece) -> Converted:
    """Convert a piece and write its files.

    Raises DumpError where the piece is damaged, TruncatedDumpError where it is cut off (unless that is allowed), and
    RunError where the disk is full.
    """
    path = conversion.folder / piece.name
    try:
        converted = _convert(conversion, piece, path)
        atomic_write_json(path.with_suffix(".json"), asdict(converted))
    except DumpError as error:
        error.args = (f"{piece.source.path}: {error}",)
        raise
    except OSError as error:
        raise_if_full(error, path)
        raise
    return converted


def read_converted(folder: Path, name: str) -> Converted | None:
    """What came of the piece of that name; None where it is not done."""
    try:
        return Converted(**json.loads((folder / f"{name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _convert(conversion: Conversion, piece: Piece, path: Path) -> Converted:
    dropped: Dropped = Counter()
    questions = 0
    if piece.records is not None:
        return _convert_records(conversion, piece.records, path)
    with piece.open() as stream:
        reader = rows(stream, table=piece.table, allow_truncated=conversion.allow_truncated, place=piece.place)
        if piece.table == "Posts":
            lots = [parse_posts(lot, piece.source.site, dropped) for lot in reader.lots()]
            posts = pa.concat_tables([POSTS.empty_table(), *lots]).combine_chunks()
            posts = clean_posts(posts, conversion.cleaning, dropped)
            keys = _deal(posts, piece, conversion.buckets, path)
            _look_at(conversion, posts, path)
            questions = posts.num_rows - pc.sum(posts["answers"], min_count=0).as_py()
        else:
            parse = _PARSERS[piece.table]
            keys = _keys_table(piece, [parse(lot, dropped) for lot in reader.lots()])
    pq.write_table(keys, path.with_suffix(".parquet"), compression="lz4")
    return Converted(reader.complete, questions, dict(sorted(dropped.items())), reader.truncated_at)


def _keys_table(piece: Piece, lots: list[pa.Table]) -> pa.Table:
    schema = KEYS[piece.table]
    if not lots:
        return schema.empty_table()
    found = pa.concat_tables(lots)
    source_N = np.full(found.num_rows, piece.source.number, np.int32)
    return pa.table([source_N, *found.columns], schema=schema)


def _convert_records(conversion: Conversion, records: interchange_read.Piece, path: Path) -> Converted:
    reasons: Dropped = Counter()
    found = to_rows(interchange_read.read_piece(records, reasons, frame=conversion.frame))
    dropped: Dropped = Counter()
    posts = clean_posts(found, conversion.cleaning, dropped)
    if posts is not found:
        posts = mended(posts, dropped)
    bucket_N = bucket_of(posts["site"], posts["question"].to_numpy(), conversion.buckets)
    write_dealt(path.with_suffix(".arrow"), posts, bucket_N)
    _look_at(conversion, posts, path)
    questions = posts.num_rows - pc.sum(posts["answers"], min_count=0).as_py()
    dropped.update({f"record: {reason}": count for reason, count in reasons.items()})
    return Converted(found.num_rows, questions, dict(sorted(dropped.items())), None)


def _look_at(conversion: Conversion, posts: pa.Table, path: Path) -> None:
    """Write what the search for near-copies needs of the questions, and what tells their language."""
    if conversion.cleaning.language != OFF:
        language.write_sample(posts, path.with_suffix(".sample"))
    asked = posts.filter(pc.invert(posts["answers"])).combine_chunks()
    if not (conversion.near_copies and asked.num_rows):
        return
    texts = pc.binary_join_element_wise(asked["title"], asked["text"], "\n").to_pylist()
    signature_NK = signatures(texts)
    np.save(path.with_suffix(".signatures.npy"), signature_NK)
    np.save(path.with_suffix(".bands.npy"), band_keys(signature_NK))
    table = pa.table([asked["site"].dictionary_encode().cast(ASKED.field("site").type), asked["id"]], schema=ASKED)
    with pa.OSFile(str(path.with_suffix(".asked")), "wb") as sink, pa.ipc.new_file(sink, ASKED) as writer:
        writer.write_table(table.unify_dictionaries().combine_chunks())


def _deal(posts: pa.Table, piece: Piece, buckets: int, path: Path) -> pa.Table:
    """Write the posts, dealt to buckets; gives what joins them by id."""
    bucket_N = bucket_of(piece.source.site, posts["question"].to_numpy(), buckets)
    write_dealt(path.with_suffix(".arrow"), posts, bucket_N)
    source_N = np.full(posts.num_rows, piece.source.number, np.int32)
    shared = [posts[name] for name in ("question", "id", "answers", "owner")]
    return pa.table([source_N, bucket_N, *shared], schema=KEYS["Posts"])


_PARSERS: Mapping[str, Callable[[Attributes, Dropped], pa.Table]] = {
    "Users": parse_users,
    "Votes": parse_votes,
    "PostLinks": parse_links,
}
