"""The one loop: a source, an objective, an optimizer.

A step: enter the objective's role, turn each row of the batch into sums and their gradients, leave the role, and let
the guard decide whether the optimizer steps. Where other roles learn from the same rows, each has an objective of its
own, and is entered after the one before it was left, since a backward has to end inside its role.

State is saved every so many steps, and a loop that starts in a folder with a checkpoint goes on from it, bit for bit.
Where the guard finds the weights damaged, weights and optimizer go back to an earlier checkpoint, while the source and
the count of steps go on: nothing more is kept in memory for that.

Left out on purpose: epochs, KL control, early stops (the source's business), evaluation and choice of weights
(callbacks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from stackllama.errors import CheckpointError, TrainingError
from stackllama.model.roles import Trunk
from stackllama.objectives.base import Objective
from stackllama.tokens.batches import Batch, Source, StepResult, on_device
from stackllama.train import checkpoint
from stackllama.train.guard import Guard, Judgement
from stackllama.train.metrics import Plain, Progress, progress
from stackllama.train.optim import clip_gradients, load_optimizer_state, optimizer_state, set_learning_rate
from stackllama.train.trackers import Log

RowT = TypeVar("RowT")
# More refused steps in a row than this is no accident of one batch: the run ends with an error instead of idling on.
MOST_REFUSED = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """Numbers of a loop. checkpoint_steps: steps between saved states; log_steps: steps between lines of the log."""

    clip_norm: float
    checkpoint_steps: int
    log_steps: int


@dataclass(slots=True)
class Loop(Generic[RowT]):
    """One training run; `run` trains to the source's end. beside: objectives of other roles, whose terms and metrics
    have names of their own; the optimizer has the parameters of all, by `trained`.
    """

    trunk: Trunk
    objective: Objective[RowT]
    source: Source[RowT]
    optimizer: torch.optim.AdamW
    learning_rate: Callable[[int], float]
    guard: Guard
    settings: Settings
    folder: Path
    log: Log
    title: str
    shown: Sequence[str] = ()
    after_step: Sequence[Callable[[StepResult], Mapping[str, float] | None]] = ()
    beside: Sequence[Objective[RowT]] = ()
    step: int = 0
    work: int = 0
    _refused: int = 0

    def run(self) -> int:
        """Train until the source ends; resume first where the folder holds a checkpoint. Gives the work done by this
        call.

        Raises:
            TrainingError: after more than `MOST_REFUSED` refused steps in a row, or where going back has not helped.
            CheckpointError: when a saved state is damaged or of another run.
        """
        remark = self._resume()
        before, saved = self.work, self.step
        with progress(self.title, self.source.total_work, self.source.unit, self.work) as show:
            if remark is not None:
                show.note(remark)
            while (batch := self.source.next()) is not None:
                self.step += 1
                result, judged = self._unusable(batch) if batch.unusable is not None else self._apply(batch)
                self.source.observe(result)
                self.work += batch.work
                self._report(batch, result, judged, show)
                if self.step % self.settings.checkpoint_steps == 0 and not self.guard.doubts:
                    checkpoint.save(self.folder, self.step, self._state())
                    saved = self.step
        if self.step != saved:
            checkpoint.save(self.folder, self.step, self._state())
        return self.work - before

    def _unusable(self, batch: Batch[RowT]) -> tuple[StepResult, Judgement]:
        """Pass over a batch that its source found no use for; there are no numbers of such a step."""
        assert batch.unusable is not None
        result = StepResult(self.step, math.nan, {}, math.nan, batch.unusable)
        return result, Judgement(batch.unusable, "passed over")

    def _apply(self, batch: Batch[RowT]) -> tuple[StepResult, Judgement]:
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.enter(batch.phase)
        sums = self._backward(batch)
        bound = self.guard.clip_bound(self.settings.clip_norm)
        norms_of_gradients = self._clip(bound)
        self.source.prepare()
        norm, *found = _read(*norms_of_gradients, *sums.values())
        others, totals = found[: len(self.beside)], found[len(self.beside) :]
        loss, metrics = self._means(batch, dict(zip(sums, totals, strict=True)))
        metrics |= {f"{each.role}_gradient_norm": one for each, one in zip(self.beside, others, strict=True)}
        judged = self.guard.judge(
            self.step,
            loss=loss,
            gradient_norm=norm,
            metrics=metrics,
            notes=batch.notes,
            clipped_at=bound if bound < self.settings.clip_norm else None,
        )
        if judged.refusal is None:
            set_learning_rate(self.optimizer, self.learning_rate(self.step - 1))
            self.optimizer.step()
        rewound = self._rewind(judged) if self.guard.lost else None
        self._refused = 0 if judged.refusal is None or rewound is not None else self._refused + 1
        if self._refused > MOST_REFUSED:
            raise TrainingError(
                f"{self._refused} steps in a row were refused, the last because {judged.refusal}; {self._advice()}"
            )
        return StepResult(self.step, loss, metrics, norm, judged.refusal, rewound), judged

    def _clip(self, bound: float) -> list[Tensor]:
        """Clip the gradient of each role by itself, that of the first at ``bound``; gives their norms from before."""
        named = [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        marks = [f"{each.role}/" for each in self.beside]
        own = [parameter for name, parameter in named if not name.startswith(tuple(marks))]
        norms = [clip_gradients(own, bound)]
        for mark in marks:
            theirs = [parameter for name, parameter in named if name.startswith(mark)]
            norms.append(clip_gradients(theirs, self.settings.clip_norm))
        return [norm.to(self.trunk.device) for norm in norms]  # without any gradient it is on the CPU

    @property
    def _objectives(self) -> tuple[Objective[RowT], ...]:
        return (self.objective, *self.beside)

    def _means(self, batch: Batch[RowT], total: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """The loss and the metrics of a batch, from its sums."""
        counts = batch.counts
        terms = {name: term for each in self._objectives for name, term in each.terms.items()}
        measured = {name: count for each in self._objectives for name, count in each.metric_counts.items()}
        means = {name: total[name] / counts[term.count] for name, term in terms.items()}
        loss = sum(term.coefficient * means[name] for name, term in terms.items())
        metrics = {name: total[name] / counts[count] for name, count in measured.items()}
        return loss, metrics | means if len(means) > 1 else metrics

    def _rewind(self, judged: Judgement) -> int | None:
        """Take weights and optimizer back to the newest checkpoint that is good, and give its step; None where there
        is none. Source, random numbers and the count of steps go on.
        """
        found = checkpoint.load_latest(self.folder, before=self.guard.good_before)
        if found is None:
            return None
        if self.guard.rewinds_left == 0:
            why = judged.refusal or f"{judged.metric} stays high"
            raise TrainingError(f"{why}, after going back to earlier weights as often as allowed; {self._advice()}")
        target, state = found
        self._load_weights(state)
        self.guard.rewound(self.step, target, state["guard"])
        return target

    def _advice(self) -> str:
        return (
            f"lower the learning rate of the {self.objective.role} stage (at step {self.step}), or look at its data, "
            "and start the run under another name"
        )

    def _backward(self, batch: Batch[RowT]) -> dict[str, Tensor]:
        """Sums of all terms and metrics over the batch; leaves the gradient of the mean loss in the parameters."""
        total: dict[str, Tensor] = {}
        for objective in self._objectives:
            with self.trunk.use(objective.role, training=True) as role:
                for row in batch.rows:
                    found = objective(role, on_device(row, self.trunk.device))
                    scaled = [
                        found.losses[name] * (term.coefficient / batch.counts[term.count])
                        for name, term in objective.terms.items()
                    ]
                    loss = torch.stack(scaled).sum()
                    if loss.requires_grad:  # a policy has no gradient while another role's value warms up
                        loss.backward()
                    for name, value in {**found.losses, **found.metrics}.items():
                        total[name] = total[name] + value.detach() if name in total else value.detach()
        return total

    def _report(self, batch: Batch[RowT], result: StepResult, judged: Judgement, show: Progress) -> None:
        extra: dict[str, float] = {}
        for callback in self.after_step:
            extra |= dict(callback(result) or {})
        values = {"loss": result.loss, **result.metrics, **batch.notes, "gradient_norm": result.gradient_norm}
        values |= {"learning_rate": self.learning_rate(result.step - 1), **extra}
        event = _event(result, judged)
        if result.skipped is not None:
            show.note(f"step {result.step} was skipped: {result.skipped}")
        if result.rewound is not None:
            show.note(f"step {result.step}: went back to the weights of step {result.rewound}")
        if result.step == 1 or result.step % self.settings.log_steps == 0 or event or extra:
            self.log.append(result.step, **values, **event)
        shown = self.shown or tuple(values)
        show.advance(batch.work, **{name: values[name] for name in shown if name in values})

    def _state(self) -> dict[str, Any]:
        return {
            "weights": self.trunk.state(self.objective.role),
            "beside": {each.role: self.trunk.state(each.role) for each in self.beside},
            "optimizer": optimizer_state(self.optimizer),
            "source": self.source.state_dict(),
            "guard": self.guard.state_dict(),
            "random": checkpoint.rng_state(),
            "refused": self._refused,
            "work": self.work,
        }

    def _resume(self) -> str | None:
        """Go on from the newest checkpoint, if there is one; gives a remark for the user where bits will differ."""
        found = checkpoint.load_latest(self.folder)
        self.log.truncate_after(0 if found is None else found[0])
        if found is None:
            return None
        self.step, state = found
        try:
            self._load_weights(state)
            self.source.load_state_dict(state["source"])
            self.guard.load_state_dict(state["guard"])
            self._refused, self.work = state["refused"], state["work"]
            return checkpoint.set_rng_state(state["random"])
        except KeyError as missing:
            raise CheckpointError(
                f"the checkpoint of step {self.step} in {self.folder} lacks {missing}: another version of this program "
                f"made it; go on with that version, or delete {self.folder} to begin the stage anew"
            ) from missing

    def _load_weights(self, state: Mapping[str, Any]) -> None:
        self.trunk.load_state(self.objective.role, state["weights"])
        for each in self.beside:
            self.trunk.load_state(each.role, state["beside"][each.role])
        load_optimizer_state(self.optimizer, state["optimizer"])


def trained(
    trunk: Trunk, objective: Objective[RowT], beside: Sequence[Objective[RowT]] = ()
) -> dict[str, torch.nn.Parameter]:
    """What a loop with these objectives trains, by name; a role beside the first has its name in front."""
    others = {
        f"{each.role}/{name}": parameter for each in beside for name, parameter in trunk.trainable(each.role).items()
    }
    return trunk.trainable(objective.role) | others


def _event(result: StepResult, judged: Judgement) -> dict[str, Plain]:
    """What the guard did in a step, for the log; empty where it did nothing."""
    if judged.action is None and result.rewound is None:
        return {}
    event: dict[str, Plain] = {
        "guard": judged.action if result.rewound is None else "rewound",
        "guard_metric": judged.metric,
        "guard_value": judged.value,
        "guard_usual": judged.usual,
        "guard_limit": judged.limit,
        "rewound_to": result.rewound,
        "skipped": result.skipped,
    }
    return {name: value for name, value in event.items() if value is not None}


def _read(*numbers: Tensor) -> list[float]:
    """Numbers of the device, all at once: the one point of a step at which the host waits for it."""
    found: list[float] = torch.stack([number.detach().double() for number in numbers]).tolist()
    return found
