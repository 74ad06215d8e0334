"""Reading recipes: YAML files, dotted overrides, and errors that name the key, the value and what is allowed.

    load_recipe("recipes/quickstart.yaml", {"ppo.kl.target": "6"}) -> Recipe

Left out on purpose: includes and inheritance between recipes, environment variables, YAML anchors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stackllama.errors import RecipeError
from stackllama.recipe import EMBEDDED, Recipe

MAX_BYTES = 1 << 20
"""A recipe is a page of text; anything larger is some other file."""
_SHOWN = 80  # characters of a value in a message

_ANOTHER = (
    "PPO samples from the policy itself (temperature 1, every token): the ratio and the KL are made of the policy's "
    "probabilities, and would be of another distribution than the one that was sampled from"
)
_LENGTH = (
    f"{_ANOTHER}. Let the reward ask for an end: ppo.missing_eos_penalty for answers that run on, "
    "reward.length_penalty for a reward model that likes length"
)
_WILD = (
    f"{_ANOTHER}. Where samples are too wild, train SFT longer, raise ppo.kl.coefficient, or bound scores by "
    "ppo.reward_clip"
)
REFUSED: Mapping[str, str] = {
    "watch": "it is a section of its own, for DPO too: write watch at the top level, and watch.kl_bound in nats",
    **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "do_sample", "num_beams"), _WILD),
    **dict.fromkeys(
        ("repetition_penalty", "no_repeat_ngram_size", "logit_bias", "bad_words"),
        f"{_ANOTHER}. Repetition is watched and ends the training: watch.limits.repetition",
    ),
    **dict.fromkeys(
        ("min_length", "min_new_tokens", "min_tokens", "suppress_eos", "suppress_tokens", "ignore_eos"), _LENGTH
    ),
}
"""Settings of the `ppo` section that other programs have and this one refuses -> why, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a recipe's keys were written: the file, the line of each dotted key, and the overrides."""

    file: str
    lines: Mapping[str, int]
    overrides: frozenset[str]

    def of(self, key: str) -> str:
        """`file:line` of a key or of the nearest key around it; `--key` where an override set it."""
        if key in self.overrides:
            return f"--{key}"
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.file}:{self.lines[key]}" if key else self.file


def load_recipe(recipe: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a file, or of a packaged recipe's name, with overrides put over it.

    `overrides` maps dotted keys to texts as they stand on a command line.

    Errors: RecipeError, with file and line, for a missing file, bad YAML, an unknown key (the nearest known one is
    suggested), a value out of range, and keys that contradict each other.
    """
    path = find_recipe(str(recipe))
    values, lines = _read(path)
    values.setdefault("name", path.stem)
    for key, text in (overrides or {}).items():
        _put(values, key, parse_value(text))
    origin = Origin(str(path), lines, frozenset(overrides or ()))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, origin))) from error


def with_values(recipe: Recipe, values: Mapping[str, str]) -> Recipe:
    """The recipe with other values at dotted keys, as texts.

    Errors: RecipeError where the recipe that this makes would not load.
    """
    changed = recipe.model_dump(mode="json", by_alias=True)
    for key, text in values.items():
        _put(changed, key, parse_value(text))
    try:
        return Recipe.model_validate(changed)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(error, Origin(recipe.name, {}, frozenset(values))))) from error


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: a path, or the name of a recipe that comes with the package.

    A packaged recipe's bare name means that recipe, whatever is called so in the working directory (./NAME is that):
    `stackllama quickstart` is the same everywhere.
    """
    packaged = packaged_recipes()
    if recipe in packaged:
        return packaged[recipe]
    path = Path(recipe)
    try:
        if path.is_file():
            return path
        if path.is_dir():
            if (path / "recipe.yaml").is_file():  # a run's folder holds its resolved recipe
                return path / "recipe.yaml"
            raise RecipeError(f"recipe {recipe} is a folder without a recipe.yaml; name a YAML file")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        shown = recipe if len(recipe) <= _SHOWN else f"{recipe[:_SHOWN]}..."
        raise RecipeError(f"recipe {shown} cannot be looked for: {error.strerror}; name a YAML file") from error
    raise RecipeError(
        f"recipe {recipe} does not exist; name a YAML file, or one that comes with the package: "
        f"{', '.join(packaged) or 'none found'}"
    )


def packaged_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package, from a wheel or from the repository."""
    here = Path(__file__).resolve().parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def default_settings(name: str) -> dict[str, Any]:
    """Every key's default, as plain data; of those that must be given, a run's name and the embedded community."""
    recipe = Recipe.model_validate({"name": name, "data": {"source": [EMBEDDED]}})
    return recipe.model_dump(mode="json", by_alias=True)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every field written out, as YAML that loads to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False, width=100)


def parse_value(text: str) -> object:
    """A command line's text as a value: `null` and lists are read, the rest is left to the field's type."""
    if text.strip().lower() in ("null", "none", "~"):
        return None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a month 13, a number without end
            shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
            raise RecipeError(
                f"the value {shown} is not a list: {_yaml_problem(error)}; write a list such as [a, b], or put the "
                "text in quotes"
            ) from error
    return text


def flatten(recipe: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every field, in the recipe's order."""
    flat: dict[str, Any] = {}
    for name, field in type(recipe).model_fields.items():
        key, value = f"{prefix}{field.alias or name}", getattr(recipe, name)
        flat.update(flatten(value, f"{key}.") if isinstance(value, BaseModel) else {key: value})
    return flat


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each dotted key, sections before what they hold, with its field."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key, field
        section = section_of(field)
        if section is not None:
            yield from known_keys(section, f"{key}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section, else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"recipe {path} has {len(content)} bytes, which is no recipe; at most {MAX_BYTES} are read")
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        lines = dict(_lines(node, "", path, set())) if node is not None else {}
        values = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} holds no keys; it needs at least `data:` with a `source:`")
    return values, lines


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _lines(node: yaml.Node, prefix: str, path: Path, seen: set[int]) -> Iterator[tuple[str, int]]:
    """Dotted key -> line, from 1. Refuses a key written twice, and anchors (also against nested bombs)."""
    if id(node) in seen:
        raise RecipeError(f"{path}:{node.start_mark.line + 1}: anchors are not used in recipes; write the value again")
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            list(_lines(item, prefix, path, seen))
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in first:
            raise RecipeError(f"{path}:{line}: {key} is written twice; it stands on line {first[key]} already")
        first[key] = line
        yield key, line
        yield from _lines(value_node, f"{key}.", path, seen)


def _put(values: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key, making sections on the way; `base` may be short for `base.model`."""
    *sections, last = key.split(".")
    if key == "base" and isinstance(values.get("base"), dict):
        sections, last = ["base"], "model"
    for name in sections:
        inner = values.get(name)
        if name == "base" and isinstance(inner, str):
            inner = {"model": inner}
        values[name] = dict(inner) if isinstance(inner, dict) else {}
        values = values[name]
    values[last] = value


def _explain(error: ValidationError, origin: Origin) -> Iterator[str]:
    """One line for each problem that pydantic found."""
    fields = dict(known_keys())
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
        place = origin.of(key)
        section, _, name = key.rpartition(".")
        if problem["type"] == "extra_forbidden" and section == "ppo" and name in REFUSED:
            yield f"{place}: {key} is refused: {REFUSED[name]}"
        elif problem["type"] == "extra_forbidden":
            yield f"{place}: {key} is not a key of a recipe{_nearest(key, fields)}"
        elif problem["type"] == "missing":
            yield f"{place}: {key} is missing: {fields[key].description}"
        elif problem["type"] == "value_error":
            for line in problem["msg"].removeprefix("Value error, ").splitlines():
                yield f"{place}: {line}"
        else:
            given = "null" if problem["input"] is None else problem["input"]
            meaning = fields[key].description if key in fields else ""
            yield f"{place}: {key} = {given} is not allowed: {_allowed(problem)}. {meaning}".rstrip()


def _nearest(key: str, fields: Mapping[str, FieldInfo]) -> str:
    section, _, leaf = key.rpartition(".")
    beside = [name for name in fields if name.rpartition(".")[0] == section]
    same_leaf = [name for name in fields if name.rpartition(".")[2] == leaf]
    near = (
        difflib.get_close_matches(key, beside, n=1, cutoff=0.75)
        or same_leaf
        or difflib.get_close_matches(key, fields, n=1, cutoff=0.7)
    )
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; allowed {f'in {section}' if section else 'here'}: {', '.join(n.rpartition('.')[2] for n in beside)}"


def _allowed(problem: Mapping[str, Any]) -> str:
    """Pydantic's message in the words of a recipe."""
    context, kind = problem.get("ctx", {}), problem["type"]
    words = {
        "greater_than": "it must be above {gt}",
        "greater_than_equal": "it must be at least {ge}",
        "less_than": "it must be below {lt}",
        "less_than_equal": "it must be at most {le}",
        "literal_error": "allowed are {expected}",
        "string_pattern_mismatch": "it may hold letters, digits, dots, dashes and underscores, and begins with a "
        "letter, a digit or an underscore",
        "int_parsing": "it must be a whole number",
        "int_type": "it must be a whole number",
        "int_from_float": "it must be a whole number",
        "float_parsing": "it must be a number",
        "float_type": "it must be a number",
        "finite_number": "it must be a finite number",
        "bool_parsing": "it must be true or false",
        "bool_type": "it must be true or false",
        "string_type": "it must be text (put it in quotes)",
        "tuple_type": "it must be a list such as [a, b]",
        "model_type": "it must be a section with keys of its own",
        "model_attributes_type": "it must be a section with keys of its own",
    }
    return words[kind].format(**context) if kind in words else str(problem["msg"])
