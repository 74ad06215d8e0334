"""DPO and IPO: numbers worked by hand, an independent way to the same loss and gradients, and learning."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stackllama.model.roles import LoRA, Role, Trunk
from stackllama.objectives.base import Sums
from stackllama.objectives.dpo import LOSSES, DPOObjective, DPORow, PairLoss, dpo_loss, ipo_loss
from stackllama.rollout.preferences import PreferenceSource
from stackllama.tokens.batches import Batch
from stackllama.tokens.forest import Forest, Targets, Tree, branch_targets, plant
from stackllama.tokens.sources import PairedTree, reward_source
from tests.model.tiny import tiny_model

ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj"))
BETA = 0.5
ROOM = 64
"""Tokens of a row: the questions below need several."""

QUESTIONS = [
    PairedTree(
        Tree((5, 6, 7), ((8, 9, 2), (10, 11, 12, 13, 2), (14, 2)), 0),
        ((0, 1), (0, 2), (1, 2)),
        (0.0, 0.0, 0.0),
        (0, 1, 2),
        1 / 3,
        1.0,
    ),
    PairedTree(Tree((20, 21), ((22, 2), (23, 24, 25, 2)), 1), ((1, 0),), (0.3,), (0, 1), 1.0, 1.0),
    PairedTree(Tree(tuple(range(30, 60)), ((61, 62, 63, 2), (64, 2)), 2), ((0, 1),), (0.0,), (0, 1), 2.0, 2.0),
    PairedTree(Tree(tuple(range(60, 80)), ((81, 82, 2), (83, 84, 85, 2)), 3), ((0, 1),), (0.0,), (0, 1), 1.0, 1.0),
]
"""Pairs that share a question, a margin, and a question that counts twice."""


class Told:
    """A role whose log-probabilities are given."""

    def __init__(self, logprob_N: Tensor) -> None:
        self.logprob_N = logprob_N

    def hidden(self, _: Forest) -> None:
        return None

    def logprobs(self, _: None, targets: Targets) -> Tensor:
        assert len(targets.label_N) == len(self.logprob_N)
        return self.logprob_N


def sums_of(role: Told, row: DPORow, loss: PairLoss, beta: float) -> Sums:
    return DPOObjective(loss, beta=beta)(cast("Role", role), row)


def two_answers(*, margin: float = 0.0, weight: float = 1.0) -> DPORow:
    """One pair: a better answer of two tokens, a worse one of one, by the reference at -1, -2 and -3 nats."""
    forest = plant([Tree((5,), ((6, 2), (2,)))])
    numbers = (torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0]), torch.tensor([1]))
    return DPORow(forest, branch_targets(forest), *numbers, torch.tensor([margin]), torch.tensor([weight]))


def trunk_of(*, full: bool = False, seed: int = 0) -> Trunk:
    trunk = Trunk(tiny_model(seed=seed), precision=torch.float32)
    if full:
        trunk.add_copy("policy")
    else:
        trunk.add_adapter("policy", ADAPTER, seed=1)
    return trunk


def source_of(trunk: Trunk, trees: list[PairedTree], *, each: int = 4, epochs: float = 1) -> PreferenceSource:
    pairs = reward_source(trees, questions_per_step=each, row_tokens=ROOM, epochs=epochs, max_steps=None, seed=0)
    return PreferenceSource(trunk, pairs)


def batch_of(trunk: Trunk, trees: list[PairedTree]) -> Batch[DPORow]:
    batch = source_of(trunk, trees, each=len(trees)).next()
    assert batch is not None
    return batch


def learn(trunk: Trunk, objective: DPOObjective, batch: Batch[DPORow]) -> tuple[float, dict[str, float]]:
    """Loss and metrics of a batch; the gradients are left in the policy."""
    loss, metrics = 0.0, dict.fromkeys(objective.metric_counts, 0.0)
    with trunk.use("policy", training=True) as policy:
        for row in batch.rows:
            found = objective(policy, row)
            mean = found.losses["preference_loss"] / batch.counts["questions"]
            mean.backward()
            loss += float(mean.detach())
            for name, value in found.metrics.items():
                metrics[name] += float(value) / batch.counts["questions"]
    return loss, metrics


def test_losses_of_a_gap_worked_by_hand() -> None:
    gap_P = torch.tensor([2.0, -1.0])
    # At beta 0.5 rewards differ by 1 and -0.5. log(1 + e^-1) = log 1.367879 = 0.313262; log(1 + e^0.5) = log 2.648721 =
    # 0.974077.
    assert dpo_loss(gap_P, beta=0.5).tolist() == pytest.approx([0.313262, 0.974077], abs=1e-6)
    # The other way round 1.313262 and 0.474077. With 0.1 of it: 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262, and
    # 0.9 * 0.974077 + 0.1 * 0.474077 = 0.924077.
    assert dpo_loss(gap_P, beta=0.5, label_smoothing=0.1).tolist() == pytest.approx([0.413262, 0.924077], abs=1e-6)
    # At beta 0.25 the gap is to be 1 / 0.5 = 2: (2 - 2)^2 = 0, (-1 - 2)^2 = 9.
    assert ipo_loss(gap_P, beta=0.25).tolist() == pytest.approx([0.0, 9.0])


def test_a_pair_worked_by_hand_with_its_margin_and_weight() -> None:
    # The policy gives -0.5, -1.5 | -3.4: log-ratios 0.5 + 0.5 = 1 and -0.4, gap 1.4. At beta 0.5 rewards 0.5 and -0.2,
    # margin 0.7. The pair asks for 0.2 more: 0.7 - 0.2 = 0.5, loss log(1 + e^-0.5) = 0.474077, three times 1.422231.
    role = Told(torch.tensor([-0.5, -1.5, -3.4]))
    found = sums_of(role, two_answers(margin=0.2, weight=3.0), partial(dpo_loss, beta=0.5), 0.5)
    assert float(found.losses["preference_loss"]) == pytest.approx(1.422231, abs=1e-5)
    assert {name: float(value) for name, value in found.metrics.items()} == pytest.approx(
        {"accuracy": 3.0, "margin": 2.1, "better_reward": 1.5, "worse_reward": -0.6}, abs=1e-5
    )
    # IPO asks for a gap of 1 / (2 * 0.5) = 1, and for 0.2 / 0.5 = 0.4 more: (1.4 - 1.4)^2 = 0.
    found = sums_of(role, two_answers(margin=0.2), partial(ipo_loss, beta=0.5), 0.5)
    assert float(found.losses["preference_loss"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("logprobs", "accuracy"), [((-1, -2, -3), 0.5), ((-1, -2, -2.9), 0.0), ((-1, -1.9, -3), 1.0)])
def test_an_equal_reward_counts_one_half(logprobs: tuple[float, ...], accuracy: float) -> None:
    found = sums_of(Told(torch.tensor(logprobs)), two_answers(), partial(dpo_loss, beta=0.5), 0.5)
    assert float(found.metrics["accuracy"]) == accuracy


@pytest.mark.parametrize("full", [False, True])
def test_the_first_step_is_exact(*, full: bool) -> None:
    trunk = trunk_of(full=full)
    plain = [
        PairedTree(one.tree, one.pairs, (0.0,) * len(one.pairs), one.answers, one.share, one.weight)
        for one in QUESTIONS
    ]
    batch = batch_of(trunk, plain)
    assert len(batch.rows) > 1
    assert batch.counts == {"questions": 5.0}
    with trunk.use("policy", training=True) as policy:
        for row in batch.rows:
            assert torch.equal(policy.logprobs(policy.hidden(row.forest), row.targets).detach(), row.reference_N)
    loss, metrics = learn(trunk, DPOObjective(partial(dpo_loss, beta=BETA), beta=BETA), batch)
    assert loss == pytest.approx(math.log(2), rel=1e-7)
    assert metrics == pytest.approx({"accuracy": 0.5, "margin": 0, "better_reward": 0, "worse_reward": 0}, abs=1e-7)


def test_at_the_first_step_the_gradient_is_that_of_half_beta_times_the_gap() -> None:
    # d/dg -log sigmoid(beta g) = -beta (1 - sigmoid(beta g)); at g = 0 that is -beta / 2 = -0.25 for each better token
    # and +0.25 for each worse one. IPO: 2 (0 - 1 / (2 beta)) = -2 for beta 0.5.
    for loss, slope in ((dpo_loss, 0.25), (ipo_loss, 2.0)):
        logprob_N = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
        found = sums_of(Told(logprob_N), two_answers(weight=2.0), partial(loss, beta=0.5), 0.5)
        found.losses["preference_loss"].backward()
        assert logprob_N.grad is not None
        assert logprob_N.grad.tolist() == pytest.approx([-2 * slope, -2 * slope, 2 * slope])


def apart(model: PreTrainedModel, root: tuple[int, ...], branches: tuple[tuple[int, ...], ...]) -> Tensor:
    """Summed log-probabilities of answers, as separate sequences padded on the right, by transformers alone."""
    longest = len(root) + max(map(len, branches))
    ids = torch.tensor([[*root, *branch] + [0] * (longest - len(root) - len(branch)) for branch in branches])
    mask = torch.tensor([[1] * (len(root) + len(b)) + [0] * (longest - len(root) - len(b)) for b in branches])
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    found = torch.gather(logits[:, :-1].log_softmax(-1), 2, ids[:, 1:, None])[..., 0]
    of_answer = mask[:, 1:].clone()
    of_answer[:, : len(root) - 1] = 0
    return (found * of_answer).sum(1)


@pytest.mark.parametrize("name", list(LOSSES))
def test_loss_and_gradients_are_those_of_separate_padded_sequences(name: str) -> None:
    trunk = trunk_of(full=True)
    policy, reference = (tiny_model(attention="sdpa") for _ in range(2))
    with torch.no_grad():
        for (key, parameter), (other, own) in zip(
            policy.named_parameters(), trunk.trainable("policy").items(), strict=True
        ):
            assert key == other
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
            own.copy_(parameter)
    policy.requires_grad_(True)
    loss, metrics = learn(trunk, DPOObjective(partial(LOSSES[name], beta=BETA), beta=BETA), batch_of(trunk, QUESTIONS))
    total, margin = torch.zeros(()), 0.0
    for one in QUESTIONS:
        with torch.no_grad():
            known = apart(reference, one.tree.root, one.tree.branches)
        ratio = apart(policy, one.tree.root, one.tree.branches) - known
        for (better, worse), asked in zip(one.pairs, one.margins, strict=True):
            gap = ratio[better] - ratio[worse]
            wanted = BETA * gap - asked
            term = torch.log1p(torch.exp(-wanted)) if name == "dpo" else ((wanted - 0.5) / BETA) ** 2
            total = total + one.weight / len(one.pairs) * term / 5
            margin += one.weight / len(one.pairs) * BETA * float(gap.detach()) / 5
    total.backward()
    assert abs(margin) > 0.01
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert metrics["margin"] == pytest.approx(margin, abs=1e-5)
    for key, parameter in policy.named_parameters():
        ours = trunk.trainable("policy")[key].grad
        assert ours is not None
        assert parameter.grad is not None
        assert float((ours - parameter.grad).norm()) <= 1e-5 * float(parameter.grad.norm()) + 1e-8, key


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("full", [False, True])
def test_it_learns_which_answers_are_better_and_the_reference_stays(name: str, *, full: bool) -> None:
    trunk = trunk_of(full=full)
    before = copy.deepcopy({key: value for key, value in trunk.model.state_dict().items() if "lora" not in key})
    trees = [
        PairedTree(
            Tree((5, 6, key), ((8, 9, 2), (10, 11, 2)), key), ((key % 2, 1 - key % 2),), (0.0,), (0, 1), 1.0, 1.0
        )
        for key in range(20, 36)
    ]
    objective = DPOObjective(partial(LOSSES[name], beta=BETA), beta=BETA)
    optimizer = torch.optim.AdamW(trunk.trainable("policy").values(), lr=1e-2 if not full else 1e-3)
    source = source_of(trunk, trees, each=16, epochs=30)
    seen = []
    while (batch := source.next()) is not None:
        optimizer.zero_grad()
        seen.append(learn(trunk, objective, batch))
        optimizer.step()
    assert seen[0][1]["accuracy"] == 0.5
    assert seen[-1][1]["accuracy"] > 0.9
    assert seen[-1][0] < 0.5 * seen[0][0]
    after = {key: value for key, value in trunk.model.state_dict().items() if "lora" not in key}
    assert all(torch.equal(before[key], value) for key, value in after.items())
