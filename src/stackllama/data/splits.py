"""Which question belongs to which of the five splits, for good.

A question's split is a pure hash of its cluster (itself and its duplicates), so it needs no seed and does not depend on
what else is in the dump. A ledger remembers past assignments, so that later dumps, other fractions and newly found
duplicates move nothing: what was held out once stays held out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stackllama.errors import DataError, RunError

SPLITS = ("sft", "reward", "judge", "ppo", "eval")
EVAL = "eval"

Key = tuple[str, int]
"""(site, id) of a question."""

_SCHEMA = pa.schema(
    [
        pa.field("site", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ],
    metadata={"stackllama": "ledger 1"},
)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises DataError unless `fractions` are shares of known splits that add up to 1."""
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise DataError(f"no such split: {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
    if any(not 0 <= share <= 1 for share in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise DataError(
            f"the fractions {dict(fractions)} are not shares of 1; give numbers from 0 to 1 that add up to 1"
        )


def assign(site: str, id: int, fractions: Mapping[str, float]) -> str:  # noqa: A002 - the record's own word
    """The split of the cluster that (site, id) stands for: a hash of these two alone, compared with `fractions`."""
    check_fractions(fractions)
    return _assign(site, id, fractions)


def _assign(site: str, number: int, fractions: Mapping[str, float]) -> str:
    digest = blake2b(f"{site}\0{number}".encode(), digest_size=8, person=b"split").digest()
    point = int.from_bytes(digest, "big") / 2**64
    # 2**64 - 1 rounds up to a point of 1.0, and shares may add up to a hair less than 1: the last split takes these.
    shares = [(split, fractions[split]) for split in SPLITS if fractions.get(split, 0) > 0]
    edge = 0.0
    for split, share in shares:
        edge += share
        if point < edge:
            return split
    return shares[-1][0]


@dataclass(frozen=True, slots=True)
class Assignment:
    """`splits` has the split of each question that may be used; `dropped` the others, which may be used nowhere."""

    splits: Mapping[Key, str]
    dropped: frozenset[Key]


class Ledger:
    """Which questions were assigned in the past, and to which split?"""

    def __init__(self, past: Mapping[Key, str] | None = None) -> None:
        self.past: dict[Key, str] = dict(past or {})

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """The ledger in the file `path`, an empty one where there is none. Raises DataError where it is something
        else.
        """
        path = Path(path)
        try:
            if path.is_dir():  # pyarrow would read it as a table of many files
                raise DataError(f"the ledger {path} is a folder; name a file, such as {path / 'ledger.parquet'}")
            if not path.exists():
                return cls()
            table = pq.read_table(path, schema=_SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path} is no ledger of splits ({error}); restore it from a backup: without it, questions that were "
                f"held out "
                "could be trained on"
            ) from error
        columns = table.to_pydict()
        past = {(site, number): split for site, number, split in zip(*columns.values(), strict=True)}
        unknown = sorted(set(past.values()) - set(SPLITS))
        if unknown:
            raise DataError(f"{path} has unknown splits: {', '.join(unknown)}; the splits are {', '.join(SPLITS)}")
        return cls(past)

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Like `load`, and sure that the ledger can be saved again: a refusal comes before any work. Raises RunError
        where it cannot be.
        """
        ledger = cls.load(path)
        with _beside(Path(path)) as partial:
            partial.touch()
            partial.unlink()
        return ledger

    def save(self, path: Path) -> None:
        """Writes the ledger to `path`, whole or not at all; the same ledger gives the same bytes."""
        path = Path(path)
        entries = sorted(self.past.items())
        table = pa.table(
            {
                "site": [site for (site, _), _ in entries],
                "id": [number for (_, number), _ in entries],
                "split": [split for _, split in entries],
            },
            schema=_SCHEMA,
        )
        with _beside(path) as partial:
            with partial.open("wb") as file:
                pq.write_table(table, file, compression="zstd")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)

    def assign(
        self, questions: Iterable[Key], clusters: Mapping[Key, Key] | None = None, *, fractions: Mapping[str, float]
    ) -> Assignment:
        """The split of each question, remembered for the next time.

        `clusters` names for each question one member that stands for its cluster (any, but the same for all); a
        question that it lacks is a cluster of its own. Members that are in the dump of today or in the ledger count.

        - A cluster without a past goes where the hash of its smallest key points.
        - A cluster that touches eval goes to eval: its new members are eval, and those that were assigned to a training
          split before are dropped, since models may have been trained on them.
        - Any other cluster with a past goes where its smallest member with a past is; members that were assigned
          elsewhere are dropped, since no question and no duplicate of it may be in two splits.
        """
        check_fractions(fractions)
        wanted = set(questions)
        clusters = clusters or {}
        members: dict[Key, list[Key]] = {}
        # Clusters may be held together by questions of the past that are not in today's dump.
        for key in sorted(wanted | {key for key in clusters if key in self.past}):
            members.setdefault(clusters.get(key, key), []).append(key)
        splits: dict[Key, str] = {}
        dropped: set[Key] = set()
        for group in members.values():
            past = {key: self.past[key] for key in group if key in self.past}
            if EVAL in past.values():
                split = EVAL
            elif past:
                split = past[min(past)]
            else:
                split = _assign(*group[0], fractions)
            for key in group:
                if past.get(key, split) != split:
                    dropped.add(key)
                else:
                    splits[key] = split
        self.past.update(splits)
        return Assignment({key: split for key, split in splits.items() if key in wanted}, frozenset(dropped & wanted))


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields the name under which a file for `path` is begun, in a folder that is made where it is missing; RunError
    where the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise RunError(
            f"the ledger {path} cannot be written: {error.strerror or error}; make room, or name another file by "
            "data.ledger"
        ) from error
