"""`stackllama lm-eval` as a user types it, on a tiny run and tasks of its own; mistakes are one clear line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from stackllama import lm_evaluating
from stackllama.assembly import Assembled
from stackllama.cli import main
from stackllama.errors import ModelError
from stackllama.model.roles import LoRA
from stackllama.report.page import write_report
from tests.assembled import speak_from

Capture = pytest.CaptureFixture[str]

DOCUMENTS = [
    {"question": f"what is {what}?", "options": ["a plant", f"a {what} that is no plant", "hop"], "gold": at % 3}
    for at, what in enumerate(("a hop", "a plant", "an answer", "a question", "it", "this", "that", "a hop or a plant"))
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\n\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{options[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
UNSAFE = CHOICE.replace("tiny_choice", "tiny_unsafe") + "unsafe_code: true\n"
NOWHERE = CHOICE.replace("tiny_choice", "tiny_nowhere").replace("{file}", "/nowhere/x.jsonl")
STAGE = {"inputs": {}, "outputs": {"final": "x"}, "environment": {}}


def finish(run: Path, *stages: str) -> None:
    for stage in stages:
        (run / stage).mkdir()
        (run / stage / "complete.json").write_text(json.dumps({"stage": stage, **STAGE}))


def add_policy(assembled: Assembled, folder: Path, *roles: str) -> None:
    for role in roles:
        assembled.trunk.add_adapter(role, LoRA(2, 4.0, 0.0, ("q_proj", "up_proj")), seed=1)
        for parameter in assembled.trunk.trainable(role).values():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    speak_from(lm_evaluating, folder, monkeypatch)
    monkeypatch.setattr(lm_evaluating, "load_roles", add_policy)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    finish(folder, "sft", "ppo")
    return folder


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of task files; data sets are cached in a folder of the test's own."""
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, text in {"choice": CHOICE, "written": WRITTEN, "unsafe": UNSAFE, "nowhere": NOWHERE}.items():
        (folder / f"{name}.yaml").write_text(text.format(file=folder / "documents.jsonl"))
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_both_models_on_tasks_of_ones_own(
    run: Path, tasks: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["lm-eval", str(run), "--include-path", tasks]
    assert main([*words, "--tasks", "tiny_choice,tiny_written"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("General ability\n  task ")
    assert told.err.endswith(f"next: stackllama report {run}\n")
    found = json.loads((run / "evaluate" / "lm_eval.json").read_text("utf-8"))
    assert [(row["task"], row["metric"], row["documents"]) for row in found["rows"]] == [
        ("tiny_choice", "acc", 8),
        ("tiny_written", "exact_match", 8),
    ]
    assert (found["policy"], found["limit"], found["versions"]["tiny_choice"]) == ("ppo", None, "3.0")
    assert found["weights"] == {"sft": {"final": "x"}, "ppo": {"final": "x"}}
    row = found["rows"][0]
    assert row["difference_low"] <= row["difference"] == row["policy"] - row["sft"] <= row["difference_high"]
    assert 0 < row["sft"] < 1

    # From here on without the harness's own tasks, whose files take it half a minute to read each time.
    harness = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))
    (run / "ppo" / "complete.json").unlink()
    assert main([*words, "--tasks", "tiny_choice", "--limit", "3"]) == 0
    told = capsys.readouterr()
    assert "no finished ppo, so the SFT model is measured alone" in told.err
    assert "only the first 3 documents" in told.out
    found = json.loads((run / "evaluate" / "lm_eval.json").read_text("utf-8"))
    assert (found["policy"], found["limit"], found["rows"][0]["documents"]) == (None, 3, 3)

    for task, message in (
        ("tiny_choise", "the harness has no task tiny_choise; did you mean tiny_choice"),
        ("tiny_unsafe", "tiny_unsafe runs code that the model writes"),
        ("tiny_nowhere", "task tiny_nowhere cannot be loaded (FileNotFoundError: Unable to find '/nowhere/x.jsonl'"),
    ):
        assert main([*words, "--tasks", task]) == 2
        told = capsys.readouterr()
        assert message in told.err.splitlines()[-1]
        assert told.err.splitlines()[-1].startswith("error: ")
        assert told.out == ""
    assert main(["lm-eval", str(run), "--tasks", "tiny_choice", "--include-path", str(run / "nope")]) == 2
    assert "nope is not a folder; give --include-path" in capsys.readouterr().err


def test_without_the_package_the_command_to_type_is_named(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_evaluating, "find_spec", lambda name: None)
    assert main(["lm-eval", str(run), "--tasks", "x"]) == 2
    assert "pip install 'stackllama[lm-eval]'" in capsys.readouterr().err


def test_data_sets_that_bring_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_evaluating, "find_spec", lambda name: name)
    for version in ("3.6.0", None):
        monkeypatch.setattr(lm_evaluating, "package_version", lambda name, version=version: version)
        with pytest.raises(ModelError, match="runs code that comes with data sets"):
            lm_evaluating.check_installed()
    monkeypatch.setattr(lm_evaluating, "package_version", lambda name: "4.0.0")
    lm_evaluating.check_installed()


def test_a_run_without_sft_says_what_to_type_first(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_evaluating, "check_installed", lambda: None)
    (run / "sft" / "complete.json").unlink()
    assert main(["lm-eval", str(run), "--tasks", "x"]) == 2
    assert "first type: stackllama sft" in capsys.readouterr().err


def test_the_report_shows_the_table(run: Path) -> None:
    from tests.report.test_ability import FOUND

    (run / "summary.json").write_text("{}")
    (run / "data").mkdir()
    (run / "data" / "report.json").write_text('{"rows": 3}')
    assert "General ability" not in write_report(run).read_text("utf-8")
    (run / "evaluate").mkdir()
    (run / "evaluate" / "lm_eval.json").write_text(json.dumps({**FOUND, "lm_eval": "<b>1"}))
    page = write_report(run).read_text("utf-8")
    assert "<h3>General ability</h3>" in page
    assert "0.612 ± 0.010" in page
    assert "lm-evaluation-harness &lt;b&gt;1" in page
