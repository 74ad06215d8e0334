"""The PPO source: sample with the live policy, score, compute advantages, yield minibatches.

One *round* samples ``prompts`` x ``samples`` responses. They are packed into rows once; the old and the reference log-
probabilities come from the trainer's own pass over those rows, the rows of which every epoch's minibatches consist. So
at the round's first minibatch every ratio is 1 and, in the first round, every KL is 0, to the bit.

Legend: T tokens of a row, N response tokens of a row (M of a round), S responses of a round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stackllama.errors import DataError, TrainingError
from stackllama.model.roles import REFERENCE, Role, Trunk
from stackllama.objectives import ppo, reward
from stackllama.objectives.advantages import Estimate, gae
from stackllama.objectives.kl import Controller, Estimator
from stackllama.objectives.masked import sum_per_sequence, whiten
from stackllama.objectives.ppo import PPORow
from stackllama.objectives.scaling import ScoreShaping
from stackllama.rollout.curriculum import admitted
from stackllama.rollout.engine import Request, Response, Sampler, Sampling, sample
from stackllama.rollout.mismatch import UNLIMITED, Mismatch
from stackllama.tokens.batches import Batch, StepResult
from stackllama.tokens.forest import Forest, Segment, Tree, branch_targets, last_tokens, plant
from stackllama.tokens.packing import deal, pack
from stackllama.tokens.sources import deal_branches

POLICY = "policy"
MOST_BROKEN = 3
"""Rounds in a row that a reward model may spoil with scores that are not finite, before the stage ends."""
SMALLEST_SPREAD = 1e-6
"""Scores that differ by less, as a share of their size or of 1, differ by rounding alone."""


@dataclass(frozen=True, slots=True)
class PPOSettings:
    """Numbers of the source. rounds: how often it samples; kl_in_reward: whether each token's KL is charged there;
    kl_stop: approximate KL of a minibatch over which the rest of the round's minibatches is dropped, or None;
    row_tokens: the longest row; curriculum: rounds over which longer prompts come in, 0: all from the first one;
    value_warmup: rounds in which the value alone learns.
    """

    rounds: int
    prompts: int
    samples: int
    epochs: int
    minibatches: int
    gamma: float
    gae_lambda: float
    whiten: bool
    missing_eos_penalty: float
    kl_in_reward: bool
    kl_stop: float | None
    row_tokens: int
    curriculum: int = 0
    value_warmup: int = 0


@dataclass(frozen=True, slots=True)
class Rollouts:
    """A round's samples: trees with the responses as branches, in the order of the prompts, each keyed by its place (a
    prompt whose samples outgrow a row has several); why each response stopped, and the sampler's own
    log-probabilities, in the order of the branches.
    """

    trees: tuple[Tree, ...]
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """A packed row with (N,) log-probabilities, and values where the policy has a value head: fp32, on the CPU."""

    forest: Forest
    logprob_N: Tensor
    reference_N: Tensor
    value_N: Tensor | None


def response_scores(trunk: Trunk, role: str, trees: Sequence[Tree], *, eos_id: int, row_tokens: int) -> Tensor:
    """Reward of each branch (S,), on the CPU, in the order of the trees. A response that was cut off is closed with an
    EOS first: a score is always read at an EOS, as in training. A tree that outgrows a row repeats its root.
    """
    closed: list[Tree] = []
    for tree in trees:
        ended = [b if b[-1] == eos_id else (*b, eos_id) for b in tree.branches]
        for hand in deal_branches(len(tree.root), ended, row_tokens):
            closed.append(Tree(tree.root, hand, len(closed)))
    found: dict[int, Tensor] = {}
    with trunk.use(role) as scorer:
        for row in pack(closed, row_tokens):
            forest = plant(row)
            score_B = scorer.score(reward.HEAD, scorer.hidden_at(forest, last_tokens(forest)))
            parts = score_B.split([len(tree.branches) for tree in row])
            found |= {tree.key: part for tree, part in zip(row, parts, strict=True)}
    return torch.cat([found[at] for at in range(len(closed))]).cpu()


def token_rewards(charge_M: Tensor, score_S: Tensor, last_S: Tensor, *, coefficient: float) -> Tensor:
    """Reward of each token (M,): minus the coefficient times its KL, and the response's score at its last token."""
    reward_M = -coefficient * charge_M
    return reward_M.index_add(0, last_S, score_S)


class ExperienceSource:
    """Rounds of experience for the PPO objective, each passed over ``epochs`` times in ``minibatches`` minibatches.

    prompts: roots, used in a new shuffled order by (seed, pass over the prompts); while a curriculum leaves some out,
    a choice by (seed, round). estimator: token KL from (policy, reference) log-probabilities. shaping: of the reward
    model's scores. estimate: advantages from rewards, where there is no value head; None: by GAE from what the head of
    value_role says. The noise of a response is keyed by its number, counted over the whole run. sampler: what the
    policy samples with; mismatch: what its probabilities may differ by.
    """

    unit = "episodes"

    def __init__(
        self,
        trunk: Trunk,
        prompts: Sequence[Tree],
        *,
        settings: PPOSettings,
        sampling: Sampling,
        controller: Controller,
        estimator: Estimator,
        shaping: ScoreShaping,
        estimate: Estimate | None,
        reward_role: str,
        value_role: str = POLICY,
        sampler: Sampler = sample,
        mismatch: Mismatch = UNLIMITED,
    ) -> None:
        if len(prompts) < settings.prompts:
            raise DataError(
                f"PPO asks {settings.prompts} prompts a step, the ppo split has {len(prompts)} that fit; lower "
                "ppo.prompts_per_step "
                "or raise ppo.max_prompt_tokens"
            )
        self.total_work = settings.rounds * settings.prompts * settings.samples
        self._trunk = trunk
        self._prompts = prompts
        self._settings = settings
        self._sampling = sampling
        self._controller = controller
        self._estimator = estimator
        self._shaping = shaping
        self._estimate = estimate
        self._reward_role = reward_role
        self._value_role = value_role
        self._sampler = sampler
        self._mismatch = mismatch
        self._round = 0
        self._rows: list[PPORow] = []
        self._plan: list[list[int]] = []
        self._notes: dict[str, float] = {}
        self._unreported = 0
        self._broken = 0
        self._reached: float | None = None

    @property
    def between_rounds(self) -> int | None:
        """How many rounds have ended, where the next batch begins another; None in the middle of one."""
        return None if self._plan else self._round

    @property
    def stopped(self) -> str | None:
        """Why it ended before its last round, or None: its KL had reached what the controller stops at."""
        if self._reached is None or self._round == self._settings.rounds:
            return None
        return (
            f"the KL of round {self._round - 1} is {self._reached:.2f} nats, which reaches ppo.kl.target = "
            f"{self._controller.stop_at:g}"
        )

    def prepare(self) -> None:
        """Nothing: a round may end early, and the next one is sampled by the policy that this one leaves."""

    def next(self) -> Batch[PPORow] | None:
        """The next minibatch; samples a new round when the last one is used up. A round whose scores teach nothing is
        one unusable batch.

        Raises:
            TrainingError: when the scores of more than `MOST_BROKEN` rounds in a row are not finite, or the sampler's
                probabilities are too far from the trainer's.
        """
        if not self._plan:
            if self._round == self._settings.rounds or self._reached is not None:
                return None
            unusable = self._begin_round()
            if unusable is not None:
                episodes = self._settings.prompts * self._settings.samples
                return Batch((), {"tokens": 0.0}, episodes, {"round": float(self._round)}, unusable)
        chosen = self._plan.pop(0)
        rows = tuple(self._rows[at] for at in chosen)
        tokens = float(sum(len(row.old_logprob_N) for row in rows))
        # Episodes are counted with a round's first minibatch, so that a round cut short still counts whole.
        work, self._unreported = self._unreported, 0
        phase = int(rows[0].value_alone)
        return Batch(rows, {"tokens": tokens}, work, self._notes, phase=phase)

    def observe(self, result: StepResult) -> None:
        """Drop the rest of a round that moved too far, or whose policy is no more; at the round's end adapt the KL
        coefficient, or end here, as the controller says. While the value warms up the controller hears nothing.

        After going back, old log-probabilities, advantages and KL belong to weights that are gone.
        """
        limit = self._settings.kl_stop
        if limit is not None and result.metrics.get("approximate_kl", 0.0) > limit:
            self._plan = []
        if result.rewound is not None:
            self._plan, self._notes = [], {}
        if not self._plan:
            moves = self._round >= self._settings.value_warmup  # before that, a KL of 0 says nothing of the price
            if moves and math.isfinite(kl := self._notes.get("kl", math.nan)):
                self._controller.update(kl, self._settings.prompts * self._settings.samples)
                if self._controller.stop_at is not None and kl >= self._controller.stop_at:
                    self._reached = kl
            self._round += 1

    def state_dict(self) -> dict[str, Any]:
        """Round, controller, shaping of the scores, and the half-used round with its rows."""
        return {
            "round": self._round,
            "controller": self._controller.state_dict(),
            "shaping": self._shaping.state_dict(),
            "plan": self._plan,
            "notes": self._notes,
            "unreported": self._unreported,
            "broken": self._broken,
            "reached": self._reached,
            "rows": [_row_state(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, in the middle of a round too."""
        self._round = state["round"]
        self._controller.load_state_dict(state["controller"])
        self._shaping.load_state_dict(state["shaping"])
        self._plan = [list(step) for step in state["plan"]]
        self._notes = dict(state["notes"])
        self._unreported = state["unreported"]
        self._broken = state["broken"]
        self._reached = state["reached"]
        self._rows = [_row_from_state(saved) for saved in state["rows"]]

    def _begin_round(self) -> str | None:
        """Sample a round and plan its minibatches; or say why nothing can be learned from it."""
        rollouts = self._sample(self._choose_prompts())
        score_S = response_scores(
            self._trunk,
            self._reward_role,
            rollouts.trees,
            eos_id=self._sampling.eos_id,
            row_tokens=self._settings.row_tokens,
        )
        unusable = self._unusable(score_S)
        if unusable is not None:
            self._rows, self._notes = [], {}
            return unusable
        self._rows, self._notes = self._experience(rollouts, score_S)
        settings = self._settings
        order = np.random.default_rng([self._sampling.seed, 1, self._round])
        self._plan = [
            part.tolist()
            for _ in range(settings.epochs)
            for part in np.array_split(order.permutation(len(self._rows)), min(settings.minibatches, len(self._rows)))
        ]
        self._unreported = len(rollouts.responses)
        return None

    def _unusable(self, score_S: Tensor) -> str | None:
        """Why a round with these scores teaches nothing, or None.

        Without differences in reward, whitening would blow up what KL and value head leave over until it looks like a
        reward: the policy would be pushed along noise.
        """
        bad = int((~torch.isfinite(score_S)).sum())
        self._broken = self._broken + 1 if bad else 0
        if bad:
            said = f"the {self._reward_role} model gave {bad} of {len(score_S)} responses a score that is not finite"
            if self._broken > MOST_BROKEN:
                raise TrainingError(
                    f"{said}, in {self._broken} rounds in a row (the last is round {self._round}); nothing was learned "
                    f"from them. Train the {self._reward_role} model again, with a lower reward.learning_rate"
                )
            return said
        low, high = (float(end) for end in score_S.aminmax())
        if len(score_S) > 1 and high - low <= SMALLEST_SPREAD * max(1.0, abs(high)):
            return f"the reward did not vary: the {self._reward_role} model gave {high:.3g} to {len(score_S)} responses"
        return None

    def _choose_prompts(self) -> list[Tree]:
        settings, count = self._settings, len(self._prompts)
        if self._round < settings.curriculum:
            pool = admitted(self._prompts, self._round, rounds=settings.curriculum, least=settings.prompts)
            chance = np.random.default_rng([self._sampling.seed, 2, self._round])
            return [pool[at] for at in chance.permutation(len(pool))[: settings.prompts].tolist()]
        chosen = []
        for at in range(self._round * self._settings.prompts, (self._round + 1) * self._settings.prompts):
            order = np.random.default_rng([self._sampling.seed, 0, at // count]).permutation(count)
            chosen.append(self._prompts[int(order[at % count])])
        return chosen

    def _sample(self, prompts: Sequence[Tree]) -> Rollouts:
        samples = self._settings.samples
        first = self._round * len(prompts) * samples
        requests = [
            Request(first + at * samples + take, tree.root)
            for at, tree in enumerate(prompts)
            for take in range(samples)
        ]
        with self._trunk.use(POLICY) as policy:
            responses = self._sampler(policy, requests, self._sampling)
        trees: list[Tree] = []
        for at, tree in enumerate(prompts):
            branches = [one.tokens for one in responses[at * samples : (at + 1) * samples]]
            for hand in deal_branches(len(tree.root), branches, self._settings.row_tokens):
                trees.append(Tree(tree.root, hand, len(trees)))
        return Rollouts(tuple(trees), tuple(responses))

    def _experience(self, rollouts: Rollouts, score_S: Tensor) -> tuple[list[PPORow], dict[str, float]]:
        """Rows ready for training, and the round's numbers for the log."""
        settings = self._settings
        packed = _equal_rows(rollouts.trees, settings.minibatches, settings.row_tokens)
        scored = self._passes([plant(trees) for trees in packed])
        # Responses in the order of the packed rows: their scores follow them there.
        first = np.cumsum([0, *(len(tree.branches) for tree in rollouts.trees)])
        order = [int(first[tree.key]) + b for trees in packed for tree in trees for b in range(len(tree.branches))]
        responses = [rollouts.responses[at] for at in order]
        sequence_M = torch.repeat_interleave(
            torch.arange(len(order)), torch.tensor([len(response.tokens) for response in responses])
        )
        last_S = torch.tensor([len(response.tokens) for response in responses]).cumsum(0) - 1
        logprob_M = torch.cat([row.logprob_N for row in scored])
        reference_M = torch.cat([row.reference_N for row in scored])
        missing_S = torch.tensor([float(response.stopped == "length") for response in responses])
        shaped_S, shaping = self._shaping.shape(score_S)
        reward_M = token_rewards(
            self._estimator(logprob_M, reference_M),
            shaped_S[order] - settings.missing_eos_penalty * missing_S,
            last_S,
            coefficient=self._controller.coefficient if settings.kl_in_reward else 0.0,
        )
        value_M = _joined([row.value_N for row in scored])
        advantage_M, return_M = self._advantages(reward_M, value_M, sequence_M, torch.tensor(order) // settings.samples)
        sampled_M = torch.tensor([logprob for response in responses for logprob in response.logprobs])
        weight_M, differences = self._mismatch.weights(logprob_M, sampled_M)
        kl_S = sum_per_sequence(logprob_M - reference_M, sequence_M, len(order))
        notes = {
            "round": float(self._round),
            "reward": float(score_S.mean()),
            "reward_std": float(score_S.std(correction=0)),
            "kl": float(kl_S.mean()),
            "kl_coefficient": self._controller.coefficient,
            "length": len(logprob_M) / len(order),
            "eos_rate": 1.0 - float(missing_S.mean()),
            **differences,
            **shaping,
        }
        notes |= self._optional_notes(scored, notes["kl"], value_M, return_M)
        sizes = [len(row.logprob_N) for row in scored]
        parts = zip(scored, advantage_M.split(sizes), _split(return_M, sizes), _split(weight_M, sizes), strict=True)
        rows = [
            PPORow(
                one.forest,
                branch_targets(one.forest),
                one.logprob_N,
                one.reference_N,
                one.value_N,
                advantage_N,
                return_N,
                self._round < settings.value_warmup,
                weight_N,
            )
            for one, advantage_N, return_N, weight_N in parts
        ]
        return rows, notes

    def _optional_notes(
        self, scored: Sequence[Scored], kl: float, value_M: Tensor | None, return_M: Tensor | None
    ) -> dict[str, float]:
        """Numbers of the round that only some settings have."""
        notes: dict[str, float] = {}
        if self._settings.curriculum:
            lengths = [branch.root_stop - branch.root_start for row in scored for branch in row.forest.branches]
            notes |= {"prompt_length": sum(lengths) / len(lengths)}
        if self._controller.stop_at is not None:
            notes |= {"kl_target_reached": float(kl >= self._controller.stop_at)}
        if value_M is not None and return_M is not None:
            residual = (return_M - value_M).var() / return_M.var().clamp_min(1e-8)
            notes |= {"explained_variance": 1.0 - float(residual)}
        return notes

    def _advantages(
        self, reward_M: Tensor, value_M: Tensor | None, sequence_M: Tensor, prompt_S: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages (M,), whitened if they are to be; and with values what these are to learn (M,)."""
        settings, return_M = self._settings, None
        if value_M is not None:
            advantage_M, return_M = gae(reward_M, value_M, sequence_M, gamma=settings.gamma, lam=settings.gae_lambda)
        else:
            assert self._estimate is not None, "values are read wherever GAE is to use them"
            advantage_M = self._estimate(reward_M, sequence_M, prompt_S)
        return (whiten(advantage_M) if settings.whiten else advantage_M), return_M

    def _passes(self, forests: Sequence[Forest]) -> list[Scored]:
        """Old log-probabilities and values by the policy, log-probabilities by the reference, row by row."""
        old: list[tuple[Tensor, Tensor | None]] = []
        with self._trunk.use(POLICY) as policy:
            for forest in forests:
                targets = branch_targets(forest)
                hidden_ND = policy.hidden_at(forest, targets.predictor_N)
                value_N = None
                if self._estimate is None and self._value_role == POLICY:
                    value_N = policy.score(ppo.HEAD, hidden_ND).cpu()
                old.append((policy.label_logprobs(hidden_ND, targets.label_N).cpu(), value_N))
        if self._estimate is None and self._value_role != POLICY:
            with self._trunk.use(self._value_role) as role:
                places = [(forest, branch_targets(forest).predictor_N) for forest in forests]
                values = [role.score(ppo.HEAD, role.hidden_at(*place)).cpu() for place in places]
            old = [(logprob, value) for (logprob, _), value in zip(old, values, strict=True)]
        with self._trunk.use(REFERENCE) as reference:
            known = [_label_logprobs(reference, forest) for forest in forests]
        return [
            Scored(forest, logprob, ref, value)
            for forest, (logprob, value), ref in zip(forests, old, known, strict=True)
        ]


def _label_logprobs(role: Role, forest: Forest) -> Tensor:
    """Log-probabilities (N,) of a row's response tokens, on the CPU."""
    targets = branch_targets(forest)
    return role.label_logprobs(role.hidden_at(forest, targets.predictor_N), targets.label_N).cpu()


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The rows' tokens laid end to end (M,); None where the rows have none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def _split(x_M: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    """Tokens laid end to end, row by row again."""
    return [None] * len(sizes) if x_M is None else x_M.split(list(sizes))


def _equal_rows(trees: Sequence[Tree], minibatches: int, row_tokens: int) -> list[list[Tree]]:
    """Rows of nearly equal length, as many for each minibatch as keep them within ``row_tokens``."""
    for each in range(1, len(trees) + 1):
        rows = deal(trees, minibatches * each)
        if all(sum(map(len, row)) <= row_tokens for row in rows):
            return rows
    return [[tree] for tree in trees]


def _row_state(row: PPORow) -> dict[str, Any]:
    forest = row.forest
    return {
        "tokens": forest.tokens_T,
        "positions": forest.positions_T,
        "segments": torch.tensor([[s.start, s.stop, s.root_start, s.root_stop] for s in forest.segments]),
        "trees": list(forest.tree_of_branch),
        "old_logprob": row.old_logprob_N,
        "reference": row.reference_N,
        "old_value": row.old_value_N,
        "advantage": row.advantage_N,
        "return": row.return_N,
        "value_alone": row.value_alone,
        "weight": row.weight_N,
    }


def _row_from_state(saved: Mapping[str, Any]) -> PPORow:
    segments = tuple(Segment(*ends) for ends in saved["segments"].tolist())
    forest = Forest(saved["tokens"], saved["positions"], segments, tuple(saved["trees"]))
    names = ("old_logprob", "reference", "old_value", "advantage", "return", "value_alone", "weight")
    return PPORow(forest, branch_targets(forest), *(saved[name] for name in names))
