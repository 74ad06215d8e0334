"""Watching a policy while it is trained: a source of batches that looks, between two rounds, at what has been learned.

`Watched` stands between the loop and the source of PPO, or of DPO, and passes its batches on. Every so many rounds, and
after the last one, the live policy answers the held-back prompts; the record goes to a log, alarms may end the
training, and the weights that the judge likes best are kept. Nothing of the training is touched: sampling noise is
keyed, so no random generator is drawn from, and roles are entered and left as the source itself does.

What was seen is part of the source's state, so a checkpoint holds it with the weights it belongs to, and a resumed run
ends like one that was never stopped. The log is written from that state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from stackllama.errors import DataError
from stackllama.evaluate import hacking
from stackllama.evaluate.hacking import Answers, Floats, Limits, Record
from stackllama.evaluate.policy import answer_prompts
from stackllama.evaluate.statistics import Resampling
from stackllama.model.roles import REFERENCE, Trunk
from stackllama.rollout.engine import Sampling
from stackllama.rollout.experience import POLICY
from stackllama.tokens.batches import Batch, Source, StepResult
from stackllama.tokens.forest import Tree
from stackllama.tokens.template import decode_answer
from stackllama.tokens.tokenizer import Tokenizer
from stackllama.train.trackers import Log

RowT = TypeVar("RowT")

SHARE = 4
"""At most one in so many prompts is held back."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model answered to the held-back prompts, by number; gold: truth in [0, 1] (S,), where there is one."""

    answers: Answers
    gold: Floats | None


Look = Callable[[str], Seen]
"""Lets a role answer the held-back prompts."""


class Rounds(Source[RowT], Protocol[RowT]):
    """A source that works in rounds: PPO samples for each, to DPO a batch is one."""

    @property
    def between_rounds(self) -> int | None:
        """How many rounds have ended, where the next batch begins another; None in the middle of one."""

    @property
    def stopped(self) -> str | None:
        """Why it ended before its last round, or None."""


@dataclass(frozen=True, slots=True)
class Settings:
    """rounds: of the whole training; every: rounds between two evaluations; kl_bound: in nats, over which no weights
    are kept; stop: whether an alarm ends the training.
    """

    rounds: int
    every: int
    kl_bound: float
    stop: bool
    limits: Limits
    resampling: Resampling


@dataclass(frozen=True, slots=True)
class Choice:
    """Which weights the training leaves. weights: those to put back, None where the last ones stand."""

    step: int
    reason: str
    weights: Mapping[str, Tensor] | None


def hold_back(prompts: Sequence[Tree], count: int, *, seed: int) -> tuple[list[Tree], list[Tree]]:
    """(prompts to train on, prompts to look at), each in their order. The latter are a seeded choice of `count`, but at
    most one in `SHARE`.

    Raises:
        DataError: where fewer than two would be held back, which no interval can be made of.
    """
    taken = min(count, len(prompts) // SHARE)
    if taken < 2:
        raise DataError(
            f"of {len(prompts)} prompts in the ppo split one in {SHARE} may be held back for watching, at least 2 are "
            "needed; give more data, raise data.splits.ppo or ppo.max_prompt_tokens, or set watch.every to null"
        )
    held = set(np.random.default_rng([seed]).permutation(len(prompts))[:taken].tolist())
    return (
        [tree for at, tree in enumerate(prompts) if at not in held],
        [tree for at, tree in enumerate(prompts) if at in held],
    )


def look_at(
    trunk: Trunk,
    tokenizer: Tokenizer,
    prompts: Sequence[Tree],
    sampling: Sampling,
    *,
    gold: Callable[[Tree, str], float] | None,
    row_tokens: int,
) -> Look:
    """How a role is looked at: one answer to each prompt, with noise that is the same whoever answers and whenever.

    The trunk has the roles "reward" and "judge". gold: truth about an answer to a prompt, for the log alone.
    """

    def look(role: str) -> Seen:
        answered = answer_prompts(
            trunk, role, prompts, sampling, reward_role="reward", judge_role="judge", row_tokens=row_tokens
        )
        texts = [decode_answer(tokenizer, response.tokens) for response in answered.responses]
        truth = None if gold is None else np.array([gold(p, text) for p, text in zip(prompts, texts, strict=True)])
        return Seen(hacking.measured(answered, texts), truth)

    return look


class Watched(Generic[RowT]):
    """A policy's source, watched. weights: gives the policy's live tensors; tell: says a sentence to the user."""

    def __init__(
        self,
        source: Rounds[RowT],
        look: Look,
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        settings: Settings,
        log: Log,
        tell: Callable[[str], None],
    ) -> None:
        self.unit, self.total_work = source.unit, source.total_work
        self._source = source
        self._look = look
        self._weights = weights
        self._settings = settings
        self._log = log
        self._tell = tell
        self._step = 0
        self._sft: Seen | None = None
        self._lines: list[dict[str, Any]] = []
        self._records: list[Record] = []
        self._kept: dict[str, Tensor] = {}
        log.truncate_after(-1)

    @property
    def rounds(self) -> int:
        """Rounds that had ended when the policy was last looked at."""
        return self._records[-1].rounds if self._records else 0

    @property
    def stopped(self) -> str | None:
        """Why the training ended before its last round, or None: the source said so, or an alarm."""
        return self._source.stopped or self._ending_alarm

    @property
    def _ending_alarm(self) -> str | None:
        """The alarm that ended the training before its last round, or None."""
        if not self._settings.stop or self.rounds == self._settings.rounds or self._source.stopped is not None:
            return None
        return "; ".join(self._alarms(self._records[-1])) or None if self._records else None

    @property
    def alarming(self) -> int:
        """How many evaluations raised an alarm."""
        return sum(bool(self._alarms(record)) for record in self._records)

    def choice(self) -> Choice:
        """The weights to leave: those of the evaluation that the judge scores highest, at bounded KL and without alarm;
        the last ones where there is no such evaluation.
        """
        last, chosen = self._records[-1], self._best()
        within = f"of the evaluations with a KL of at most {self._settings.kl_bound:g} nats and no alarm"
        if chosen is None:
            return Choice(last.step, f"the last weights, since there is none {within}", None)
        if chosen is last:
            return Choice(last.step, f"the last weights, which the judge scores highest {within}", None)
        reason = (
            f"the judge scores its answers highest {within}: {chosen.judge.mean:.3f} at {chosen.kl.mean:.2f} nats, the "
            f"last ones (step {last.step}) {last.judge.mean:.3f} at {last.kl.mean:.2f}"
        )
        return Choice(chosen.step, reason, self._kept)

    def prepare(self) -> None:
        """Nothing but what the source prepares."""
        self._source.prepare()

    def next(self) -> Batch[RowT] | None:
        """The source's next batch; between two rounds the policy is looked at first, where it is time to."""
        ended = self._source.between_rounds
        if ended is not None and self._is_due(ended):
            self._evaluate(ended)
        return self._source.next() if self.stopped is None else None

    def observe(self, result: StepResult) -> None:
        """Note the step, and let the source hear."""
        self._step = result.step
        self._source.observe(result)

    def state_dict(self) -> dict[str, Any]:
        """The source's state, and all that was seen so far with the weights that were kept."""
        seen = self._sft
        return {
            "source": self._source.state_dict(),
            "step": self._step,
            "sft": None if seen is None else hacking.answers_state(seen.answers),
            "sft_gold": None if seen is None or seen.gold is None else seen.gold.tolist(),
            "lines": [dict(line) for line in self._lines],
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the log is written again up to there."""
        self._source.load_state_dict(state["source"])
        self._step = state["step"]
        gold = None if state["sft_gold"] is None else np.array(state["sft_gold"], dtype=np.float64)
        self._sft = None if state["sft"] is None else Seen(hacking.answers_from_state(state["sft"]), gold)
        self._lines = [dict(line) for line in state["lines"]]
        self._records = [Record.read(line) for line in self._lines]
        self._kept = dict(state["kept"])
        self._log.truncate_after(-1)
        for line in self._lines:
            self._log.append(**line)

    def _is_due(self, ended: int) -> bool:
        if self._records and self._records[-1].rounds == ended:
            return False
        last = ended == self._settings.rounds or self._source.stopped is not None
        return last or ended % self._settings.every == 0

    def _evaluate(self, ended: int) -> None:
        if self._sft is None:  # before the first round, when the policy is the SFT model still
            self._sft = self._look(REFERENCE)
        sft, seen = self._sft, self._sft if ended == 0 else self._look(POLICY)
        record = hacking.compare(self._step, ended, seen.answers, sft.answers, self._settings.resampling)
        self._records.append(record)
        found = self._alarms(record)
        line: dict[str, Any] = record.flat()
        if seen.gold is not None and sft.gold is not None:
            line |= hacking.gold_numbers(seen.gold, sft.gold, self._settings.resampling)
        self._lines.append(line | ({"alarms": "; ".join(found)} if found else {}))
        self._log.append(**self._lines[-1])
        for reason in found:
            self._tell(f"alarm at step {record.step}: {reason}")
        if self._ending_alarm is not None:
            self._tell(f"stopped by that alarm after {ended} of {self._settings.rounds} rounds")
        if self._best() is record:
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self._weights().items()}

    def _alarms(self, record: Record) -> list[str]:
        return hacking.alarms(record, self._records[0], self._settings.limits)

    def _best(self) -> Record | None:
        # The first record is of the SFT model, which the run has in any case.
        trained, settings = self._records[1:], self._settings
        return hacking.best(trained, self._records[0], settings.limits, kl_bound=settings.kl_bound) if trained else None
