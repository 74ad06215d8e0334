"""What a policy had gained when its training passed through a given KL: rivals compared at the same cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from stackllama.report.figures import Log, Points

MEASURES = ("reward", "judge", "gold")
"""What is measured on held-back prompts, each with its gain over the SFT model, `MEASURE_gain`."""


@dataclass(frozen=True, slots=True)
class Reached:
    """Where a training last was at `kl` nats: between which steps, as a step, and what had been measured by then.

    step counts optimizer steps. numbers, interpolated: NAME, NAME_low and NAME_high of each measure and gain that the
    log has, and `rounds`, the batches learned from.
    """

    kl: float
    step: float
    numbers: dict[str, float]


def most(log: Log) -> float | None:
    """The highest KL of a log's evaluations; None without any."""
    return max((nats for _, nats in log.get("kl", ())), default=None)


def last(log: Log) -> float | None:
    """The KL of a log's last evaluation; None without any."""
    return log["kl"][-1][1] if log.get("kl") else None


def at_kl(log: Log, nats: float) -> Reached | None:
    """The last place between two evaluations that holds `nats`, by linear interpolation; None where none does.

    The last one, since KL may come back after a rise, and the policy that has learned longest at a price is the one to
    judge the method by: at a run's own final KL this is its final evaluation. Nothing is extrapolated. The ends of an
    interval are interpolated like its mean: they say how sure each of the two evaluations is, not how the policy
    between them would have done.
    """
    crossing = _crossing(log.get("kl", ()), nats)
    if crossing is None:
        return None
    (step, before), (after_step, after) = crossing
    share = (nats - before) / (after - before) if after != before else 1.0
    names = [f"{measure}{gain}{end}" for measure in MEASURES for gain in ("", "_gain") for end in ("", "_low", "_high")]
    numbers = {}
    for name in (*names, "rounds"):
        values = dict(log.get(name, ()))
        if step in values and after_step in values:
            numbers[name] = (1 - share) * values[step] + share * values[after_step]
    return Reached(nats, (1 - share) * step + share * after_step, numbers)


_Point = tuple[float, float]


def _crossing(points: Points, nats: float) -> tuple[_Point, _Point] | None:
    """The last two neighbours (step, KL) that `nats` lies between; twice the same where there is but one point."""
    neighbours = list(pairwise(points)) or [(one, one) for one in points]
    for before, after in reversed(neighbours):
        if min(before[1], after[1]) <= nats <= max(before[1], after[1]):
            return before, after
    return None
