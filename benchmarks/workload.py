"""What both sides of a benchmark train on: token ids of the lengths that real questions and answers have.

`lengths.json` holds the lengths in tokens of the questions of a real site, of their answers, and which answer is better
than which (beer.stackexchange.com, SmolLM2's tokenizer, the default rules of pairs); numbers alone, no text, so that
the benchmark needs no dump. The ids are drawn at random: what a token is costs nothing. `python benchmarks/workload.py
DUMP` writes it anew.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stackllama.tokens.forest import Tree
from stackllama.tokens.sources import PairedTree

LENGTHS = Path(__file__).with_name("lengths.json")
MOST_QUESTION, MOST_ANSWER = 384, 384
"""Tokens; longer ones are left out, as recipes/smollm2-beer.yaml does."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A question's length, those of its answers, and its pairs (better, worse)."""

    question: int
    answers: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


def shapes() -> list[Shape]:
    """The questions of lengths.json, in an order of their own."""
    read = json.loads(LENGTHS.read_text("utf-8"))
    found = [Shape(q, tuple(a), tuple((b, w) for b, w in p)) for q, a, p in read["questions"]]
    return [found[at] for at in np.random.default_rng(0).permutation(len(found))]


def documents(vocabulary: int, most: int) -> list[list[int]]:
    """Questions with their first answers, as one text each, of at most `most` tokens."""
    random = np.random.default_rng(1)
    lengths = [shape.question + shape.answers[0] for shape in shapes()]
    return [random.integers(100, vocabulary, length).tolist() for length in lengths if length <= most]


def paired(vocabulary: int) -> list[PairedTree]:
    """Questions with their answers and pairs, every question of weight 1."""
    random = np.random.default_rng(2)
    found = []
    for key, shape in enumerate(shapes()):
        root, *branches = (
            tuple(random.integers(100, vocabulary, length).tolist()) for length in (shape.question, *shape.answers)
        )
        margins = (0.0,) * len(shape.pairs)
        places = tuple(range(len(branches)))
        tree = Tree(root, tuple(branches), key)
        found.append(PairedTree(tree, shape.pairs, margins, places, 1 / len(shape.pairs), 1.0))
    return found


def measure(dump: Path) -> list[list[object]]:
    """The lengths of a dump's questions that have a pair."""
    from stackllama.data.building import build
    from stackllama.data.store import store
    from stackllama.data_settings import build_settings
    from stackllama.model.load import load_base
    from stackllama.recipe_load import load_recipe
    from stackllama.tokens.sources import encode_pairs

    tokenizer = load_base("smollm2-135m-instruct").tokenizer
    settings = build_settings(load_recipe("smollm2-beer", {"data.source": str(dump)}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "data"
        build.build(
            build.sources([dump]), folder, settings, build.Machine(), ledger=folder / "ledger.parquet", fingerprint=0
        )
        questions = [one for split in ("sft", "reward", "judge") for one in store.read_questions(folder, split)]
    encoded = encode_pairs(
        tokenizer,
        questions,
        titles=True,
        answers_per_question=8,
        max_question_tokens=MOST_QUESTION,
        max_answer_tokens=MOST_ANSWER,
        row_tokens=2048,
        by_pairs=False,
        seed=0,
    )
    return [[len(one.tree.root), [*map(len, one.tree.branches)], one.pairs] for one in encoded.items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    rows = measure(parser.parse_args().dump)
    LENGTHS.write_text(json.dumps({"questions": rows}, separators=(",", ":")) + "\n", "utf-8")
    print(f"{LENGTHS}: {len(rows)} questions")


if __name__ == "__main__":
    main()
