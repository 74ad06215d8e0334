from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from stackllama.errors import RunError
from stackllama.train.metrics import JsonlLog, progress, read_log, telling


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_back(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    log.append(1, loss=0.1 + 0.2, tokens=12)
    log.append(2, loss=math.nan, worst=-math.inf, note="é\u2028[b]", nothing=None)
    first, second = read_log(log.path)
    assert first == {"step": 1, "loss": 0.1 + 0.2, "tokens": 12}
    assert math.isnan(second["loss"])
    assert second["worst"] == -math.inf
    assert (second["note"], second["nothing"]) == ("é\u2028[b]", None)


def test_a_line_is_in_the_file_at_once_and_is_strict_json(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    log.append(1, loss=math.inf)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(log.path.read_text(), parse_constant=refuse) == {"step": 1, "loss": "Infinity"}


def test_a_resumed_log_equals_one_never_stopped(tmp_path: Path) -> None:
    whole, stopped = JsonlLog(tmp_path / "whole.jsonl"), JsonlLog(tmp_path / "stopped.jsonl")
    for step in range(1, 7):
        whole.append(step, loss=1 / step)
    for step in range(1, 6):
        stopped.append(step, loss=1 / step)
    with stopped.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line, the last checkpoint was at step 3
    resumed = JsonlLog(stopped.path)
    resumed.truncate_after(3)
    assert [record["step"] for record in read_log(stopped.path)] == [1, 2, 3]
    for step in range(4, 7):
        resumed.append(step, loss=1 / step)
    assert stopped.path.read_bytes() == whole.path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.jsonl", "whole.jsonl"]


def test_a_torn_last_line_is_left_out_and_never_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_log(path) == [{"step": 1}]
    JsonlLog(path).append(2)
    assert read_log(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"st')
    JsonlLog(path).append(1)
    assert read_log(path) == [{"step": 1}]


def test_truncating_a_log_that_is_not_there(tmp_path: Path) -> None:
    JsonlLog(tmp_path / "log.jsonl").truncate_after(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"):
        read_log(path)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        JsonlLog(tmp_path / "missing" / "log.jsonl").append(1)


def test_plain_lines_at_once_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("sft", 1000, "tokens", stream=stream, clock=clock) as show:
        assert stream.getvalue() == "sft:  0/1,000 tokens  0:00\n"
        for _ in range(4):
            clock.now += 4
            show.advance(100, loss=2.5, lr=1.4e-5)
    # 4 s a hundred: 25 tokens/s. The line is due at 12 s with 300 done, 700 left at 25 a second: 28 s;
    # then the last, 600 left: 24 s.
    assert stream.getvalue().splitlines()[1:] == [
        "sft:  300/1,000 tokens  25 tokens/s  0:12, 0:28 left  loss 2.5  lr 1.4e-05",
        "sft:  400/1,000 tokens  25 tokens/s  0:16, 0:24 left  loss 2.5  lr 1.4e-05",
    ]


def test_a_resumed_run_counts_its_own_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("ppo", 100, "episodes", done=90, stream=stream, clock=clock) as show:
        clock.now += 10
        show.advance(5, reward=1.0)
        show.advance(0, kl=3.25)  # the reward stays
    # 5 episodes in 10 s, 5 left: 10 s
    assert (
        stream.getvalue().splitlines()[-1]
        == "ppo:  95/100 episodes  0.5 episodes/s  0:10, 0:10 left  reward 1  kl 3.25"
    )


def test_bytes_are_shown_for_reading() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress("x.7z", 20_000_000_000, "bytes", 5_000_000_000, stream=stream, clock=clock) as show:
        clock.now += 100
        show.advance(1_250_000_000)
    # 1.25 GB in 100 s: 12.5 MB/s; 13.75 GB left: 1100 s
    assert stream.getvalue().splitlines()[-1] == "x.7z:  6.25 GB of 20.0 GB  12.5 MB/s  1:40, 18:20 left"


def test_the_last_line_is_not_said_twice_and_comes_on_errors_too() -> None:
    stream, clock = io.StringIO(), Clock()

    def fail() -> None:
        with progress("sft", 4, "rows", stream=stream, clock=clock) as show:
            clock.now += 3700
            show.advance(4)  # so long since the last line that this prints one
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().splitlines()[1:] == ["sft:  4/4 rows  0.00108 rows/s  1:01:40"]


def test_notes_have_lines_of_their_own_without_control_characters() -> None:
    stream = io.StringIO()
    with progress("a\x1b[31m\nb", 1, "rows", stream=stream, clock=Clock()) as show:
        show.note("step 3 was skipped\x07")
    assert stream.getvalue().splitlines() == ["a [31m b:  0/1 rows  0:00", "step 3 was skipped "]


def test_a_narrow_encoding_does_not_stop_the_work() -> None:
    raw = io.BytesIO()
    with progress("é", 1, "rows", stream=io.TextIOWrapper(raw, encoding="ascii"), clock=Clock()):
        assert raw.getvalue() == b"?:  0/1 rows  0:00\n"


def rendered(title: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    with progress(title, 10, "steps", stream=stream, clock=clock) as show:
        clock.now += 10
        show.advance(5, loss=0.25)
        show.note("a [bold]note[/bold]")
    return stream.getvalue()


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rendered("reward", monkeypatch)
    assert "\x1b[" in text  # it moves the cursor
    assert "5/10 steps  0.5 steps/s  0:10, 0:10 left" in text
    assert "loss 0.25" in text


def test_square_brackets_are_text_not_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rendered("[red]x[/nonsense]", monkeypatch)  # rich would raise MarkupError
    assert "[red]x[/nonsense]" in text
    assert "a [bold]note[/bold]" in text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_lines_where_asked_for(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, value)
    stream = Terminal()
    with progress("sft", 1, "rows", stream=stream, clock=Clock()):
        pass
    assert stream.getvalue() == "sft:  0/1 rows  0:00\n"


def test_nothing_in_all_does_not_divide_by_zero() -> None:
    stream = io.StringIO()
    with progress("sft", 0, "rows", stream=stream, clock=Clock()) as show:
        Console(file=io.StringIO(), width=80).print(show)
    assert stream.getvalue() == "sft:  0/0 rows  0:00\n"


def test_work_that_says_itself_how_much_there_is() -> None:
    stream = io.StringIO()
    with telling("reading", "rows", stream=stream) as tell:
        tell(0, 200)
        tell(50, 200)
        tell(200, 200)
    assert stream.getvalue().splitlines()[0].startswith("reading:  0/1 rows")
    assert stream.getvalue().splitlines()[-1].startswith("reading:  200/200 rows")
