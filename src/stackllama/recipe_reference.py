"""The reference of the recipe, written from the models themselves: `docs/recipe.md`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stackllama.recipe import Recipe
from stackllama.recipe_load import section_of

INTRODUCTION = """# Recipe reference

A recipe is one YAML file; it states only what differs from the defaults below. Any key can be set on the command line
by its dotted name: `stackllama run recipes/quickstart.yaml --ppo.kl.target 6 --name try-6`. Lists are written
`[a, b]`, nothing is written `null`. `stackllama recipe show RECIPE` prints a recipe with every key written out.

This page is written by `stackllama recipe reference`; a test keeps it and the code the same.
"""


def reference() -> str:
    """The whole page, in Markdown."""
    return INTRODUCTION + "".join(_section("", Recipe, "Top level"))


def _section(prefix: str, model: type[BaseModel], title: str) -> Iterator[str]:
    """A table of the section's own keys, then the sections inside it."""
    doc = (model.__doc__ or "").strip()
    yield f"\n## {title}\n\n{doc}\n\n| key | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
    sections = []
    for name, field in model.model_fields.items():
        key, inner = f"{prefix}{field.alias or name}", section_of(field)
        if inner is not None:
            sections.append((key, inner))
            continue
        yield f"| `{key}` | {_default(field)} | {_cell(allowed_values(field))} | {_cell(field.description or '')} |\n"
    for key, inner in sections:
        yield from _section(f"{key}.", inner, f"`{key}`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    value: Any = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
    return f"`{text}`"


def allowed_values(field: FieldInfo) -> str:
    """The range or the words that a field allows; empty where its type says it all."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    ranges = [
        f"{sign} {getattr(meta, name):,g}"
        if isinstance(getattr(meta, name), float)
        else f"{sign} {getattr(meta, name):,}"
        for meta in field.metadata
        for name, sign in signs.items()
        if hasattr(meta, name)
    ]
    words = [f"`{word}`" for word in _words(field.annotation)]
    if type(None) in get_args(field.annotation):
        words.append("`null`")
    return ", ".join(ranges + words)


def _words(kind: Any) -> list[str]:
    return [word for inner in get_args(kind) for word in ([inner] if isinstance(inner, str) else _words(inner))]
