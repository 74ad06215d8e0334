"""The layers of the house: a row imports from rows above it and, without circles, from its own."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "stackllama"

LAYERS: dict[str, tuple[str, ...]] = {
    "ground": (
        "errors",
        "files",
        "terminal",
        "environment",
        "recipe_training",
        "recipe",
        "recipe_load",
        "recipe_reference",
        "summary",
        "run",
        "taking_over",
    ),
    "data": ("data",),
    "feedback": ("feedback",),
    "tokens": ("tokens",),
    "model": ("model",),
    "objectives": ("objectives",),
    "rollout": ("rollout",),
    "train": ("train",),
    "judge": ("evaluate", "report"),
    "face": (
        "serve",
        "export",
        "assembly",
        "policy_assembly",
        "stages",
        "planning",
        "chat",
        "scoring",
        "judging",
        "comparing",
        "lm_evaluating",
        "doctor",
        "arguments",
        "data_settings",
        "data_commands",
        "cli",
    ),
}
"""Layer -> modules and packages of stackllama, in the order of import."""

WITHOUT_TORCH = ("ground", "data", "feedback")
HEAVY = {"torch", "transformers", "peft", "safetensors"}
CONFIGURATION = {"stackllama.recipe", "stackllama.recipe_training", "stackllama.recipe_load"}
KNOWS_CONFIGURATION = ("ground", "face")


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module that holds anything."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives a.b where that is a module of ours, else a."""
    tree = ast.parse(path.read_text("utf-8"))
    known = modules()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            base = node.module or ""
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def layer_of(module: str) -> str:
    """The layer of a dotted name inside stackllama."""
    part = module.split(".")[1]
    rows = [layer for layer, parts in LAYERS.items() if part in parts]
    assert rows, f"{module} is in no layer; put it into LAYERS"
    return rows[0]


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_its_own_layer_and_those_above(module: str) -> None:
    order = list(LAYERS)
    own = layer_of(module)
    for name in imports(modules()[module]):
        if name.startswith("stackllama."):
            other = layer_of(name)
            assert order.index(other) <= order.index(own), f"{module} ({own}) imports {name} ({other})"
            assert name not in CONFIGURATION or own in KNOWS_CONFIGURATION, f"{module} imports the recipe"
        elif own in WITHOUT_TORCH:
            assert name.split(".")[0] not in HEAVY, f"{module} ({own}) imports {name}"


def test_there_are_no_circles() -> None:
    graph = {
        module: {name for name in imports(path, top_level=True) if name in modules() and name != module}
        for module, path in modules().items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_packages_have_empty_init_files() -> None:
    packages = {path.parent for path in SOURCE.rglob("*.py")}
    assert {str(path) for path in packages if not (path / "__init__.py").is_file()} == set()
    assert [str(path) for path in SOURCE.rglob("__init__.py") if path.read_text().strip()] == []


def test_nothing_is_unpickled() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for module, path in modules().items():
        assert not forbidden & {name.split(".")[0] for name in imports(path)}, module
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "torch.save",
                "np.load",
                "numpy.load",
            ):
                pytest.fail(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")


@pytest.mark.parametrize("module", ["stackllama.run", "stackllama.recipe_reference", "stackllama.summary"])
def test_the_ground_comes_without_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
