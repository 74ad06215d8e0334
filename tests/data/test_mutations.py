"""Ten thousand bad inputs, each made from its number (its seed) alone, through the real build.

Whatever comes in, a build ends in a store that can be read, or in an error of ours that names what is wrong. It takes a
few seconds and a few hundred MB at the most, opens nothing outside its folders, connects to nothing and starts nothing.

`STACKLLAMA_MUTATIONS` says how many there are, `STACKLLAMA_MUTATION` names a single one by its seed:

    STACKLLAMA_MUTATIONS=10000 python -m pytest tests/data/test_mutations.py -s
    STACKLLAMA_MUTATION=4711 python -m pytest tests/data/test_mutations.py -s

Python's audit hooks see what Python opens. duckdb, pyarrow and libxml2 open files by themselves; for these, canaries
stand beside the input (`mutations/watching.py`).
"""

from __future__ import annotations

import gc
import importlib
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from lxml import etree

from stackllama.data.building import build
from stackllama.data.building.build import Machine
from stackllama.data.dump.archive import digest_dump
from stackllama.data.interchange import reading as interchange_read
from stackllama.data.store import store
from stackllama.data.text import language
from stackllama.errors import StackllamaError
from tests.data.dumps import answer, question, site
from tests.data.mutations import archives, markup, places, records, rows, watching
from tests.data.mutations.making import FRACTIONS, Mutant, make
from tests.data.mutations.raw import RAW
from tests.data.mutations.watching import Cost, Scene, Watch

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures by /proc"),
    pytest.mark.alone,  # seconds and memory of each input are limited
]

SEEDS = int(os.environ.get("STACKLLAMA_MUTATIONS", "1000"))
ALONE = os.environ.get("STACKLLAMA_MUTATION")
LOT = 100
SECONDS, MEGABYTES = 5.0, 300.0
AT_FAULT = "at fault"
HANGS = 60.0
"""Seconds of the clock after which a build is stopped."""


@dataclass
class Outcome:
    """What came of an input: "built", "refused", or why that is a fault; and the message or the trace."""

    what: str
    told: str
    cost: Cost


def built(mutant: Mutant, scene: Scene) -> build.Counts:
    """What a run does with its sources: hash them, then build."""
    for given in mutant.given:
        interchange_read.digest(given) if interchange_read.is_records(given) else digest_dump(Path(given))
    ledger = scene.out / "ledger.parquet"
    sources = build.sources(mutant.given, mutant.site)
    return build.build(sources, scene.out, mutant.settings, Machine(), ledger=ledger, fingerprint=0)


def check(counts: build.Counts, folder: Path) -> None:
    """The store is whole, and the counts add up."""
    questions = [(split, one) for split in build.wanted(FRACTIONS) for one in store.read_questions(folder, split)]
    keys = Counter((one.site, one.id) for _, one in questions)
    assert max(keys.values()) == 1, "a question is there twice"
    of_cluster: dict[str, set[str]] = {}
    for split, one in questions:
        of_cluster.setdefault(one.cluster, set()).add(split)
        assert one.text.strip(), "a question without text"
        ids = [answer.id for answer in one.answers]
        assert ids == sorted(set(ids)), "answers out of order, or twice"
        for pair in one.pairs:
            assert 0 <= pair.better < len(ids), "a pair of no answer"
            assert 0 <= pair.worse < len(ids), "a pair of no answer"
            assert pair.better != pair.worse, "a pair of one answer"
            assert pair.gap >= 1, "a pair without a gap"
    assert all(len(splits) == 1 for splits in of_cluster.values()), "a cluster in two splits"
    answers = sum(len(one.answers) for _, one in questions)
    assert counts["rows"] == len(questions) + answers + sum(counts["dropped"].values()), "rows do not add up"
    assert not (folder / "work").exists(), "the folder of work is left"
    assert all(watching.SECRET not in f"{one.title} {one.text} {one.answers}" for _, one in questions), (
        "a canary was read"
    )


def check_told(message: str, mutant: Mutant, folder: Path) -> None:
    """The message says what is wrong, to somebody who sees nothing else."""
    assert 20 <= len(message) <= 3000 + max(map(len, mutant.given)), "an error of no use"
    message.encode()
    assert not any(ord(sign) < 32 and sign not in "\n\t" for sign in message), "an error with control characters"
    inputs = [str(folder), "ledger.parquet", *(str(StackllamaError(one)) for one in mutant.given if one)]
    assert any(place in message for place in inputs) or "no usable pair" in message, "an error that names no input"


def run(mutant: Mutant, scene: Scene) -> Outcome:
    """Build it under watch, and look around afterwards."""
    if mutant.ledger is not None:
        (scene.out / "ledger.parquet").write_bytes(mutant.ledger)
    scene.remember()
    devices = (Path(one) for one in mutant.given if one in places.DEVICES)
    watch = Watch((scene.given, scene.given.with_name("given-too"), *devices), (scene.out,))
    files = _open_files()
    outcome = _watched(mutant, scene, watch)
    cost = outcome.cost
    faults = [outcome.told] if outcome.what == AT_FAULT else []
    faults += [*watch.found, *scene.changed()]
    if cost.seconds > SECONDS or cost.megabytes > MEGABYTES:
        faults.append(f"took {cost.seconds:.1f} s and {cost.megabytes:.0f} MB")
    if any(thread.name == "stackllama-7z" for thread in threading.enumerate()):
        faults.append("a thread is left")
    if _open_files() > files:
        gc.collect()  # an error that is still at hand may hold a file
        faults += ["a file is left open"] if _open_files() > files else []
    return Outcome(AT_FAULT, "\n".join(faults), cost) if faults else outcome


def _watched(mutant: Mutant, scene: Scene, watch: Watch) -> Outcome:
    cost = Cost()
    try:
        with watching.measuring(HANGS) as cost, watch:
            counts = built(mutant, scene)
        check(counts, scene.out)
    except StackllamaError as error:
        try:
            check_told(str(error), mutant, scene.given)
        except (AssertionError, UnicodeError) as fault:
            return Outcome(AT_FAULT, f"{fault}: {str(error)!r}"[:500], cost)
        return Outcome("refused", str(error), cost)
    except (Exception, watching.TooLongError) as error:
        return Outcome(AT_FAULT, "".join(traceback.format_exception(error)), cost)
    return Outcome("built", "", cost)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: it is written ten thousand times."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="stackllama-mutations-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What a process loads once, whatever it reads: the model of languages, which unpacks itself to a nameless file,
    and the reader of .7z, which asks the system what it is.
    """
    importlib.import_module("stackllama.data.dump.seven_zip")
    assert language.detect(" ".join(["These are some words of English, and there are enough of them."] * 20)) == "en"


def tried(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Mutant, Outcome]:
    scene = Scene(folder / str(seed))
    mutant = make(seed, scene.given)
    with monkeypatch.context() as patch:
        if seed % 20:
            patch.setattr("duckdb.connect", lambda **config: _database().cursor())
        if mutant.small:
            patch.setattr("stackllama.data.building.gathering.piece_size", lambda total: max(2000, total // 50))
            patch.setattr("stackllama.data.building.gathering.bucket_count", lambda total, piece: 3)
            patch.setattr("stackllama.data.interchange.reading.PIECE_BYTES", 1000)
        outcome = run(mutant, scene)
    return mutant, outcome


@cache
def _database() -> duckdb.DuckDBPyConnection:
    """A database for all builds but a few: to open one takes as long as the rest of a build that small."""
    return _connect(config={"memory_limit": "384MB", "threads": 1})


_connect = duckdb.connect


def lots() -> list[range]:
    if ALONE:
        return [range(int(ALONE), int(ALONE) + 1)]
    return [range(start, min(start + LOT, SEEDS)) for start in range(0, SEEDS, LOT)]


@pytest.mark.parametrize("seeds", lots(), ids=str)
def test_bad_inputs_are_built_or_refused(
    seeds: range, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: dict[int, Outcome] = {}
    faults = []
    for seed in seeds:
        (tmp_path / "seed").write_text(str(seed))  # for one that takes the interpreter down
        mutant, outcome = tried(seed, folder, monkeypatch)
        outcomes[seed] = outcome
        _seen.update(step.partition(": ")[2] for step in mutant.steps)
        if outcome.what == AT_FAULT:
            kept = tmp_path / str(seed)
            shutil.copytree(folder / str(seed), kept, symlinks=True, ignore=_special)
            faults.append(
                f"seed {seed}, {mutant.shape}, {', '.join(mutant.steps)}\n{outcome.told}\n"
                f"its input is kept in {kept}; again: STACKLLAMA_MUTATION={seed} python -m pytest {__file__}"
            )
        shutil.rmtree(folder / str(seed), ignore_errors=True)
    print(summary(outcomes))
    assert not faults, "\n\n".join(faults)


_seen: set[str] = set()
"""The mutations that came up so far."""


@pytest.mark.skipif(SEEDS < 1000 or ALONE is not None, reason="too few inputs for all of them")
def test_every_kind_of_mutation_came_up() -> None:
    known = (rows.ROWS, markup.XML, RAW, archives.ARCHIVES, records.RECORDS, places.PLACES)
    if _seen:  # the inputs are tried in the same run
        assert {name for some in known for name in some} <= _seen


def test_a_seed_always_makes_the_same_input(tmp_path: Path) -> None:
    for seed in range(40):
        found = []
        for _ in range(2):
            scene = Scene(tmp_path / str(seed))
            mutant = make(seed, scene.given)
            files = {one: one.read_bytes() for one in scene.folder.rglob("*") if one.is_file() and not one.is_symlink()}
            found.append((repr(mutant), files))
            shutil.rmtree(scene.folder)
        assert found[0] == found[1]


def test_what_is_opened_started_or_changed_outside_is_noticed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    inside.mkdir()
    outside.write_text("x")
    (inside / "link").symlink_to("../out.txt")
    deeds: list[tuple[str, Callable[[], object]]] = [
        ("open", lambda: outside.read_text()),
        ("open", lambda: (inside / "link").read_text()),
        ("open", lambda: (tmp_path / "new.txt").write_text("x")),
        ("open", lambda: os.close(os.open(tmp_path / "other.txt", os.O_CREAT | os.O_WRONLY))),
        ("os.mkdir", lambda: (tmp_path / "made").mkdir()),
        ("os.rename", lambda: outside.rename(tmp_path / "moved.txt")),
        ("os.remove", lambda: (tmp_path / "moved.txt").unlink()),
        ("os.rmdir", lambda: shutil.rmtree(tmp_path / "made")),
        ("os.listdir", lambda: os.listdir(tmp_path)),
        ("socket.getaddrinfo", lambda: socket.getaddrinfo("127.0.0.1", 9)),
        ("subprocess.Popen", lambda: subprocess.run(["true"], check=True)),
    ]
    for event, deed in deeds:
        with Watch((inside,), (inside,)) as watch:
            deed()
        assert any(one.startswith(event) for one in watch.found), (event, watch.found)
    with Watch((), (inside,)) as watch:
        (inside / "a").write_text("x")
        (inside / "a").rename(inside / "b")
        os.listdir(inside)
        Path(os.__file__).read_bytes()
    assert watch.found == []


def test_a_canary_that_a_library_reads_by_itself_is_noticed(folder: Path) -> None:
    for number, deed in enumerate((etree.parse, pa.OSFile, lambda path: duckdb.read_csv(path).fetchall())):
        scene = Scene(folder / str(number))
        path = str(scene.folder / "canary.xml")
        with Watch((), ()) as watch:
            read = deed(path)
            if isinstance(read, pa.OSFile):
                read.read()
                read.close()
        assert watch.found == []  # so it is the scene that has to see it
        assert scene.changed() == [f"{path!r} changed"]


def test_time_and_memory_are_measured_and_what_hangs_is_stopped() -> None:
    with watching.measuring(60) as cost:
        bytearray(80 << 20)
        started = time.process_time()
        while time.process_time() - started < 0.2:
            pass
    assert 0.2 <= cost.seconds < 5
    assert 70 < cost.megabytes < 150
    with pytest.raises(watching.TooLongError), watching.measuring(0.1):
        queue.Queue[None]().get()


def test_another_error_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(folder / "0")
    dump = site(scene.given, [question(1), answer(2, 1, Score="0"), answer(3, 1, Score="9")])
    mutant = Mutant(0, "folder", given=[str(dump)])
    assert run(mutant, scene).what == "built"
    monkeypatch.setattr("stackllama.data.building.gathering.convert", lambda *given: 1 / 0)
    outcome = run(mutant, Scene(folder / "1"))
    assert (outcome.what, "ZeroDivisionError" in outcome.told) == (AT_FAULT, True)


def _special(place: str, names: list[str]) -> list[str]:
    """Pipes and the like, which cannot be copied."""
    paths = [Path(place, name) for name in names]
    return [path.name for path in paths if not (path.is_symlink() or path.is_file() or path.is_dir())]


def summary(outcomes: dict[int, Outcome]) -> str:
    counts = Counter(outcome.what for outcome in outcomes.values())
    slow = max(outcomes, key=lambda seed: outcomes[seed].cost.seconds)
    large = max(outcomes, key=lambda seed: outcomes[seed].cost.megabytes)
    return (
        f"seeds {min(outcomes)} to {max(outcomes)}: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}; "
        f"longest {outcomes[slow].cost.seconds:.2f} s (seed {slow}), "
        f"largest {outcomes[large].cost.megabytes:.0f} MB (seed {large})"
    )
