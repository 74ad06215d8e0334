"""Dumps to posts in buckets: cut into pieces, converted in parallel. What is done is kept."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

from stackllama.data.building.convert import Conversion, Converted, convert, read_converted
from stackllama.data.building.shuffle import bucket_count
from stackllama.data.building.workers import Over
from stackllama.data.dump.archive import TABLES, open_tables
from stackllama.data.dump.pieces import RECORDS, Piece, Source, cut, cut_records, piece_size
from stackllama.data.interchange.rows import Frame
from stackllama.data.text import language
from stackllama.data.text.cleaning import OFF, Cleaning
from stackllama.environment import package_version
from stackllama.errors import DumpError
from stackllama.files import atomic_write_json, digest_json, read_json

Tell = Callable[[int, int], None]
"""Is told what is done and the total."""

LAYOUT = 2
"""Goes up when what lies in the folder of work changes between versions, or how large its pieces are, so that an older
one is not gone on with."""


@dataclass(slots=True)
class Gathered:
    """Posts in buckets. `posts` has the files of the pieces of Posts and the number of each one's source.

    `rows` and `users` count rows of Posts and Users, `questions` the rows that are questions, `dropped` those left out
    by reason; `truncated` has, by dump and table, the byte after the last complete row of what breaks off; `languages`
    has for each site what `language.look` found.
    """

    sources: tuple[Source, ...]
    buckets: int
    posts: list[tuple[Path, int]] = field(default_factory=list)
    rows: int = 0
    questions: int = 0
    users: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: dict[str, dict[str, int]] = field(default_factory=dict)
    languages: dict[str, language.Report] = field(default_factory=dict)


def gather(
    sources: Sequence[Source],
    folder: Path,
    over: Over,
    *,
    allow_truncated: bool,
    frame: Frame = ("", ""),
    near_copies: bool = False,
    cleaning: Cleaning = Cleaning(),  # noqa: B008 - it is frozen
    tell: Tell,
) -> Gathered:
    """Convert the sources into `folder`, piece by piece; what is done is left alone.

    `tell` is told the bytes of the tables, decompressed. Raises DumpError where a dump cannot be used,
    TruncatedDumpError for one that is cut off (unless that is allowed), RunError where the disk is full.
    """
    with ExitStack() as stack:
        records = {one.number: list(cut_records(one)) for one in sources if not one.site}
        tables = {one.number: stack.enter_context(open_tables(Path(one.path))) for one in sources if one.site}
        loading = language.load() if cleaning.language != OFF else None
        total = sum(one.size(TABLES) for one in tables.values())
        total += sum(piece.stop - piece.start for pieces in records.values() for piece in pieces)
        size = piece_size(total)
        cuts = [cut(one, tables[one.number], TABLES, size) if one.site else records[one.number] for one in sources]
        gathered = Gathered(tuple(sources), bucket_count(total, size))
        conversion = Conversion(folder, gathered.buckets, allow_truncated, frame, near_copies, cleaning)
        done, left = 0, {source.number: 0 for source in sources}
        tell(0, total)
        for piece, converted in _converted(conversion, chain.from_iterable(cuts), over):
            _add(gathered, piece, converted, folder)
            left[piece.source.number] += converted.questions
            done += piece.stop - piece.start
            tell(done, total)
    for source in sources:
        if not left[source.number]:
            raise DumpError(
                f"{source.path} has no question that can be used in {gathered.rows} rows of posts; give the dump of a "
                "question-and-answer site, or preference data"
            )
    gathered.posts.sort()
    gathered.dropped = Counter(dict(sorted(gathered.dropped.items())))
    if loading is not None:
        loading.join()
        gathered.languages = language.look(path.with_suffix(".sample") for path, _ in gathered.posts)
    return gathered


def prepare(folder: Path, plan: Mapping[str, object]) -> None:
    """Make the folder of work for a plan: all that decides what the pieces become. What was left by an older plan, or
    by another version of the program, is removed.

    Raises RunError where the disk is full or refuses.
    """
    digest = digest_json({"layout": LAYOUT, "version": package_version("stackllama"), **plan})
    kept = folder / "plan.json"
    if not (kept.exists() and read_json(kept) == digest):
        shutil.rmtree(folder, ignore_errors=True)
        atomic_write_json(kept, digest)


def _converted(conversion: Conversion, pieces: Iterator[Piece], over: Over) -> Iterator[tuple[Piece, Converted]]:
    """Every piece with what came of it; those that were done before are told as they are passed."""
    kept: list[tuple[Piece, Converted]] = []

    def to_do() -> Iterator[Piece]:
        for piece in pieces:
            if (done := read_converted(conversion.folder, piece.name)) is None:
                yield piece
            else:
                kept.append((replace(piece, data=None), done))

    for done in over(to_do(), partial(convert, conversion)):
        yield done
        yield from kept
        kept.clear()
    yield from kept


def _add(gathered: Gathered, piece: Piece, converted: Converted, folder: Path) -> None:
    gathered.dropped.update(converted.dropped)
    if converted.truncated_at is not None:
        gathered.truncated.setdefault(str(piece.source.path), {})[piece.table] = converted.truncated_at
    if piece.table in ("Posts", RECORDS):
        gathered.rows += converted.rows
        gathered.questions += converted.questions
        gathered.posts.append((folder / f"{piece.name}.arrow", piece.source.number))
    elif piece.table == "Users":
        gathered.users += converted.rows - sum(converted.dropped.values())
