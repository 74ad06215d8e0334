"""One bad input out of a seed: a small good one, and a mutation or a few."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from stackllama.data.building.build import Settings
from stackllama.data.pairs.rules import PairRules
from stackllama.data.split.clusters import Clustering
from stackllama.data.text.cleaning import Cleaning
from tests.data.mutations import archives, markup, places, records, rows
from tests.data.mutations.raw import RAW
from tests.data.mutations.seven import written

FRACTIONS = {"sft": 0.4, "reward": 0.3, "judge": 0.0, "ppo": 0.1, "eval": 0.2}
RULES = (
    PairRules(),
    PairRules(max_pairs=2, time="since_later"),
    PairRules(score="votes", conflict="drop", weight="votes", margin=0.5, time="since_later", skip_days=2),
    PairRules(
        near_copies=0.8, length_ratio=2.0, min_votes=1, posted_within_days=30, weight="pairs", conflict="accepted"
    ),
    PairRules(min_gap=2, conflict="votes", time="since_later"),
)
CLEANING = (
    Cleaning(),
    Cleaning(control_tokens="break", emails="mask", secrets="mask", link_only="drop", language="check"),
    Cleaning(control_tokens="drop", emails="drop", secrets="drop", link_only="drop", language="drop"),
)
HUGE = 0.01
"""Share of the inputs that are large, so that they cost seconds and not milliseconds."""
DUMPS, DATA = ("folder", "file", "archive", "archives"), ("lines", "columns", "files")


@dataclass
class Mutant:
    """A bad input: what is given to a build, and how it came to be."""

    seed: int
    shape: str
    steps: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    site: str | None = None
    small: bool = False
    ledger: bytes | None = None
    settings: Settings = Settings(FRACTIONS, PairRules())  # noqa: RUF009 - frozen


def make(seed: int, folder: Path) -> Mutant:
    """The input of that seed, written to `folder`; beside it stand the canaries (`watching.Scene`)."""
    rng = Random(seed)
    mutant = Mutant(seed, rng.choices((*DUMPS, *DATA, "place"), (34, 10, 24, 3, 13, 10, 3, 3))[0])
    mutant.site = rng.choice(("embedded.test", None, "a b/ü"))
    links = rng.choice(("off", "duplicates", "all"))
    mutant.settings = Settings(
        FRACTIONS,
        rng.choice(RULES),
        Clustering(rng.random() < 0.5, links),
        rng.choice(CLEANING),
        allow_truncated=rng.random() < 0.5,
        frame=rng.choice((("", ""), ("Question: ", "\n\nAnswer:"))),
    )
    huge = rng.random() < HUGE
    mutant.small = rng.random() < 0.5 and not huge
    if mutant.shape in DUMPS:
        _dump(rng, mutant, folder, huge)
    elif mutant.shape in DATA:
        _data(rng, mutant, folder, huge)
    else:
        mutant.given.append(places.odd_place(rng, folder))
    if rng.random() < 0.05:
        _with_another(rng, mutant, folder)
    if rng.random() < 0.03:
        mutant.ledger = _apply(rng, mutant, "ledger", RAW, records.ledger(rng))
    return mutant


def _apply(rng: Random, mutant: Mutant, kind: str, known: Mapping[str, Any], *given: Any) -> Any:
    """One of the mutations that are known, and its name to the steps."""
    name = rng.choice(sorted(known))
    mutant.steps.append(f"{kind}: {name}")
    return known[name](rng, *given)


def _levels(rng: Random, levels: Mapping[str, int], huge: bool) -> list[str]:
    """At which levels something goes wrong; mostly at one. What is large is mostly wrong in that alone."""
    if huge and rng.random() < 0.7:
        return []
    count = rng.choices((1, 2, 3, 6), (55, 25, 15, 5))[0]
    return rng.choices([*levels], [*levels.values()], k=count)


def _dump(rng: Random, mutant: Mutant, folder: Path, huge: bool) -> None:
    packed = mutant.shape in ("archive", "archives")
    levels = _levels(
        rng, {"rows": 35, "markup": 30, "bytes": 15, "archive" if packed else "place": 40 if packed else 8}, huge
    )
    tables = rows.tables()
    for _ in range(levels.count("rows")):
        _apply(rng, mutant, "rows", rows.ROWS, tables)
    at = rng.choice(("rows", "markup", "archive") if packed else ("rows", "markup")) if huge else ""
    if at == "rows":
        _apply(rng, mutant, "rows", rows.HUGE_ROWS, tables)
    files = {name: markup.rendered(name, some) for name, some in tables.items()}
    for level in ["markup"] * levels.count("markup") + ["huge"] * (at == "markup") + ["bytes"] * levels.count("bytes"):
        name = "Posts" if rng.random() < 0.6 and "Posts" in files else rng.choice(sorted(files))
        if level == "bytes":
            files[name] = _apply(rng, mutant, name, RAW, files[name])
        else:
            known = markup.XML if level == "markup" else markup.HUGE_XML
            files[name] = _apply(rng, mutant, name, known, files[name], folder.parent / "canary.xml")
    if packed:
        _pack(rng, mutant, folder, files, levels.count("archive"), at == "archive")
        return
    inside = folder / _folder_name(rng)
    inside.mkdir(parents=True)
    for name, content in files.items():
        (inside / f"{name}.xml").write_bytes(content)
    _displace(rng, mutant, inside, levels.count("place"))
    posts = inside / "Posts.xml"
    # A link that is given by its own name is meant, wherever it leads; so it is not given.
    mutant.given.append(str(inside if mutant.shape == "folder" or posts.is_symlink() else posts))


def _displace(rng: Random, mutant: Mutant, folder: Path, count: int) -> None:
    for _ in range(count):
        with suppress(FileExistsError, IsADirectoryError):  # an earlier one may have left it no room
            _apply(rng, mutant, "folder", places.PLACES, folder)


def _folder_name(rng: Random) -> str:
    """The site's name, where nobody gives another; in the folder itself, so that `..` leads to the canaries."""
    return rng.choice((".", ".", ".", ".", "beer.stackexchange.com", "a b\n", "\udcff\udce4", "x" * 255, "-", "%2e%2e"))


def _pack(rng: Random, mutant: Mutant, folder: Path, files: dict[str, bytes], count: int, huge: bool) -> None:
    folder.mkdir(parents=True)
    apart = mutant.shape == "archives"
    parts = [({name: content}, f"site-{name}.7z") for name, content in files.items()] if apart else [(files, "site.7z")]
    chosen = rng.randrange(len(parts))
    for at, (tables, name) in enumerate(parts):
        contents = archives.honest(tables, rng)
        for _ in range(count if at == chosen else 0):
            _apply(rng, mutant, name, archives.ARCHIVES, contents)
        if huge and at == chosen:
            _apply(rng, mutant, name, archives.HUGE_ARCHIVES, contents)
        content = written(contents)
        if at == chosen and rng.random() < 0.2:
            content = _apply(rng, mutant, name, RAW, content)
        (folder / name).write_bytes(content)
    mutant.given.append(str(folder / ("site-Posts.7z" if apart else "site.7z")))


def _data(rng: Random, mutant: Mutant, folder: Path, huge: bool) -> None:
    folder.mkdir(parents=True)
    kinds = {"lines": [".jsonl"], "columns": [".parquet"], "files": [".jsonl", ".parquet", ".jsonl"]}[mutant.shape]
    levels = _levels(rng, {"records": 60, "bytes": 40} | ({"place": 30} if len(kinds) > 1 else {}), huge)
    for number, suffix in enumerate(kinds):
        path = folder / f"train-{number}{suffix}"
        some = records.records(rng)
        for _ in range(levels.count("records")):
            _apply(rng, mutant, path.name, records.RECORDS, some)
        bomb = huge and suffix == ".parquet" and rng.random() < 0.5
        if huge and number == 0 and not bomb:
            _apply(rng, mutant, path.name, records.HUGE_RECORDS, some)
        if suffix == ".jsonl":
            path.write_bytes(records.as_lines(rng, some))
        elif bomb:
            _apply(rng, mutant, path.name, {"bomb": records.bomb}, path)
        else:
            records.as_parquet(rng, some, path)
        for _ in range(levels.count("bytes")):
            path.write_bytes(_apply(rng, mutant, path.name, RAW, path.read_bytes()))
    _displace(rng, mutant, folder, levels.count("place"))
    mutant.given.append(str(folder if len(kinds) > 1 else folder / f"train-0{kinds[0]}"))


def _with_another(rng: Random, mutant: Mutant, folder: Path) -> None:
    """A second source: the same once more, or a good one."""
    mutant.steps.append("a second source")
    if rng.random() < 0.4:
        mutant.given.append(mutant.given[0])
        return
    good = folder.with_name(f"{folder.name}-too")
    shutil.rmtree(good, ignore_errors=True)
    good.mkdir(parents=True)
    for name, some in rows.tables().items():
        (good / f"{name}.xml").write_bytes(markup.rendered(name, some))
    mutant.given.insert(rng.randint(0, 1), str(good))
