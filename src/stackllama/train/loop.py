"""The one loop: a source, an objective, an optimizer.

A step: enter the objective's role, turn each row of the batch into sums and their gradients, leave the role, and let
the guard decide whether the optimizer steps. State is saved every so many steps, and a loop that starts in a folder
with a checkpoint goes on from it, bit for bit.

Left out on purpose: epochs, KL control, early stops (the source's business), evaluation and choice of weights
(callbacks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from stackllama.errors import TrainingError
from stackllama.model.roles import Trunk
from stackllama.objectives.base import Objective
from stackllama.tokens.batches import Batch, Source, StepResult, on_device
from stackllama.train import checkpoint
from stackllama.train.guard import Guard
from stackllama.train.metrics import JsonlLog, Progress, progress
from stackllama.train.optim import clip_gradients, load_optimizer_state, optimizer_state, set_learning_rate

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
    """One training run of one role; `run` trains to the source's end."""

    trunk: Trunk
    objective: Objective[RowT]
    source: Source[RowT]
    optimizer: torch.optim.AdamW
    learning_rate: Callable[[int], float]
    guard: Guard
    settings: Settings
    folder: Path
    log: JsonlLog
    title: str
    shown: Sequence[str] = ()
    after_step: Sequence[Callable[[StepResult], Mapping[str, float] | None]] = ()
    step: int = 0
    work: int = 0
    _refused: int = 0

    def run(self) -> int:
        """Train until the source ends; resume first where the folder holds a checkpoint. Gives the work done by this
        call.

        Raises:
            TrainingError: after more than `MOST_REFUSED` refused steps in a row.
            CheckpointError: when a saved state is damaged or of another run.
        """
        remark = self._resume()
        before = self.work
        with progress(self.title, self.source.total_work, self.source.unit, self.work) as show:
            if remark is not None:
                show.note(remark)
            while (batch := self.source.next()) is not None:
                result = self._apply(batch)
                self.source.observe(result)
                self.work += batch.work
                self._report(batch, result, show)
                if self.step % self.settings.checkpoint_steps == 0:
                    checkpoint.save(self.folder, self.step, self._state())
        if self.step % self.settings.checkpoint_steps:
            checkpoint.save(self.folder, self.step, self._state())
        return self.work - before

    def _apply(self, batch: Batch[RowT]) -> StepResult:
        self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._backward(batch)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm, *totals = _read(clip_gradients(parameters, self.settings.clip_norm), *sums.values())
        terms, counts, total = self.objective.terms, batch.counts, dict(zip(sums, totals, strict=True))
        means = {name: total[name] / counts[term.count] for name, term in terms.items()}
        loss = sum(term.coefficient * means[name] for name, term in terms.items())
        metrics = {name: total[name] / counts[count] for name, count in self.objective.metric_counts.items()}
        if len(means) > 1:
            metrics |= means
        refusal = self.guard.refusal(loss=loss, gradient_norm=norm, metrics=metrics)
        if refusal is None:
            set_learning_rate(self.optimizer, self.learning_rate(self.step - 1))
            self.optimizer.step()
        self._refused = 0 if refusal is None else self._refused + 1
        if self._refused > MOST_REFUSED:
            raise TrainingError(
                f"{self._refused} steps in a row were refused, the last because {refusal}; lower the learning rate of "
                f"the {self.objective.role} stage (at step {self.step}) and start the run under another name"
            )
        return StepResult(self.step, loss, metrics, norm, refusal)

    def _backward(self, batch: Batch[RowT]) -> dict[str, Tensor]:
        """Sums of all terms and metrics over the batch; leaves the gradient of the mean loss in the parameters."""
        total: dict[str, Tensor] = {}
        with self.trunk.use(self.objective.role, training=True) as role:
            for row in batch.rows:
                found = self.objective(role, on_device(row, self.trunk.device))
                scaled = [
                    found.losses[name] * (term.coefficient / batch.counts[term.count])
                    for name, term in self.objective.terms.items()
                ]
                torch.stack(scaled).sum().backward()
                for name, value in {**found.losses, **found.metrics}.items():
                    total[name] = total[name] + value.detach() if name in total else value.detach()
        return total

    def _report(self, batch: Batch[RowT], result: StepResult, show: Progress) -> None:
        extra: dict[str, float] = {}
        for callback in self.after_step:
            extra |= dict(callback(result) or {})
        values = {"loss": result.loss, **result.metrics, **batch.notes, "gradient_norm": result.gradient_norm}
        values |= {"learning_rate": self.learning_rate(result.step - 1), **extra}
        if result.skipped is not None:
            show.note(f"step {result.step} was skipped: {result.skipped}")
        if result.step == 1 or result.step % self.settings.log_steps == 0 or result.skipped is not None or extra:
            self.log.append(result.step, **values, **({} if result.skipped is None else {"skipped": result.skipped}))
        shown = self.shown or tuple(values)
        show.advance(batch.work, **{name: values[name] for name in shown if name in values})

    def _state(self) -> dict[str, Any]:
        role = self.objective.role
        return {
            "weights": self.trunk.state(role),
            "optimizer": optimizer_state(self.optimizer),
            "source": self.source.state_dict(),
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
        role = self.objective.role
        self.trunk.load_state(role, state["weights"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.source.load_state_dict(state["source"])
        self._refused, self.work = state["refused"], state["work"]
        return checkpoint.set_rng_state(state["random"])


def _read(*numbers: Tensor) -> list[float]:
    """Numbers of the device, all at once: the one point of a step at which the host waits for it."""
    found: list[float] = torch.stack([number.detach().double() for number in numbers]).tolist()
    return found
