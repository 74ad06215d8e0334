"""The DPO source: what the reference says of each answer, and going on from a saved place."""

from __future__ import annotations

import torch

from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives.dpo import DPORow
from stackllama.rollout.preferences import PreferenceSource
from stackllama.tokens.batches import Batch
from stackllama.tokens.forest import Tree, branch_targets, plant
from stackllama.tokens.sources import PairedTree, reward_source
from tests.model.tiny import tiny_model

TREES = [
    PairedTree(Tree((key, 6, 7), ((8, key, 2), (9, 2)), key), ((0, 1),), (0.0,), (0, 1), 1.0, 1.0)
    for key in range(20, 27)
]


def trunk_of() -> Trunk:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    trunk.add_adapter("policy", LoRA(2, 4.0, 0.0, ("q_proj",)), seed=0)
    with torch.no_grad():  # a policy that has moved
        for parameter in trunk.trainable("policy").values():
            parameter.add_(0.1)
    return trunk


def source_of(trunk: Trunk) -> PreferenceSource:
    pairs = reward_source(TREES, questions_per_step=2, row_tokens=12, epochs=2, max_steps=None, seed=3)
    return PreferenceSource(trunk, pairs)


def rest(source: PreferenceSource) -> list[Batch[DPORow]]:
    found = []
    while (batch := source.next()) is not None:
        found.append(batch)
    return found


def test_every_answer_comes_with_the_references_log_probability_and_not_the_policys() -> None:
    trunk = trunk_of()
    alone = {}
    with trunk.use(REFERENCE) as reference:
        for one in TREES:
            forest = plant([one.tree])
            alone[one.tree.key] = reference.logprobs(reference.hidden(forest), branch_targets(forest))
    with trunk.use("policy") as policy:
        assert not torch.allclose(
            policy.logprobs(policy.hidden(forest), branch_targets(forest)), alone[TREES[-1].tree.key]
        )
    batches = rest(source_of(trunk))
    seen = [tree for batch in batches for row in batch.rows for tree in dict.fromkeys(row.forest.tree_of_branch)]
    assert sorted(seen) == sorted(2 * [one.tree.key for one in TREES])
    for batch in batches:
        assert batch.counts == {"questions": batch.notes["questions"]}
        for row in batch.rows:
            wanted = torch.cat([alone[tree] for tree in dict.fromkeys(row.forest.tree_of_branch)])
            torch.testing.assert_close(row.reference_N, wanted)
            assert not row.reference_N.requires_grad


def test_it_goes_on_from_a_saved_place_to_the_same_bits() -> None:
    trunk = trunk_of()
    source = source_of(trunk)
    assert source.total_work == 14
    for _ in range(3):
        source.next()
    source.prepare()  # what is prepared ahead is not part of the state
    state, left = source.state_dict(), rest(source)
    again = source_of(trunk)
    again.load_state_dict(state)
    found = rest(again)
    assert len(found) == len(left) == 5
    for one, other in zip(found, left, strict=True):
        assert (one.counts, one.work) == (other.counts, other.work)
        for row, same in zip(one.rows, other.rows, strict=True):
            assert torch.equal(row.forest.tokens_T, same.forest.tokens_T)
            assert torch.equal(row.reference_N, same.reference_N)
