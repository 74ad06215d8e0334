from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from stackllama.objectives.advantages import WITHOUT_VALUES, best, gae, grpo, reinforce, rloo
from stackllama.objectives.ppo import policy_loss


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rewards_N, values_N = torch.randn((2, sum(lengths)), generator=generator, dtype=torch.float64)
    return rewards_N, values_N, sequence_N


def test_by_hand() -> None:
    # gamma 1/2, lambda 1/2, so gamma * lambda = 1/4.
    # Response 0 has rewards 1 0 2 and values 4 2 8; response 1 has reward 3 and value 1.
    # delta: 1 + 2/2 - 4 = -2;  0 + 8/2 - 2 = 2;  2 + 0 - 8 = -6 (nothing follows);     3 + 0 - 1 = 2.
    # A from the end: -6;  2 - 6/4 = 0.5;  -2 + 0.5/4 = -1.875;                          2.
    # returns A + V: 2.125, 2.5, 2;                                                      3.
    advantages_N, returns_N = gae(
        torch.tensor([1.0, 0.0, 2.0, 3.0]),
        torch.tensor([4.0, 2.0, 8.0, 1.0]),
        torch.tensor([0, 0, 0, 1]),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages_N.tolist() == [-1.875, 0.5, -6.0, 2.0]
    assert returns_N.tolist() == [2.125, 2.5, 2.0, 3.0]


def test_lambda_1_is_the_discounted_return_minus_the_value() -> None:
    rewards_N, values_N, sequence_N = ragged([4, 1, 7])
    advantages_N, returns_N = gae(rewards_N, values_N, sequence_N, gamma=0.9, lam=1.0)
    expected = []
    for start, end in ((0, 4), (4, 5), (5, 12)):
        expected += [sum(0.9 ** (u - t) * rewards_N[u].item() for u in range(t, end)) for t in range(start, end)]
    torch.testing.assert_close(returns_N, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(advantages_N, torch.tensor(expected, dtype=torch.float64) - values_N)


def test_lambda_0_is_the_one_step_td_error() -> None:
    rewards_N, values_N, sequence_N = ragged([3, 2])
    advantages_N, _ = gae(rewards_N, values_N, sequence_N, gamma=0.9, lam=0.0)
    r, v = rewards_N.tolist(), values_N.tolist()
    expected = [
        r[0] + 0.9 * v[1] - v[0],
        r[1] + 0.9 * v[2] - v[1],
        r[2] - v[2],
        r[3] + 0.9 * v[4] - v[3],
        r[4] - v[4],
    ]
    torch.testing.assert_close(advantages_N, torch.tensor(expected, dtype=torch.float64))


def test_a_response_does_not_depend_on_the_others_nor_on_their_order() -> None:
    rewards_N, values_N, sequence_N = ragged([5, 2, 9])
    together, _ = gae(rewards_N, values_N, sequence_N, gamma=1.0, lam=0.95)
    for start, end in ((0, 5), (5, 7), (7, 16)):
        zeros = torch.zeros(end - start, dtype=torch.int64)
        alone, _ = gae(rewards_N[start:end], values_N[start:end], zeros, gamma=1.0, lam=0.95)
        assert torch.equal(alone, together[start:end])
    order = torch.cat([torch.arange(7, 16), torch.arange(0, 7)])
    moved, _ = gae(rewards_N[order], values_N[order], sequence_N[order], gamma=1.0, lam=0.95)
    assert torch.equal(moved, together[order])


def test_nothing_flows_back() -> None:
    rewards_N, values_N, sequence_N = ragged([2])
    advantages_N, returns_N = gae(rewards_N, values_N.requires_grad_(), sequence_N, gamma=1.0, lam=1.0)
    assert not advantages_N.requires_grad
    assert not returns_N.requires_grad


def test_no_tokens() -> None:
    nothing = torch.zeros(0)
    advantages_N, returns_N = gae(nothing, nothing, torch.zeros(0, dtype=torch.int64), gamma=1.0, lam=1.0)
    assert (advantages_N.shape, returns_N.shape) == ((0,), (0,))


def test_refuses_what_it_cannot_do_right() -> None:
    rewards_N, values_N, sequence_N = ragged([2, 2])
    with pytest.raises(ValueError, match=r"lam is 1\.5, allowed is 0 to 1"):
        gae(rewards_N, values_N, sequence_N, gamma=1.0, lam=1.5)
    with pytest.raises(ValueError, match="float32 or float64"):
        gae(rewards_N.bfloat16(), values_N.bfloat16(), sequence_N, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="shapes"):
        gae(rewards_N[:3], values_N, sequence_N, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="not contiguous"):
        gae(rewards_N, values_N, torch.tensor([0, 1, 0, 1]), gamma=1.0, lam=1.0)


# Five responses to two prompts, 7 and 3, not in order; their tokens' rewards add up to 1, 2, 4, 6 and 7:
#   prompt 7: 0.5 + 0.5 = 1,  -1 + 5 = 4,  3 + 3 + 1 = 7, mean 4, deviations -3 0 3, variance (9 + 0 + 9) / 3 = 6
#   prompt 3: 2, 6, mean 4, deviations -2 2, variance 4
REWARDS = torch.tensor([0.5, 0.5, 2.0, -1.0, 5.0, 6.0, 3.0, 3.0, 1.0])
SEQUENCE = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4, 4])
PROMPT = torch.tensor([7, 3, 7, 3, 7])


def each_token(*advantages: float) -> list[float]:
    """The advantage of each of the five responses at each of its tokens."""
    return [advantages[at] for at in SEQUENCE.tolist()]


def test_rloo_by_hand() -> None:
    # Minus the mean of the prompt's others: 1 - (4 + 7) / 2 = -4.5, 2 - 6 = -4, 4 - (1 + 7) / 2 = 0, 6 - 2 = 4,
    # 7 - (1 + 4) / 2 = 4.5.
    assert rloo(REWARDS, SEQUENCE, PROMPT).tolist() == each_token(-4.5, -4.0, 0.0, 4.0, 4.5)


def test_grpo_by_hand() -> None:
    # Deviations over (their root mean square + 0.0001): -3 / 2.44959 = -1.22470, -2 / 2.0001 = -0.99995, and so on.
    expected = each_token(-1.22470, -0.99995, 0.0, 0.99995, 1.22470)
    assert grpo(REWARDS, SEQUENCE, PROMPT).tolist() == pytest.approx(expected, abs=1e-5)


def test_reinforce_by_hand() -> None:
    # All five add up to 20. Minus the mean of the other four: 1 - 19 / 4 = -3.75, 2 - 18 / 4 = -2.5, 4 - 16 / 4 = 0,
    # 6 - 14 / 4 = 2.5, 7 - 13 / 4 = 3.75.
    assert reinforce(REWARDS, SEQUENCE, PROMPT).tolist() == each_token(-3.75, -2.5, 0.0, 2.5, 3.75)


def test_best_by_hand() -> None:
    # The highest of prompt 7's 1, 4 and 7, and of prompt 3's 2 and 6.
    assert best(REWARDS, SEQUENCE, PROMPT).tolist() == each_token(0.0, 0.0, 0.0, 1.0, 1.0)
    # Prompt 7's third response loses 3 at its last token: 1, 4, 4. The two that are highest share the 1.
    equal = REWARDS - 3.0 * (torch.arange(9) == 8)
    assert best(equal, SEQUENCE, PROMPT).tolist() == each_token(0.0, 0.0, 0.5, 1.0, 0.5)


def random_groups() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of 12 ragged responses, four to each of three prompts, mixed."""
    lengths = [1, 4, 2, 7, 3, 3, 5, 1, 2, 6, 4, 2]
    rewards_N, _, sequence_N = ragged(lengths)
    return rewards_N, sequence_N, torch.tensor([0, 1, 2] * 4)


def first_tokens(sequence_N: Tensor) -> Tensor:
    return torch.tensor([int((sequence_N == at).nonzero()[0]) for at in range(int(sequence_N.max()) + 1)])


@pytest.mark.parametrize("name", ["rloo", "grpo", "reinforce"])
def test_every_token_of_a_response_has_its_advantage_and_those_that_are_compared_add_up_to_0(name: str) -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    advantage_N = WITHOUT_VALUES[name](rewards_N, sequence_N, prompt_S)
    advantage_S = advantage_N[first_tokens(sequence_N)]
    assert torch.equal(advantage_N, advantage_S[sequence_N])
    for group in [prompt_S < 3] if name == "reinforce" else [prompt_S == at for at in range(3)]:
        assert float(advantage_S[group].sum()) == pytest.approx(0.0, abs=1e-12)
        assert float(advantage_S[group].abs().max()) > 0.1


@pytest.mark.parametrize("name", list(WITHOUT_VALUES))
def test_what_all_compared_responses_earn_more_changes_nothing(name: str) -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    before = WITHOUT_VALUES[name](rewards_N, sequence_N, prompt_S)
    more_S = torch.full((12,), 50.0).double() if name == "reinforce" else torch.tensor([50.0, -3.0, 8.0] * 4).double()
    richer_N = rewards_N.index_add(0, first_tokens(sequence_N), more_S)
    torch.testing.assert_close(WITHOUT_VALUES[name](richer_N, sequence_N, prompt_S), before)


@pytest.mark.parametrize("name", list(WITHOUT_VALUES))
def test_the_order_of_the_samples_does_not_matter(name: str) -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    before = WITHOUT_VALUES[name](rewards_N, sequence_N, prompt_S)
    order = [5, 0, 11, 3, 2, 10, 1, 9, 4, 8, 6, 7]
    place_N = torch.cat([(sequence_N == at).nonzero().flatten() for at in order])
    moved_N = torch.repeat_interleave(torch.arange(12), torch.bincount(sequence_N)[order])
    after = WITHOUT_VALUES[name](rewards_N[place_N], moved_N, prompt_S[order])
    torch.testing.assert_close(after, before[place_N])


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_what_a_response_is_measured_by_does_not_hang_on_itself(name: str) -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    richer_N = rewards_N.clone()
    richer_N[2] += 10.0  # a token of response 1
    rise_N = WITHOUT_VALUES[name](richer_N, sequence_N, prompt_S) - WITHOUT_VALUES[name](
        rewards_N, sequence_N, prompt_S
    )
    torch.testing.assert_close(rise_N[sequence_N == 1], torch.full((4,), 10.0).double())


def test_grpo_does_not_see_the_scale_of_rewards_and_equal_ones_give_0() -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    expected = grpo(rewards_N, sequence_N, prompt_S)
    # The addend to the deviations, of 1 and more here, weighs 1 part in 10,000 at most.
    torch.testing.assert_close(grpo(1000.0 * rewards_N, sequence_N, prompt_S), expected, rtol=2e-4, atol=0.0)
    equal_N = torch.tensor([0.1, 0.2, 0.3, 0.3])
    assert grpo(equal_N, torch.tensor([0, 0, 1, 2]), torch.tensor([4, 4, 4])).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_on_average_the_loss_has_the_gradient_of_the_expected_reward(name: str) -> None:
    # A policy of one token over three, two samples of one prompt: all nine pairs, each weighted by its probability.
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = torch.autograd.grad((torch.softmax(logits, 0) * reward).sum(), logits)[0]
    logprob = torch.log_softmax(logits, 0)
    found = torch.zeros(3, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        action = torch.tensor(pair)
        advantage = WITHOUT_VALUES[name](reward[action], torch.tensor([0, 1]), torch.tensor([0, 0]))
        loss = policy_loss(logprob[action], logprob[action].detach(), advantage, clip=0.2).mean()
        chance = logprob[action].detach().sum().exp()
        found -= chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", list(WITHOUT_VALUES))
def test_at_ratio_1_the_gradient_is_the_policy_gradient_of_the_estimate(name: str) -> None:
    advantage = {  # of the five responses, from the numbers worked by hand above
        "rloo": each_token(-4.5, -4.0, 0.0, 4.0, 4.5),
        "grpo": each_token(-1.22470, -0.99995, 0.0, 0.99995, 1.22470),
        "reinforce": each_token(-3.75, -2.5, 0.0, 2.5, 3.75),
        "best": each_token(0.0, 0.0, 0.0, 1.0, 1.0),
    }[name]
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    action = torch.tensor([1, 0, 6, 3, 3, 2, 5, 0, 4])
    logprob = torch.log_softmax(logits, -1)[torch.arange(9), action]
    estimated = WITHOUT_VALUES[name](REWARDS, SEQUENCE, PROMPT)
    found = torch.autograd.grad(policy_loss(logprob, logprob.detach(), estimated, clip=0.2).sum(), logits)[0]
    # d/dlogits of -A log pi(a) is A (softmax - onehot).
    away = torch.softmax(logits.detach(), -1) - torch.nn.functional.one_hot(action, 7)
    torch.testing.assert_close(found, torch.tensor(advantage)[:, None] * away, atol=1e-5, rtol=1e-5)


def test_without_values_nothing_flows_back_and_no_tokens_are_no_error() -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for estimate in WITHOUT_VALUES.values():
        assert not estimate(rewards_N.clone().requires_grad_(), sequence_N, prompt_S).requires_grad
        assert estimate(nothing, none, none).shape == (0,)


def test_a_response_with_nothing_to_compare_it_with_is_refused() -> None:
    rewards_N, sequence_N, prompt_S = torch.ones(3), torch.tensor([0, 1, 2]), torch.tensor([5, 6, 5])
    for name in ("rloo", "grpo", "best"):
        with pytest.raises(ValueError, match=f"a prompt has 1 response, {name} compares 2 at least"):
            WITHOUT_VALUES[name](rewards_N, sequence_N, prompt_S)
    assert reinforce(rewards_N, sequence_N, prompt_S).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="a batch has 1 response, reinforce compares 2 at least"):
        reinforce(rewards_N[:1], sequence_N[:1], prompt_S[:1])


def test_without_values_too_it_refuses_what_it_cannot_do_right() -> None:
    rewards_N, sequence_N, prompt_S = random_groups()
    for estimate in WITHOUT_VALUES.values():
        with pytest.raises(ValueError, match="float32 or float64"):
            estimate(rewards_N.bfloat16(), sequence_N, prompt_S)
        with pytest.raises(ValueError, match=r"holds 0\.\.11, allowed are 0\.\.10"):
            estimate(rewards_N, sequence_N, prompt_S[:11])
        with pytest.raises(ValueError, match="one prompt for each response"):
            estimate(rewards_N, sequence_N, prompt_S[None])
        with pytest.raises(ValueError, match="not contiguous"):
            estimate(rewards_N, sequence_N.roll(1), prompt_S)
