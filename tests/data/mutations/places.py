"""What can be wrong with files and folders: links that lead outside or nowhere, pipes, odd names, holes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random

NAMES = (
    "x\n.xml",
    "\udcff\udcfe.xml",
    "n" * 251 + ".xml",
    " Users.xml",
    "-rf",
    "users.XML",
    "POSTS.XML",
    "Posts.xml~",
    ".Users.xml",
    "Users.xml.bak",
    "a.jsonl",
    "b.parquet",
    "Posts.7z",
    "Ü.xml",
)


DEVICES = ("/dev/null", "/dev/full", "/dev/tty")


def _one(rng: Random, folder: Path) -> Path:
    files = sorted(one for one in folder.iterdir() if one.is_file() and not one.is_symlink())
    return rng.choice(files) if files else folder / "Posts.xml"


def link_outside(rng: Random, folder: Path) -> None:
    """A table that is a link to what lies beside the folder."""
    one = _one(rng, folder)
    target = folder.parent / f"canary{one.suffix if one.suffix in ('.xml', '.jsonl') else '.xml'}"
    one.unlink(missing_ok=True)
    one.symlink_to(rng.choice((target, Path("..") / target.name)))


def link_inside(rng: Random, folder: Path) -> None:
    one = _one(rng, folder)
    if one.exists():
        other = one.rename(folder / f"real{rng.choice(('', '.txt', '.bin'))}")
        one.symlink_to(other.name)


def link_elsewhere(rng: Random, folder: Path) -> None:
    one = _one(rng, folder)
    one.unlink(missing_ok=True)
    one.symlink_to(
        rng.choice((one.name, "nowhere", "/dev/zero", "/dev/null", "..", ".", "/etc/passwd", "/proc/self/mem"))
    )


def linked_folder(rng: Random, folder: Path) -> None:
    (folder / "inner").symlink_to(rng.choice(("..", "/etc", ".", "inner")))


def pipe(rng: Random, folder: Path) -> None:
    """A named pipe that nobody writes to: whoever opens it waits for ever."""
    one = _one(rng, folder)
    one.unlink(missing_ok=True)
    os.mkfifo(one)


def folder_for_file(rng: Random, folder: Path) -> None:
    one = _one(rng, folder)
    one.unlink(missing_ok=True)
    one.mkdir()
    if rng.random() < 0.5:
        (one / "Posts.xml").write_bytes(b"<posts></posts>")


def unreadable(rng: Random, folder: Path) -> None:
    """For all but the superuser, who reads everything."""
    one = _one(rng, folder)
    if one.exists():
        one.chmod(0)


def odd_names(rng: Random, folder: Path) -> None:
    for _ in range(rng.choice((1, 3))):
        one, other = _one(rng, folder), folder / rng.choice(NAMES)
        if rng.random() < 0.5:
            other.write_bytes(rng.choice((b"", b"x", b"<users></users>")))
        elif one.exists() and not other.exists():
            one.rename(other)


def hole(rng: Random, folder: Path) -> None:
    """Zeros to the end of a file that claims to be large."""
    one = _one(rng, folder)
    if one.exists():
        os.truncate(one, one.stat().st_size + rng.choice((100_000, 30 << 20, 300 << 20)))


def deeper(rng: Random, folder: Path) -> None:
    """The tables lie one folder further down."""
    inner = folder / rng.choice(("inner", "Posts.xml.d", "a.jsonl"))
    inner.mkdir()
    for one in sorted(folder.iterdir()):
        if one != inner:
            one.rename(inner / one.name)


PLACES: dict[str, Callable[[Random, Path], None]] = {
    one.__name__: one
    for one in (
        *(link_outside, link_inside, link_elsewhere, linked_folder, pipe, folder_for_file, unreadable, odd_names, hole),
        deeper,
    )
}


def odd_place(rng: Random, folder: Path) -> str:
    """What is given instead of a place that is there."""
    name = rng.choice(("Posts.xml", "x.jsonl", "x.parquet", "x.7z", "x"))
    path = folder / name
    kind = rng.choice(("missing", "long", "deep", "nul", "pipe", "loop", "folder", "surrogate", "device", "hub"))
    if kind == "long":
        return str(folder / ("n" * rng.choice((256, 5000)) + name))
    if kind == "deep":
        return str(folder / ("d/" * 2500 + name))
    if kind == "nul":
        return str(folder / f"a\0{name}")
    if kind == "surrogate":
        return str(folder / f"\ud800{name}")
    if kind == "device":
        return rng.choice(DEVICES)
    if kind == "hub":
        return rng.choice(("hub:", "hub:a", "hub:a/b/../../c", "hub:\ud800/x"))
    folder.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "folder":
        path.mkdir()
    return str(path)
