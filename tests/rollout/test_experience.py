"""The PPO source: bitwise step 0, hand-worked rewards, rounds that resume in the middle."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stackllama.errors import DataError
from stackllama.model.roles import REFERENCE, LoRA, Trunk
from stackllama.objectives import kl, ppo, reward
from stackllama.objectives.advantages import WITHOUT_VALUES, Estimate
from stackllama.objectives.scaling import ScoreShaping
from stackllama.rollout.engine import Sampler, Sampling, sample
from stackllama.rollout.experience import POLICY, ExperienceSource, PPOSettings, response_scores, token_rewards
from stackllama.rollout.mismatch import UNLIMITED, Mismatch
from stackllama.tokens.batches import StepResult
from stackllama.tokens.forest import Tree, branch_targets, last_tokens, plant
from tests.model.tiny import VOCABULARY, tiny_model

EOS = 2
ADAPTER = LoRA(4, 8.0, 0.0, ("q_proj", "v_proj", "up_proj"))
TARGET = 0.5
"""Near the KL that the moved policy has, so that the controller's error is not clipped."""


def make_trunk(method: str = "lora", precision: torch.dtype = torch.float32, *, values: bool = True) -> Trunk:
    model = tiny_model()
    trunk = Trunk(model.to(precision) if method == "lora" else model, precision=precision)
    for seed, role in enumerate((POLICY, "reward")):
        if method == "lora":
            trunk.add_adapter(role, ADAPTER, seed=seed)
        else:
            trunk.add_copy(role)
    if values:
        trunk.add_head(POLICY, ppo.HEAD, spread=0.0, seed=0)
    trunk.add_head("reward", reward.HEAD, spread=0.1, seed=1)
    return trunk


def make_source(
    trunk: Trunk,
    *,
    target: float = 6.0,
    scaling: bool = False,
    clip: float | None = None,
    estimate: Estimate | None = None,
    controller: kl.Controller | None = None,
    sampler: Sampler = sample,
    mismatch: Mismatch = UNLIMITED,
    **changes: Any,
) -> ExperienceSource:
    draw = random.Random(0)
    prompts = [
        Tree(tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 9))), (), at) for at in range(20)
    ]
    numbers: dict[str, Any] = {
        "rounds": 3,
        "prompts": 6,
        "samples": 2,
        "epochs": 2,
        "minibatches": 2,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "whiten": True,
        "missing_eos_penalty": 1.0,
        "kl_in_reward": True,
        "kl_stop": None,
        "row_tokens": 256,
    }
    return ExperienceSource(
        trunk,
        prompts,
        settings=PPOSettings(**(numbers | changes)),
        sampling=Sampling(seed=1, max_new_tokens=8, eos_id=EOS),
        controller=controller or kl.AdaptiveController(0.2, target, 1000.0),
        estimator=kl.k1,
        shaping=ScoreShaping(scaling=scaling, clip=clip),
        estimate=estimate,
        reward_role="reward",
        sampler=sampler,
        mismatch=mismatch,
    )


def result(approximate_kl: float = 0.0) -> StepResult:
    return StepResult(1, 0.0, {"approximate_kl": approximate_kl}, 0.0, None)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_at_step_0_every_ratio_is_1_and_kl_is_0_to_the_bit(method: str, precision: torch.dtype) -> None:
    trunk = make_trunk(method, precision)
    source = make_source(trunk)
    batch = source.next()
    assert batch is not None
    assert batch.notes["kl"] == 0.0
    with trunk.use(POLICY, training=True) as policy:
        for row in batch.rows:
            now = policy.logprobs(policy.hidden(row.forest), row.targets)
            assert torch.equal(now.detach(), row.old_logprob_N)


def moved_source(*, values: bool = True, **changes: Any) -> tuple[Trunk, ExperienceSource]:
    """A source whose policy has left the reference, with a value head that says something, or none."""
    trunk = make_trunk(values=values)
    if values:
        trunk.add_head(POLICY, ppo.HEAD, spread=0.5, seed=2)
    draw = torch.Generator().manual_seed(5)
    for role in (POLICY, "reward"):
        for parameter in trunk.trainable(role).values():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    return trunk, make_source(trunk, **({"prompts": 20, "samples": 8, "minibatches": 3} | changes))


def read_alone(
    trunk: Trunk, root: tuple[int, ...], response: tuple[int, ...]
) -> tuple[list[float], list[float], float]:
    """A response by itself: each token's log-ratio of policy to reference, each token's value (of a policy that has a
    value head), the whole's reward.
    """
    forest = plant([Tree(root, (response,))])
    targets = branch_targets(forest)
    with trunk.use(POLICY) as policy:
        hidden_TD = policy.hidden(forest)
        logprob_N = policy.logprobs(hidden_TD, targets)
        values = []
        if f"head.{ppo.HEAD}.weight" in trunk.state(POLICY):
            values = policy.score(ppo.HEAD, hidden_TD[targets.predictor_N]).tolist()
    with trunk.use(REFERENCE) as reference:
        logprob_N = logprob_N - reference.logprobs(reference.hidden(forest), targets)
    ended = plant([Tree(root, (response if response[-1] == EOS else (*response, EOS),))])
    with trunk.use("reward") as scorer:
        score = scorer.score(reward.HEAD, scorer.hidden(ended)[-1:])
    return logprob_N.tolist(), values, float(score)


def responses_of(row: ppo.PPORow) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(root, response) of each branch, in the row's order."""
    tokens = row.forest.tokens_T.tolist()
    return [(tuple(tokens[b.root_start : b.root_stop]), tuple(tokens[b.start : b.stop])) for b in row.forest.branches]


def test_returns_are_what_each_response_earns_alone() -> None:
    # With lambda 1 a return is, by definition, the discounted sum of what follows, whatever the values say: minus 0.2
    # per nat of log-ratio at each token, and at the last one the score, less 3 where the response was cut.
    trunk, source = moved_source(
        gamma=0.9, gae_lambda=1.0, whiten=False, missing_eos_penalty=3.0, epochs=1, target=TARGET
    )
    cut, log_ratios = [], []
    while (batch := source.next()) is not None and batch.notes["round"] == 0.0:
        for row in batch.rows:
            assert row.return_N is not None
            returns, advantages = row.return_N.tolist(), row.advantage_N.tolist()
            for root, response in responses_of(row):
                log_ratio, values, score = read_alone(trunk, root, response)
                cut.append(response[-1] != EOS)
                log_ratios.append(sum(log_ratio))
                earned = [-0.2 * nats for nats in log_ratio]
                earned[-1] += score - 3.0 * cut[-1]
                for at in range(len(response)):
                    follows = sum(0.9**later * reward for later, reward in enumerate(earned[at:]))
                    assert returns.pop(0) == pytest.approx(follows, abs=1e-4)
                    assert advantages.pop(0) == pytest.approx(follows - values[at], abs=1e-4)
            assert not returns
        notes = batch.notes
        source.observe(result())
    assert len(cut) == 160
    assert 0 < sum(cut) < 160
    assert notes["kl"] == pytest.approx(sum(log_ratios) / 160, abs=1e-4)
    assert abs(notes["kl"]) > 0.01
    # The controller moves by the relative error, here small enough not to be clipped, times 160 episodes of the
    # horizon's 1,000.
    error = notes["kl"] / TARGET - 1.0
    assert 0.01 < abs(error) < 0.2
    assert source.state_dict()["controller"]["coefficient"] == pytest.approx(0.2 * (1 + error * 160 / 1000))


def test_the_price_does_not_move_while_the_value_warms_up() -> None:
    source = make_source(make_trunk(), value_warmup=1, rounds=2, epochs=1, target=1.0)
    prices = []
    while (batch := source.next()) is not None:
        assert batch.notes["kl"] == 0.0  # nobody trains here
        source.observe(result())
        prices.append(source.state_dict()["controller"]["coefficient"])
    # Two minibatches a round. The second round's error is -1, clipped to -0.2, times 12 of 1,000 episodes.
    assert prices == [0.2, 0.2, 0.2, pytest.approx(0.2 * (1 - 0.2 * 12 / 1000))]


def test_whitened_advantages_are_the_plain_ones_moved_to_mean_0_and_deviation_1() -> None:
    rounds = []
    for whiten in (False, True):
        _, source = moved_source(whiten=whiten, epochs=1)
        parts = []
        while (batch := source.next()) is not None and batch.notes["round"] == 0.0:
            parts += [row.advantage_N for row in batch.rows]
            source.observe(result())
        rounds.append(torch.cat(parts))
    plain, whitened = rounds
    assert float(whitened.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(whitened.std(correction=0)) == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(whitened, (plain - plain.mean()) / plain.std(correction=0), atol=1e-3)


def of_first_round(source: ExperienceSource) -> list[ppo.PPORow]:
    """The rows of the first round, each once; all of its minibatches are taken."""
    rows: list[ppo.PPORow] = []
    while (batch := source.next()) is not None and batch.notes["round"] == 0.0:
        rows += batch.rows
        source.observe(result())
    return rows


def by_hand(name: str, roots: list[tuple[int, ...]], rewards: list[float]) -> list[float]:
    """What each response earned, measured by the others that it is compared with."""
    found: list[float] = []
    for at, root in enumerate(roots):
        same = [reward for reward, other in zip(rewards, roots, strict=True) if other == root]
        if name == "best":
            found.append(float(rewards[at] == max(same)))
            continue
        others = list(rewards) if name == "reinforce" else list(same)
        others.remove(rewards[at])
        if name == "grpo":
            found.append((rewards[at] - statistics.fmean(same)) / (statistics.pstdev(same) + 1e-4))
        else:
            found.append(rewards[at] - statistics.fmean(others))
    return found


@pytest.mark.parametrize("name", list(WITHOUT_VALUES))
@pytest.mark.parametrize("row_tokens", [30, 256])  # 9 + 8 + 8 + ...: in 30 a prompt's four samples stand in two trees
def test_without_values_a_response_is_compared_with_the_prompts_or_the_batchs(name: str, row_tokens: int) -> None:
    trunk, source = moved_source(
        values=False,
        estimate=WITHOUT_VALUES[name],
        prompts=6,
        samples=4,
        whiten=False,
        epochs=1,
        missing_eos_penalty=3.0,
        row_tokens=row_tokens,
    )
    roots: list[tuple[int, ...]] = []
    rewards: list[float] = []
    found: list[float] = []
    for row in of_first_round(source):
        assert row.old_value_N is None
        assert row.return_N is None
        advantages = row.advantage_N.tolist()
        for root, response in responses_of(row):
            log_ratio, _, score = read_alone(trunk, root, response)
            roots.append(root)
            rewards.append(score - 3.0 * (response[-1] != EOS) - 0.2 * sum(log_ratio))
            mine = {advantages.pop(0) for _ in response}
            assert len(mine) == 1
            found += mine
        assert not advantages
    assert len(found) == 24
    assert len(set(roots)) == 6
    assert found == pytest.approx(by_hand(name, roots, rewards), abs=1e-3)


def test_without_values_the_round_tells_no_explained_variance_and_whitening_is_the_same() -> None:
    _, source = moved_source(values=False, estimate=WITHOUT_VALUES["rloo"], epochs=1)
    batch = source.next()
    assert batch is not None
    assert "explained_variance" not in batch.notes
    source.observe(result())
    advantage_M = torch.cat([row.advantage_N for row in [*batch.rows, *of_first_round(source)]])
    assert float(advantage_M.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(advantage_M.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def rewards_as_they_are(rewards_N: torch.Tensor, sequence_N: torch.Tensor, prompt_S: torch.Tensor) -> torch.Tensor:
    """An estimate that lets a test see what each token was given."""
    return rewards_N


def test_scores_are_scaled_by_all_so_far_and_then_clipped() -> None:
    trunk, source = moved_source(
        values=False,
        estimate=rewards_as_they_are,
        prompts=6,
        samples=4,
        minibatches=1,
        epochs=1,
        whiten=False,
        scaling=True,
        clip=0.7,
        missing_eos_penalty=3.0,
        kl_in_reward=False,
    )
    seen: list[float] = []
    for _ in range(2):  # rounds
        batch = source.next()
        assert batch is not None
        answers = [one for row in batch.rows for one in responses_of(row)]
        scores = [read_alone(trunk, *one)[2] for one in answers]
        seen += scores
        scale = statistics.pstdev(seen)
        assert batch.notes["reward_scale"] == pytest.approx(scale, rel=1e-4)
        assert batch.notes["reward"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
        cut = [abs(score / scale) > 0.7 for score in scores]
        assert 0 < sum(cut) < 24
        assert batch.notes["reward_clipped"] == pytest.approx(sum(cut) / 24)
        expected: list[float] = []
        for (_, response), score in zip(answers, scores, strict=True):
            last = min(max(score / scale, -0.7), 0.7) - 3.0 * (response[-1] != EOS)
            expected += [0.0] * (len(response) - 1) + [last]
        given = [number for row in batch.rows for number in row.advantage_N.tolist()]
        assert given == pytest.approx(expected, abs=1e-3)
        source.observe(result())


def test_rewards_are_minus_the_charge_and_the_score_at_the_last_token() -> None:
    charge = torch.tensor([0.5, -1.0, 2.0, 4.0, 0.0])
    # Two responses of 3 and 2 tokens. With coefficient 0.1: -0.05, 0.1, -0.2 + 7, and -0.4, 0 - 3.
    found = token_rewards(charge, torch.tensor([7.0, -3.0]), torch.tensor([2, 4]), coefficient=0.1)
    assert found.tolist() == pytest.approx([-0.05, 0.1, 6.8, -0.4, -3.0])


def test_a_response_that_was_cut_is_scored_at_an_eos_put_behind_it() -> None:
    trunk = make_trunk()
    trees = [Tree((5, 6), ((7, 8, EOS), (9, 10))), Tree((11,), ((12,),))]
    found = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=64)
    forest = plant([Tree((5, 6), ((7, 8, EOS), (9, 10, EOS))), Tree((11,), ((12, EOS),))])
    with trunk.use("reward") as scorer:
        expected = scorer.score(reward.HEAD, scorer.hidden(forest)[last_tokens(forest)])
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_tree_that_outgrows_a_row_is_scored_with_its_root_repeated() -> None:
    trunk = make_trunk()
    trees = [Tree((5, 6), ((7, 8), (9, 10, EOS), (11,), (12, 13, 14))), Tree((11,), ((12,),))]
    whole = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=64)
    # The first tree has 2 + 3 + 3 + 2 + 4 = 14 tokens with every branch ended; a row holds 8.
    split = response_scores(trunk, "reward", trees, eos_id=EOS, row_tokens=8)
    assert torch.allclose(split, whole, atol=1e-6)


@pytest.mark.parametrize("row_tokens", [18, 256])  # 9 tokens of prompt, 8 sampled, 1 EOS: 18 holds one response
def test_every_response_is_trained_on_once_an_epoch(row_tokens: int) -> None:
    source = make_source(make_trunk(), row_tokens=row_tokens)
    seen = []
    for _ in range(4):
        batch = source.next()
        assert batch is not None
        seen.append(sum(len(row.forest.branches) for row in batch.rows))
        assert all(len(row.forest) <= row_tokens for row in batch.rows)
        source.observe(result())
    assert seen[0] + seen[1] == 12
    assert seen[2] + seen[3] == 12


def test_rounds_that_moved_too_far_are_cut_short_and_still_counted() -> None:
    source = make_source(make_trunk(), kl_stop=0.1)
    rounds, work = [], 0
    while (batch := source.next()) is not None:
        rounds.append(batch.notes["round"])
        work += batch.work
        source.observe(result(approximate_kl=0.2))
    assert rounds == [0.0, 1.0, 2.0]
    assert work == source.total_work == 36


def roots_of_rounds(source: ExperienceSource) -> list[set[tuple[int, ...]]]:
    """The prompts of each round."""
    found: dict[float, set[tuple[int, ...]]] = {}
    while (batch := source.next()) is not None:
        roots = {root for row in batch.rows for root, _ in responses_of(row)}
        found.setdefault(batch.notes["round"], set()).update(roots)
        lengths = [len(root) for root in found[batch.notes["round"]]]
        source.observe(result())
        if "prompt_length" in batch.notes:
            assert min(lengths) <= batch.notes["prompt_length"] <= 9
    return list(found.values())


def test_a_curriculum_begins_with_the_shortest_prompts_and_is_the_same_every_time() -> None:
    trunk = make_trunk()
    plain = make_source(trunk, rounds=1, prompts=20, samples=1, epochs=1)
    every = sorted(roots_of_rounds(plain)[0], key=len)
    how: dict[str, Any] = {"rounds": 5, "prompts": 5, "samples": 1, "epochs": 1, "curriculum": 5, "minibatches": 1}
    rounds = roots_of_rounds(make_source(trunk, **how))
    assert [len(one) for one in rounds] == [5] * 5
    longest = [max(map(len, one)) for one in rounds]
    assert longest[0] == len(every[4])
    assert longest[1] <= len(every[10])  # of 20 prompts, 11 may be asked in the second of five rounds
    assert longest[4] > longest[0]
    assert roots_of_rounds(make_source(trunk, **how)) == rounds
    resumed, source = make_source(trunk, **how), make_source(trunk, **how)
    for _ in range(2):
        source.next()
        source.observe(result())
    resumed.load_state_dict(source.state_dict())
    assert roots_of_rounds(resumed) == rounds[2:]


def test_when_the_curriculum_is_over_every_prompt_is_asked() -> None:
    how: dict[str, Any] = {"prompts": 5, "samples": 1, "epochs": 1, "minibatches": 1}
    rounds = roots_of_rounds(make_source(make_trunk(), rounds=8, curriculum=4, **how))
    assert len(set.union(*rounds[4:])) == 20  # rounds 4 to 7 are the second pass over 20 prompts


def run_out(trunk: Trunk, source: ExperienceSource, *, leave_at: int | None = None) -> list[dict[str, float]]:
    """The notes of every batch; the policy leaves the reference before round `leave_at`."""
    notes = []
    while (batch := source.next()) is not None:
        notes.append(dict(batch.notes))
        source.observe(result())
        if source.between_rounds == leave_at:
            for parameter in trunk.trainable(POLICY).values():
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return notes


def test_it_stops_after_the_round_whose_kl_has_reached_the_target() -> None:
    trunk = make_trunk()
    source = make_source(trunk, controller=kl.StoppingController(0.3, 0.2), rounds=5, epochs=1)
    notes = run_out(trunk, source, leave_at=1)
    # The policy is the reference in round 0, and another one in round 1, all of whose two minibatches are learned.
    assert [(note["round"], note["kl_target_reached"]) for note in notes] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert notes[0]["kl"] == 0.0
    assert notes[2]["kl"] >= 0.2
    assert {note["kl_coefficient"] for note in notes} == {0.3}
    said = f"the KL of round 1 is {notes[2]['kl']:.2f} nats, which reaches ppo.kl.target = 0.2"
    assert source.stopped == said
    resumed = make_source(trunk, controller=kl.StoppingController(0.3, 0.2), rounds=5, epochs=1)
    resumed.load_state_dict(source.state_dict())
    assert resumed.next() is None
    assert (resumed.stopped, resumed.between_rounds) == (said, 2)


def test_a_target_reached_in_the_last_round_stops_nothing() -> None:
    trunk = make_trunk()
    source = make_source(trunk, controller=kl.StoppingController(0.3, 0.2), rounds=2, epochs=1)
    assert run_out(trunk, source, leave_at=1)[-1]["kl_target_reached"] == 1.0
    assert source.stopped is None
    plain = make_source(trunk, rounds=2, epochs=1)
    assert "kl_target_reached" not in run_out(trunk, plain)[-1]


def test_the_source_ends_after_its_rounds_and_counts_all_episodes() -> None:
    source = make_source(make_trunk())
    work = 0
    while (batch := source.next()) is not None:
        work += batch.work
        source.observe(result())
    assert work == source.total_work == 36


@pytest.mark.parametrize(
    "make",
    [
        lambda: moved_source(prompts=6, samples=2, minibatches=2),
        lambda: moved_source(prompts=6, samples=2, minibatches=2, scaling=True, clip=2.0),
        lambda: moved_source(
            values=False, estimate=WITHOUT_VALUES["grpo"], prompts=6, samples=2, minibatches=2, scaling=True
        ),
    ],
    ids=["gae", "gae scaled", "grpo scaled"],
)
def test_a_half_used_round_resumes_with_the_same_rows(make: Callable[[], tuple[Trunk, ExperienceSource]]) -> None:
    (_, source), (_, resumed) = make(), make()
    source.next()
    source.observe(result())
    resumed.load_state_dict(source.state_dict())
    rounds = []
    for _ in range(4):  # into the next round
        one, two = source.next(), resumed.next()
        assert one is not None
        assert two is not None
        assert one.notes == two.notes
        for left, right in zip(one.rows, two.rows, strict=True):
            assert torch.equal(left.forest.tokens_T, right.forest.tokens_T)
            assert torch.equal(left.advantage_N, right.advantage_N)
            assert torch.equal(left.reference_N, right.reference_N)
            assert (left.return_N is None) is (right.return_N is None) is (right.old_value_N is None)
            assert torch.equal(left.targets.predictor_N, right.targets.predictor_N)
        source.observe(result())
        resumed.observe(result())
        rounds.append(one.notes["round"])
    assert rounds == [0.0, 0.0, 0.0, 1.0]


def test_too_few_prompts_say_which_setting_to_change() -> None:
    with pytest.raises(DataError, match=r"asks 21 prompts a step, the ppo split has 20.*ppo\.prompts_per_step"):
        make_source(make_trunk(), prompts=21)
