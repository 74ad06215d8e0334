"""The same results wherever the work is done, and clear words where a worker cannot go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from stackllama.data.building.workers import open_workers
from stackllama.errors import DataError, RecipeError, TruncatedDumpError


def times(factor: int, number: int) -> int:
    if number == 13:
        raise TruncatedDumpError("thirteen", byte=13)
    if number == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return factor * number


ENGINES = [
    ("local", 1),
    ("local", 2),
    pytest.param("ray", 2, marks=pytest.mark.skipif(find_spec("ray") is None, reason="ray is an extra")),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("engine", "count"), ENGINES)
def test_every_item_is_worked_on_once(engine: str, count: int) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(12):
            asked.append(number)
            yield number

    with open_workers(engine, count) as over:
        found = []
        for pair in over(items(), partial(times, 3)):
            found.append(pair)
            assert len(asked) - len(found) <= 3  # a stream is not read ahead of the workers
        assert sorted(found) == [(number, 3 * number) for number in range(12)]
        assert sorted(over([5, 7], partial(times, 2))) == [(5, 10), (7, 14)]
        with pytest.raises(TruncatedDumpError, match="thirteen") as caught:
            list(over([1, 13, 2], partial(times, 1)))
    assert caught.value.byte == 13


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(DataError, match=r"memory ran out.*--compute\.threads"), open_workers("local", 2) as over:
        list(over([1, 99, 2], partial(times, 1)))


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from functools import partial\n"
        "from stackllama.data.building.workers import open_workers\n"
        "if __name__ == '__main__':\n"
        "    with open_workers('local', 2) as over:\n"
        "        list(over([0, 0, 0], abs))\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        workers = [
            child for child in psutil.Process(parent.pid).children() if "spawn_main" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ray_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackllama.data.building.workers.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"stackllama\[ray\]"), open_workers("ray", 2):
        pass
