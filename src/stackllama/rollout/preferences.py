"""The DPO source: pairs in their planned order, each answer with its log-probability by the reference.

The reference reads a batch's rows just before the batch is given out: the very rows, with the same kernels, that the
policy then reads. So in the first step every log-ratio is 0 to the bit, nothing is kept of one epoch for the next, and
a source's state is its place in the plan. Left out on purpose: reading all answers once before training. Where there
are several epochs that would save forward passes, but in other rows, so not to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stackllama.model.roles import REFERENCE, Trunk
from stackllama.objectives.dpo import DPORow
from stackllama.tokens.batches import Batch, RewardRow, StepResult
from stackllama.tokens.forest import branch_targets
from stackllama.tokens.sources import Dealt, PlannedSource


class PreferenceSource:
    """Batches of ``pairs`` with the reference's log-probabilities; the order, the state and the progress are its own.

    pairs: whole questions with their pairs, as `tokens.sources.reward_source` gives them. Each batch is a round.
    """

    stopped: str | None = None
    """Why it ended before its last round: it never does."""

    def __init__(self, trunk: Trunk, pairs: PlannedSource[Dealt, RewardRow]) -> None:
        self.unit = pairs.unit
        self.total_work = pairs.total_work
        self._trunk = trunk
        self._pairs = pairs

    @property
    def between_rounds(self) -> int:
        """How many batches have been learned from; no round is ever entered twice."""
        return self._pairs.given

    def prepare(self) -> None:
        """Pack the next batch; the reference reads it when it is asked for, as another role is in use till then."""
        self._pairs.prepare()

    def next(self) -> Batch[DPORow] | None:
        """The next planned batch, read by the reference."""
        batch = self._pairs.next()
        if batch is None:
            return None
        with self._trunk.use(REFERENCE) as reference:
            rows = []
            for row in batch.rows:
                targets = branch_targets(row.forest)
                reference_N = reference.logprobs(reference.hidden(row.forest), targets).cpu()
                rows.append(
                    DPORow(row.forest, targets, reference_N, row.better_P, row.worse_P, row.margin_P, row.weight_P)
                )
        return Batch(tuple(rows), {"questions": batch.counts["questions"]}, batch.work, batch.notes, batch.unusable)

    def observe(self, result: StepResult) -> None:
        """A planned source goes on whatever happened."""
        self._pairs.observe(result)

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan."""
        return self._pairs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place. Raises DataError when the state belongs to a plan of another length."""
        self._pairs.load_state_dict(state)
