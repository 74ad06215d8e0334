"""The documents are held to the code: the tree, links, commands, names of places, metrics."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from stackllama.arguments import TAKE_OVERRIDES, parse
from stackllama.errors import RecipeError
from stackllama.evaluate.hacking import Record
from stackllama.objectives.dpo import DPOObjective, ipo_loss
from stackllama.objectives.ppo import PPOObjective, ValueLoss
from stackllama.objectives.reward import RewardObjective
from stackllama.objectives.sft import SftObjective
from stackllama.recipe_load import find_recipe, known_keys, load_recipe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "stackllama"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`([\w/]+\.py): ([\w.]+(?:, [\w.]+)*)`")


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))


def tree_lines() -> list[str]:
    block: str = next(
        body for _, _, body in FENCE.findall(text_of("README.md")) if body.startswith("src/stackllama/\n")
    )
    return block.splitlines()[1:]


def tree_files() -> Iterator[tuple[str, str]]:
    """(path below src/stackllama, its sentence) of every file in the README's tree."""
    folders: list[str] = []
    for line in tree_lines():
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name, _, sentence = line.strip().partition(" ")
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        else:
            yield "".join(folders) + name, sentence.strip()


def test_the_tree_names_every_module_and_nothing_that_does_not_exist() -> None:
    named = [path for path, _ in tree_files()]
    modules = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    assert len(named) == len(set(named))
    assert modules - set(named) == set(), "put these into the README's tree, with a line each"
    assert [path for path in named if not (SOURCE / path).is_file()] == [], "the README's tree has what does not exist"


def test_every_line_of_the_tree_says_what_the_file_is_for() -> None:
    assert [path for path, sentence in tree_files() if len(sentence) < 8] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    for link in LINK.findall(without_code(text_of(name))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name}: {link}"


def commands(name: str) -> Iterator[list[str]]:
    """The words of every stackllama command in a page's code blocks, fenced or indented; comments are cut off."""
    text = text_of(name)
    blocks = [body for _, _, body in FENCE.findall(text)]
    blocks += re.findall(r"^ {4}stackllama .*$", FENCE.sub("", text), re.MULTILINE)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip().startswith("stackllama "):
                words = shlex.split(line, comments=True)[1:]
                yield words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("name", NAMES)
def test_every_command_parses_and_its_recipe_and_keys_exist(name: str) -> None:
    keys = {key for key, _ in known_keys()}
    for words in commands(name):
        arguments = parse(words)
        if tuple(arguments.command.split()) not in TAKE_OVERRIDES:
            continue
        assert set(arguments.overrides) <= keys, f"{name}: {shlex.join(words)}"
        recipe = arguments.options.recipe
        if recipe.startswith("runs/"):  # made by an earlier command of the page
            continue
        path = ROOT / recipe if recipe.endswith(".yaml") else find_recipe(recipe)
        load_recipe(path, arguments.overrides)


def test_the_documents_have_commands_and_a_wrong_one_would_be_seen() -> None:
    assert sum(1 for name in NAMES for _ in commands(name)) > 20
    with pytest.raises(SystemExit):
        parse(["trian", "recipes/quickstart.yaml"])
    with pytest.raises(RecipeError):
        load_recipe(find_recipe("quickstart"), {"ppo.kl.targett": "6"})


def defined_in(path: Path) -> set[str]:
    """Names of a module's functions, classes and constants, and Class.method."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("name", NAMES)
def test_every_place_in_the_code_that_a_page_names_exists(name: str) -> None:
    for file, listed in PLACE.findall(text_of(name)):
        assert (SOURCE / file).is_file(), f"{name}: {file}"
        missing = set(listed.split(", ")) - defined_in(SOURCE / file)
        assert not missing, f"{name}: {file} has no {missing}"


def test_every_detail_of_the_objectives_names_its_source() -> None:
    text = text_of("docs/objectives.md")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    details = re.split(r"^\d+\. ", FENCE.sub("", text), flags=re.MULTILINE)[1:]
    assert [detail[:60] for detail in details if not PLACE.search(detail)] == []


def test_every_decision_is_listed() -> None:
    index = text_of("docs/decisions/README.md")
    pages = sorted(page.name for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert LINK.findall(index) == pages
    assert [int(page[:4]) for page in pages] == list(range(1, len(pages) + 1))


def literal_keys(path: Path, function: str) -> set[str]:
    """Every constant key of a dict that is written out in a function."""
    tree = ast.parse(path.read_text("utf-8"))
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    return {
        key.value
        for node in ast.walk(found)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def logged() -> set[str]:
    """The names of all that the loop logs: its own, the objectives' and the sources' notes."""
    names = literal_keys(SOURCE / "train" / "loop.py", "_report") | literal_keys(SOURCE / "train" / "loop.py", "_event")
    names |= literal_keys(SOURCE / "rollout" / "experience.py", "_experience")
    names |= literal_keys(SOURCE / "objectives" / "scaling.py", "shape")
    names |= literal_keys(SOURCE / "rollout" / "mismatch.py", "weights")
    for source in ("sft_source", "reward_source"):
        names |= literal_keys(SOURCE / "tokens" / "sources.py", source)
    for objective in (
        SftObjective(),
        RewardObjective("reward", centring=1.0),
        DPOObjective(partial(ipo_loss, beta=1.0), beta=1.0),
        PPOObjective(clip=0.2, value=ValueLoss(clip=0.2, coefficient=1.0), entropy_bonus=1.0, kl_coefficient=1.0),
    ):
        names |= set(objective.terms) | set(objective.metric_counts)
    return names


def test_every_metric_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", text_of("docs/metrics.md"), re.MULTILINE))
    found = logged() | literal_keys(SOURCE / "evaluate" / "exam.py", "_policy_numbers")
    found |= set(Record.__dataclass_fields__) | {"gold_gain", "alarms"}
    assert {
        "step",
        "loss",
        "skipped",
        "tokens",
        "questions",
        "kl",
        "policy_loss",
        "ratio_mean",
        "distinct_2",
        "kl_loss",
        "reward_scale",
    } <= found | {"step"}
    assert found - documented == set(), "define these in docs/metrics.md"
