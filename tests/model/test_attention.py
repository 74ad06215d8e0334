"""The forest probe: packed equals separate, for log-probabilities and gradients, on every supported kind of model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stackllama.model.attention import forest_attention
from stackllama.model.blocks import plan_blocks
from stackllama.tokens.forest import Forest, Segment, Tree, plant
from tests.model.tiny import CONFIGS, random_trees, tiny_model


def packed_hidden(model: PreTrainedModel, forest: Forest) -> Tensor:
    output = model.base_model(
        input_ids=forest.tokens_T[None],
        position_ids=forest.positions_T[None],
        forest_plan=plan_blocks(forest),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def separate_hidden(model: PreTrainedModel, forest: Forest, segment: Segment) -> Tensor:
    """A segment's hidden states from its own sequence (root and branch), under the model's own causal attention."""
    places = torch.arange(segment.start, segment.stop)
    if not segment.is_root:
        places = torch.cat([torch.arange(segment.root_start, segment.root_stop), places])
    output = model.base_model(input_ids=forest.tokens_T[places][None], use_cache=False)
    hidden: Tensor = output.last_hidden_state[0, -segment.length :]
    return hidden


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_equals_separate_in_hidden_states_and_gradients(kind: str) -> None:
    packed, separate = tiny_model(kind), tiny_model(kind, attention="eager")
    forest = plant(random_trees(1))
    weight_TD = torch.randn(len(forest), 64, generator=torch.Generator().manual_seed(2))
    hidden_TD = packed_hidden(packed, forest)
    total = torch.zeros(())
    for segment in forest.segments:
        expected = separate_hidden(separate, forest, segment)
        place = slice(segment.start, segment.stop)
        assert (hidden_TD[place] - expected).norm() <= 1e-5 * expected.norm()
        total = total + (expected * weight_TD[place]).sum()
    total.backward()
    (hidden_TD * weight_TD).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, name
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_changing_one_branch_leaves_every_other_segment_unchanged(kind: str) -> None:
    model = tiny_model(kind)
    trees = random_trees(3)
    changed_tree = trees[0]
    first = tuple(token + 1 if token < 90 else token - 1 for token in changed_tree.branches[0])
    other = [Tree(changed_tree.root, (first, changed_tree.branches[1]), changed_tree.key), *trees[1:]]
    before, after = plant(trees), plant(other)
    with torch.no_grad():
        one, two = packed_hidden(model, before), packed_hidden(model, after)
    touched = before.branches[0]
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[touched.start : touched.stop] = False
    assert torch.equal(one[untouched], two[untouched])
    assert not torch.equal(one[~untouched], two[~untouched])


def test_a_call_without_plan_or_cache_raises_instead_of_attending_to_everything() -> None:
    with pytest.raises(ValueError, match="needs forest_plan= or key_value_cache="):
        tiny_model().base_model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)


@pytest.mark.parametrize("keyword", [{"dropout": 0.1}, {"attention_mask": torch.ones(1)}, {"alibi": torch.ones(1)}])
def test_keywords_that_are_not_honoured_raise(keyword: dict[str, object]) -> None:
    forest = plant([Tree((5, 6, 7))])
    x = torch.ones(1, 2, 3, 4)
    call = {"attention_mask": None, "forest_plan": plan_blocks(forest), **keyword}
    with pytest.raises(ValueError, match=next(iter(keyword))):
        forest_attention(torch.nn.Identity(), x, x, x, **call)  # type: ignore[arg-type]


def test_sinks_take_probability_and_give_nothing() -> None:
    # One query, one key: score 0, sink 0. softmax over (0, 0) gives the key 1/2, so the output is half the value.
    forest = plant([Tree((5,))])
    zero, value = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 3.0)
    out, _ = forest_attention(
        torch.nn.Identity(), zero, zero, value, None, forest_plan=plan_blocks(forest), s_aux=torch.zeros(1)
    )
    assert torch.allclose(out, torch.full_like(out, 1.5))


def test_work_follows_the_edges_of_the_forest() -> None:
    # 40 short trees in one row: 40 * (20 * 20 + 2 * 10 * 30) = 40,000 real score places; a square mask has 1,600 ** 2.
    trees = [Tree(tuple([5] * 20), (tuple([6] * 10), tuple([7] * 10)), key) for key in range(40)]
    plan = plan_blocks(plant(trees))
    places = sum(group.hidden_SQL.numel() for group in plan.groups)
    assert places < 1.5 * 40_000
