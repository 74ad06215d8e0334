"""`stackllama data fetch`, as typed: what it prints, where it writes, how it fails."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from stackllama import data_commands
from stackllama.arguments import parse
from stackllama.cli import main
from stackllama.data.download import listing as listing_module
from stackllama.data.download.remote import Patience
from stackllama.files import readable_size
from stackllama.recipe import PUBLIC_DUMP
from stackllama.recipe_load import load_recipe
from tests.data.dumps import shared_dumps
from tests.data.web import Page, Web, listing, packed, serve

Capture = pytest.CaptureFixture[str]
BEER = "beer.stackexchange.com.7z"
TABLES = [f"stackoverflow.com-{table}.7z" for table in ("Posts", "Users", "Votes", "PostLinks")]
FILES = {name: packed(bulk=20_000, seed=number) for number, name in enumerate([BEER, "coffee.7z", *TABLES])}
SIZE = readable_size(len(FILES[BEER]))


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    """A server with some archives, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_commands, "PATIENCE", Patience(5.0, (0.001, 0.001)))
    with serve() as found:
        found.pages = {f"/dump/{name}": Page(content) for name, content in FILES.items()}
        found.pages["/dump/dump_files.xml"] = Page(listing(FILES, more=['<file name="../x.7z"><size>1</size></file>']))
        yield found


def fetch(web: Web, *words: str) -> int:
    return main(["data", "fetch", *words, "--address", f"{web.address}/dump"])


def next_command(text: str) -> list[str]:
    (found,) = re.findall(r"^next: stackllama (.*)$", text, re.MULTILINE)
    return shlex.split(found)


def test_one_site_and_the_command_that_uses_it(web: Web, capsys: Capture) -> None:
    web.pages[f"/dump/{BEER}"].breaks = [5000]
    assert fetch(web, "beer") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == [
        "the connection to 127.0.0.1 broke off; try 2 of 3 in 0.001 s",
        *printed.out.splitlines()[2:-1],
        f"{BEER}: downloaded, {SIZE}, size and sha1 are right",
    ]
    assert next_command(printed.err) == ["run", "smollm2-beer", "--data.source", BEER, "--name", "beer"]
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == {BEER: FILES[BEER]}
    assert fetch(web, BEER) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{BEER}: complete already, {SIZE}, size and sha1 are right\n"
    assert next_command(printed.err) == ["run", "smollm2-beer", "--data.source", BEER, "--name", "beer"]


def test_the_next_command_reads_what_came(web: Web, capsys: Capture) -> None:
    assert fetch(web, "beer", "coffee", "stackoverflow", "beer.stackexchange.com", "--to", "a, b") == 0
    arguments = parse(next_command(capsys.readouterr().err))
    recipe = load_recipe("smollm2-beer", arguments.overrides)
    assert recipe.data.source == (f"a, b/{BEER}", "a, b/coffee.7z", "a, b/stackoverflow.com-Posts.7z")
    assert recipe.name == "beer-coffee-stackoverflow"
    assert sorted(path.name for path in Path("a, b").iterdir()) == sorted(FILES)
    assert len(web.asked(f"/dump/{BEER}")) == 1


def test_a_table_alone_is_no_dump_to_run_on(web: Web, capsys: Capture) -> None:
    assert fetch(web, "stackoverflow.com-Votes") == 0
    assert "next:" not in capsys.readouterr().err


def test_the_list(web: Web, capsys: Capture) -> None:
    assert fetch(web, "--list") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == f"{SIZE:>10}  {BEER}"
    assert [line.split()[-1] for line in lines[:-2]] == sorted(FILES)
    assert lines[-2:] == ["    123 kB  in 6 archives", "1 are left out: their names or sizes cannot be used"]
    assert next_command(printed.err) == ["data", "fetch", "SITE", "--address", f"{web.address}/dump"]
    assert list(Path().iterdir()) == []
    assert fetch(web, "--list", "Vote", "beer") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[:2]] == [BEER, TABLES[2]]


def test_without_a_list(web: Web, capsys: Capture) -> None:
    del web.pages["/dump/dump_files.xml"]
    assert fetch(web, "--list") == 2
    error = capsys.readouterr().err
    assert "has no list of its archives" in error
    assert len(error.splitlines()) == 1
    assert fetch(web, "beer") == 0
    told = f"{BEER}: downloaded, {SIZE}, its size is right; the address has no hash of it to compare"
    assert capsys.readouterr().out.splitlines()[-1] == told


def test_the_address_is_a_key_of_the_recipe(web: Web, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text(f"data: {{source: embedded, address: {web.address}/dump}}")
    assert main(["data", "fetch", "beer", "--recipe", "mine.yaml"]) == 0
    assert next_command(capsys.readouterr().err)[:2] == ["run", "mine.yaml"]
    assert load_recipe("quickstart").data.address == PUBLIC_DUMP
    asked: list[str] = []
    monkeypatch.setattr(listing_module, "_read_list", lambda url, *_: asked.append(url))
    monkeypatch.setattr(listing_module.UnlistedPlace, "get", lambda *_: None)
    assert main(["data", "fetch", "beer"]) == 2
    assert asked[0] == "https://archive.org/download/stackexchange/stackexchange_files.xml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no site is named"),
        (["bear"], "did you mean beer.stackexchange.com?"),
        (["../x"], "'../x' is no name of a site"),
        (["beer", "--sha256", "12"], "must be 64 hexadecimal digits"),
        (["beer", "coffee", "--sha256", "0" * 64], f"--sha256 is of one archive, and here are 2: {BEER}, coffee.7z"),
        (["beer", "--sha256", "0" * 64], "came damaged, and was removed: its sha256 is"),
        (["beer", "--recipe", "quickstart"], "--address and --recipe both say"),
        (["beer", "--to", "file"], "cannot be written"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(web: Web, capsys: Capture, words: list[str], message: str) -> None:
    Path("file").write_text("a file")
    assert fetch(web, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize("address", ["file:///tmp", ""])
@pytest.mark.parametrize("words", [["beer"], ["--list"]])
def test_an_address_that_is_none(capsys: Capture, address: str, words: list[str]) -> None:
    assert main(["data", "fetch", *words, "--address", address]) == 2
    assert f"the address {address!r} cannot be used" in capsys.readouterr().err


def test_an_empty_word_is_not_taken_for_none(web: Web, capsys: Capture) -> None:
    assert main(["data", "fetch", "--list", "--recipe", ""]) == 2
    assert fetch(web, "beer", "--sha256", "") == 2
    assert "must be 64 hexadecimal digits" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_ctrl_c_keeps_the_part_and_says_how_to_go_on(
    web: Web, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    web.pages[f"/dump/{BEER}"].breaks = [5000]
    monkeypatch.setattr("time.sleep", stop)
    assert fetch(web, "beer") == 130
    assert Path(f"{BEER}.part").read_bytes() == FILES[BEER][:5000]
    again = shlex.split(capsys.readouterr().err.splitlines()[-1].rpartition("type: stackllama ")[2])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(again) == 0
    assert web.asked(f"/dump/{BEER}")[-1][0] == "bytes=5000-"


def test_a_real_archive(web: Web, capsys: Capture) -> None:
    content = (shared_dumps() / BEER).read_bytes()
    web.pages[f"/dump/{BEER}"] = Page(content, breaks=[2_000_000])
    web.pages["/dump/dump_files.xml"] = Page(listing({BEER: content}))
    assert fetch(web, "beer", "--to", "dumps") == 0
    assert f"dumps/{BEER}: downloaded, 3.34 MB, size and sha1 are right" in capsys.readouterr().out
    assert Path("dumps", BEER).read_bytes() == content
