"""How many posts survive HTML to Markdown and back, and how fast each renderer is. Real dumps, one process, one core.

    python benchmarks/markup.py FOLDER [--rounds 5]

Measures ours, and of markdownify, html-to-markdown and html2text those that are installed, each with the options that
lose the fewest posts here (with more escapes all lose more: they escape inside formulas). A post survives if its
Markdown, rendered again, shows the same text, structure, code, formulas, links, images and emphasis
(tests/data/rendering.py). Speed is of the conversion alone, the median of the rounds, the renderers taking turns. The
last line is one JSON object. docs/decisions/0002-own-markdown-renderer.md has the result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the reader belongs to the tests

from tests.data.rendering import reader, shown

from stackllama.data.dump.archive import open_tables
from stackllama.data.dump.rows import rows
from stackllama.data.text.markup import to_markdown

Convert = Callable[[str], str]


def of_markdownify() -> Convert:
    converter = importlib.import_module("markdownify").MarkdownConverter(
        heading_style="ATX", sub_symbol="<sub>", sup_symbol="<sup>", escape_asterisks=False, escape_underscores=False
    )
    return lambda html: str(converter.convert(html))


def of_html_to_markdown() -> Convert:
    library = importlib.import_module("html_to_markdown")
    options = library.ConversionOptions(sub_symbol="<sub>", sup_symbol="<sup>", whitespace_mode="strict")
    return lambda html: str(library.convert(html, options).content)


def of_html2text() -> Convert:
    library = importlib.import_module("html2text")

    def convert(html: str) -> str:
        converter = library.HTML2Text(bodywidth=0)
        converter.unicode_snob = converter.include_sup_sub = True
        return str(converter.handle(html))

    return convert


OTHERS = {"markdownify": of_markdownify, "html-to-markdown": of_html_to_markdown, "html2text": of_html2text}


def bodies_in(folder: Path) -> list[str]:
    """All bodies under a folder that holds folders of tables and archives."""
    bodies = []
    for path in sorted([*folder.glob("*.7z"), *(table.parent for table in folder.glob("*/Posts.xml"))]):
        with open_tables(path) as tables:
            for _, stream in tables.streams(["Posts"]):
                table = rows(stream, table="Posts", allow_truncated=True)
                bodies += [row["Body"].replace("\r\n", "\n") for row in table]
    return bodies


def lost(convert: Convert, bodies: list[str]) -> Counter[str]:
    """How many bodies show something else, in all ("posts") and by what differs."""
    markdown, counts = reader(), Counter(dict.fromkeys(["posts", "text", "blocks", "spans", "formulas"], 0))
    for body in bodies:
        before, after = vars(shown(body)), vars(shown(markdown.render(convert(body)), rendered=True))
        differing = [name for name, value in before.items() if value != after[name]]
        counts.update(differing + ["posts"] * bool(differing))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds folders of tables and .7z archives")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    renderers = {"ours": to_markdown}
    for name, of_library in OTHERS.items():
        try:
            renderers[name] = of_library()
        except ImportError:
            print(f"{name} is not installed: left out")
    bodies = bodies_in(given.folder)
    size = sum(len(body.encode()) for body in bodies) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in renderers}
    for _ in range(given.rounds):
        for name, convert in renderers.items():
            start = time.process_time()
            for body in bodies:
                convert(body)
            seconds[name].append(time.process_time() - start)
    told = {}
    for name, convert in renderers.items():
        counts = lost(convert, bodies)
        told[name] = {"MB/s": round(size / statistics.median(seconds[name]), 1), "lost": dict(counts)}
        speed = f"{told[name]['MB/s']:>6} MB/s"
        print(f"{name:<18}{speed}  posts lost {counts['posts']:>5} of {len(bodies):,}  {dict(counts)}")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
