"""A page as a browser has it: what is wrong with it in Chromium, on a screen, on a phone, in the dark and in print.

python -m tests.report.browser runs/quickstart/report.html
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST_BYTES = 5_000_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENS = {"wide": (1200, 900, "light"), "phone": (390, 844, "dark")}
SHOWN = """() => [...document.querySelectorAll('svg')].filter(svg => {
  const box = svg.getBoundingClientRect();
  const end = document.documentElement.clientWidth + 1;
  const inside = box.width > 60 && box.height > 40 && box.left >= -1 && box.right <= end;
  return !inside || getComputedStyle(svg).visibility !== 'visible';
}).map(svg => (svg.getAttribute('aria-label') ?? 'without a label').slice(0, 60))"""
"""The figures that are not to be seen; what is folded has been opened before."""


def executable() -> str | None:
    """The browser of this machine; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Playwright's browser. Raises ImportError where Playwright is not installed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable())
        try:
            yield opened
        finally:
            opened.close()


def faults(opened: Any, path: Path) -> list[str]:
    """What is wrong with a page of its own file; nothing where all is well."""
    found = [f"{path.stat().st_size:,} bytes"] if path.stat().st_size > MOST_BYTES else []
    for name, (width, height, scheme) in SCREENS.items():
        said = _faults(opened, path, {"width": width, "height": height}, scheme)
        found += [f"{name}, {scheme}: {one}" for one in said]
    return found


def _faults(opened: Any, path: Path, viewport: dict[str, int], scheme: str) -> list[str]:
    context = opened.new_context(viewport=viewport, color_scheme=scheme)
    page = context.new_page()
    found: list[str] = []
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    address = path.resolve().as_uri()
    page.on("request", lambda asked: found.extend([f"request: {asked.url}"] if asked.url != address else []))
    page.goto(address)
    if scheme == "light":  # paper shows what is folded, opened or not
        page.emulate_media(media="print")
        found += [f"print: {one}" for one in _accessibility(page)]
        found += [f"print: figure not seen: {label}" for label in page.evaluate(SHOWN)]
        page.emulate_media(media="screen")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found += [f"figure not seen: {label}" for label in page.evaluate(SHOWN)]
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        found.append("wider than the screen")
    found += _accessibility(page)
    context.close()
    return found


def _accessibility(page: Any) -> list[str]:
    """What axe-core finds: contrast, names, roles, order of headings, reach by keyboard."""
    from axe_playwright_python.sync_playwright import Axe

    result = Axe().run(page).response
    return [
        f"{rule['id']}: {node['target']} {node.get('failureSummary', '')[:200]}"
        for rule in result["violations"]
        for node in rule["nodes"]
    ]


if __name__ == "__main__":
    pages = [Path(name) for name in sys.argv[1:]]
    if executable() is None:
        print("there is no Chromium here: the pages were not looked at")
        sys.exit()
    with browser() as chromium:
        wrong = [f"{page}: {one}" for page in pages for one in faults(chromium, page)]
    print("\n".join(wrong or [f"{page}: nothing wrong" for page in pages]))
    sys.exit(bool(wrong))
