"""`stackllama data fetch | stats | show | export`: what there is to do with data beside building them.

Each takes the options of the command line, prints what was asked for, and gives the next command's words.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from stackllama.data import fetch as fetching
from stackllama.data import interchange_write, listing, store
from stackllama.data.remote import Patience
from stackllama.errors import DataError, RecipeError
from stackllama.files import readable_size
from stackllama.recipe import PUBLIC_DUMP
from stackllama.recipe_load import load_recipe
from stackllama.tokens.template import question_text, root_text
from stackllama.train.metrics import progress

Words = Sequence[str | Path]
PATIENCE = Patience()


def fetch(options: Namespace) -> Words:
    """Download the archives of sites; or list what is there."""
    sha256 = (options.sha256 or "").lower()
    if options.sha256 and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise RecipeError(f"--sha256 {options.sha256} is not allowed: it must be 64 hexadecimal digits")
    if not (options.sites or options.list):
        raise RecipeError("no site is named; give one, such as beer.stackexchange.com, or --list")
    address = _address(options)
    place = listing.open_place(address, patience=PATIENCE, note=print)
    if options.list:
        return _list(place, address, options.sites)
    archives = {one.name: one for site in options.sites for one in listing.find(place, site)}
    if sha256 and len(archives) != 1:
        raise RecipeError(f"--sha256 is of one archive, and here are {len(archives)}: {', '.join(archives)}")
    found = []
    for archive in archives.values():
        one = fetching.fetch(archive, Path(options.to), show=progress, patience=PATIENCE, sha256=sha256 or None)
        print(_told(one, archive))
        found.append(one.path)
    return _run_on(found, options.recipe)


def _address(options: Namespace) -> str:
    """Where the archives lie."""
    if options.address and options.recipe:
        raise RecipeError("--address and --recipe both say where the archives lie; give one of them")
    if options.recipe:
        return load_recipe(options.recipe).data.address
    return str(options.address or PUBLIC_DUMP)


def _list(place: listing.Place, address: str, words: Sequence[str]) -> Words:
    """Print the archives whose names have one of the words in them, or all."""
    if not isinstance(place, listing.ListedPlace):
        raise DataError(
            f"{address} has no list of its archives, as items of the Internet Archive have (ITEM_files.xml); name a "
            "SITE, or give another --address"
        )
    archives = [one for name, one in place.archives.items() if not words or any(word in name for word in words)]
    for one in archives:
        print(f"{readable_size(one.size):>10}  {one.name}")
    print(f"{readable_size(sum(one.size for one in archives)):>10}  in {len(archives):,} archives")
    if place.refused:
        print(f"{place.refused:,} are left out: their names or sizes cannot be used")
    return ("data", "fetch", "SITE", *(("--address", address) if address != PUBLIC_DUMP else ()))


def _told(one: fetching.Fetched, archive: listing.Archive) -> str:
    """What there is to say of an archive that is there now."""
    checked = f"size and {' and '.join(one.hashes)} are right" if one.hashes else "its size is right"
    if not archive.hashes:
        checked += "; the address has no hash of it to compare"
    size = readable_size(one.path.stat().st_size)
    return f"{one.path}: {'complete already' if one.was_there else 'downloaded'}, {size}, {checked}"


def _run_on(archives: Sequence[Path], recipe: str | None) -> Words:
    """The command that uses the archives; one of Posts brings those beside it."""
    dumps = [str(path) for path in archives if not re.search("-(?!Posts$)[A-Z][A-Za-z]+$", path.stem)]
    if not dumps:
        return ()
    source = dumps[0] if len(dumps) == 1 else yaml.safe_dump(dumps, default_flow_style=True, width=1 << 20).strip()
    name = "-".join(re.sub(r"(\.stackexchange)?\.(com|net)(-Posts)?$", "", Path(dump).stem) for dump in dumps[:3])
    return ("run", recipe or "smollm2-beer", "--data.source", source, "--name", name[:100])


def export(options: Namespace) -> Words:
    """Write preference data in a format of other tools."""
    folder, to = _store(Path(options.path)), Path(options.to)
    titles = not options.no_titles

    def render(title: str, body: str) -> str:
        return root_text(question_text(title if titles else "", body))

    written = interchange_write.write(
        folder, to, format=options.format, splits=options.split, render=render, fixed_order=options.fixed_order
    )
    for split, rows in written.rows.items():
        print(f"{split}: {rows:,} rows")
    for what, count in written.counts.items():
        print(f"{what}: {count:,}")
    print(f"{to}: written; ATTRIBUTION.jsonl there names the authors, and has to travel with the data")
    return ()


def _store(path: Path) -> Path:
    """The folder of preference data at `path`, or in the run there."""
    for folder in (path, path / "data"):
        if (folder / store.MANIFEST).is_file():
            return folder
    raise DataError(f"{path} holds no preference data; give a run whose data were built, or a folder of such data")


COMMANDS: Mapping[str, Callable[[Namespace], Words]] = {"fetch": fetch, "export": export}
