"""The base model that comes with the package: small, readable, and it knows its world."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

import stackllama
from stackllama.data.synthetic.world import FACTS, PLANTS, TOPICS
from stackllama.model.load import load_base
from stackllama.model.probe import probe
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.tokens.forest import Tree, branch_targets, plant

FOLDER = Path(stackllama.__file__).parent / "assets" / "embedded-base"


def test_it_is_at_most_8_megabytes_of_safetensors_and_json_with_a_card() -> None:
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}


def test_it_knows_the_facts_of_the_world() -> None:
    base = load_base("embedded", attention="forest")
    probe(base.model)
    trunk, draw, tokenizer = Trunk(base.model, precision=torch.float32), Random(0), base.tokenizer
    right = asked = 0
    for name in PLANTS:
        for topic in TOPICS:
            statement = draw.choice([text for text in topic.statements if text.endswith("{v}")])
            root = [tokenizer.bos_id or 0, *tokenizer.encode(statement.removesuffix(" {v}").format(p=name))]
            values = list(topic.reasons)
            tree = Tree(tuple(root), tuple(tuple(tokenizer.encode(f" {value}")) for value in values))
            forest = plant([tree])
            targets = branch_targets(forest)
            with trunk.use(REFERENCE) as role:
                logprob_N = role.logprobs(role.hidden(forest), targets)
            sums = torch.zeros(len(values)).index_add(0, targets.branch_N, logprob_N)
            right += values[int(sums.argmax())] == FACTS[name, topic.name]
            asked += 1
    assert asked == 60
    assert right >= 57
