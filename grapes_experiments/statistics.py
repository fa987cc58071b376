"""The numbers of a report: what was measured, and what follows from it, paired by the seed."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from grapes_experiments.cells import Cell
from grapes_experiments.records import BEST, SAME, TUNING, Record, Results, best_rate

# Records.


def own_rates(results: Results) -> dict[Cell, float]:
    """The best learning rate of every cell whose tuning is whole."""
    return {r.cell: best_rate(r) for r in results.records if r.phase == TUNING}


def at(results: Results, phase: str) -> dict[Cell, Record]:
    """What was trained at the common rate, or at the own best one of each, in the plan's order.

    Where the two rates are the same, one record serves both.
    """
    found = {r.cell: r for r in results.records if r.phase == phase}
    if phase == BEST:
        common, rates = at(results, SAME), own_rates(results)
        found |= {c: r for c, r in common.items() if rates.get(c) == c.setup.rate}
    return {cell: found[cell] for cell in results.plan.cells if cell in found}


def missing(results: Results) -> list[Cell]:
    """Cells that are not trained yet at all the rates that the plan wants."""
    wanted = [at(results, phase) for phase in ((SAME, BEST) if results.plan.grid else (SAME,))]
    return [c for c in results.plan.cells if not all(c in records for records in wanted)]


def panels(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    sorted_out: dict[str, list[Cell]] = {}
    for cell in cells:
        sorted_out.setdefault(cell.panel, []).append(cell)
    return sorted_out


# What is measured, of every seed.


def curve(record: Record) -> np.ndarray:
    """Accuracy (1 + epochs, seeds), the mean over all tasks."""
    return record.accuracy[:, 0].mean(1)


def final(record: Record) -> np.ndarray:
    return curve(record)[-1]


def highest(record: Record) -> np.ndarray:
    return curve(record)[1:].max(0)


def ends(record: Record) -> np.ndarray:
    """Accuracy (tasks, tasks, seeds): at the end of the task of the row, on that of the column."""
    tasks = record.accuracy.shape[2]
    epochs = (len(record.accuracy) - 1) // tasks
    return record.accuracy[epochs::epochs, 0]


def forgetting(record: Record) -> np.ndarray:
    """What is lost of the best accuracy at the end of an earlier task: mean of all but the last."""
    matrix = ends(record)[:, :-1]
    return (matrix[:-1].max(0) - matrix[-1]).mean(0)


def fitted_slowness(accuracy: np.ndarray) -> float:
    """Least squares of a * epoch / (slowness + epoch) from epoch 1, a being the best accuracy."""
    epochs, limit = np.arange(1.0, 1 + len(accuracy)), accuracy.max()
    if not limit > 0:
        return np.nan
    near = np.mean(epochs * (limit / np.maximum(accuracy, limit / 100) - 1))
    fit = optimize.least_squares(
        lambda slowness: limit * epochs / (slowness + epochs) - accuracy,
        near,
        bounds=(0, np.inf),
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )
    return float(fit.x[0])


def slowness(record: Record) -> np.ndarray:
    return np.array([fitted_slowness(seed) for seed in curve(record)[1:].T])


class Metric(NamedTuple):
    name: str
    unit: str
    of: Callable[[Record], np.ndarray]  # of every seed
    scale: float  # to the unit
    digits: int
    sign: int = 1  # -1 where lower is better


FINAL = Metric("final test accuracy", "points", final, 100, 2)
SLOWNESS = Metric("slowness", "epochs", slowness, 1, 4, -1)
AVERAGE = Metric("average accuracy over all tasks after the last", "points", final, 100, 2)
FORGETTING = Metric("forgetting", "points", forgetting, 100, 2, -1)
METRICS: dict[str, tuple[Metric, ...]] = {
    "accuracy": (FINAL, SLOWNESS),
    "forgetting": (AVERAGE, FORGETTING),
    "memory": (),
}


def metrics_of(experiment: str) -> tuple[Metric, ...]:
    return METRICS.get(experiment, (FINAL,))


# Intervals.

LEVEL = 0.95
FEWEST = 5  # of fewer seeds, no interval of the bootstrap reaches the level
RESAMPLES = 20_000
# How often an interval held the truth: measured on 20,000 samples of normal data, by their size.
# The plain percentiles reached 0.844 (5), 0.865 (6), 0.882 (7), 0.888 (8) and 0.905 (10).
COVERAGE = {5: 0.925, 6: 0.937, 7: 0.944, 8: 0.947, 10: 0.948}


@functools.cache
def resamples(n: int) -> np.ndarray:
    """Rows of n indices: all n ** n of them where these are few, or else at random."""
    if n**n <= 50_000:
        return np.array(list(itertools.product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(n, size=(RESAMPLES, n))


def expanded_tail(n: int) -> float:
    """The level of Hesterberg's expanded percentiles, in place of half of 5 %.

    T. Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69(4),
    2015: it makes up for the bootstrap's neglect of n - 1 and of Student's t.
    """
    return float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - LEVEL) / 2, n - 1)))


def interval(differences: np.ndarray, tail: float | None = None) -> tuple[float, float]:
    """95 % interval of the mean, by the expanded percentiles of the bootstrap.

    It holds the truth as often as COVERAGE says: in 92.5 % of samples of 5, 94.8 % of 10.
    """
    n = len(differences)
    tail = expanded_tail(n) if tail is None else tail
    means = differences[resamples(n)].mean(1)
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


# Comparisons.

BETTER, NONE, WORSE = "better", "no difference seen", "worse"
DIVERGED, FEW = "diverged", "too few seeds"
WORDS = BETTER, NONE, WORSE, DIVERGED, FEW
KINDS = "plain", "mean factor", "neighbour's factor"
RATES = {SAME: "common rate", BEST: "own best rates"}
# What GRAPES has to beat: plain training with a rate of its own; where the factor is another one,
# the question is what the same rate makes of it.
CLAIM = {"plain": BEST, "mean factor": SAME, "neighbour's factor": SAME}


class Comparison(NamedTuple):
    panel: str
    variant: str
    control: str
    kind: str
    phase: str
    metric: Metric
    seeds: int
    diverged: tuple[int, int]  # seeds of the variant and of the control
    mean: float = np.nan  # of the differences, in the unit of the metric
    low: float = np.nan
    high: float = np.nan
    word: str = DIVERGED


def is_grapes(variant: str) -> bool:
    return variant != "plain" and "factor" not in variant


def control_of(variant: str, kind: str) -> str:
    form = "propagated" if variant.startswith("propagated") else "local"
    return kind if kind == "plain" else f"{form}, {kind}"


def judged(differences: np.ndarray, sign: int = 1) -> tuple[float, float, float, str]:
    """Mean of paired differences, its interval, and what follows, where `sign` is better."""
    differences = np.round(differences, 9)  # equal ones are to be equal
    mean = low = high = float(differences.mean())
    if len(differences) < FEWEST:
        return mean, np.nan, np.nan, FEW
    if np.ptp(differences) > 0:
        low, high = interval(differences)
    better, worse = (low > 0, high < 0)[::sign]
    return mean, low, high, BETTER if better else WORSE if worse else NONE


def compared(variant: Record, control: Record, kind: str, phase: str, metric: Metric) -> Comparison:
    diverged = int(variant.diverged.sum()), int(control.diverged.sum())
    names = variant.cell.panel, variant.cell.variant, control.cell.variant, kind, phase
    seeds = variant.accuracy.shape[-1]
    facts = Comparison(*names, metric, seeds, diverged)
    if any(diverged):
        return facts
    differences = metric.scale * (metric.of(variant) - metric.of(control))
    mean, low, high, word = judged(differences, metric.sign)
    return facts._replace(mean=mean, low=low, high=high, word=word)


def comparisons(results: Results) -> list[Comparison]:
    """Every form of GRAPES against each control of its panel, as far as they are trained."""
    found = []
    phases = {phase: at(results, phase) for phase in RATES}
    for metric in metrics_of(results.plan.experiment):
        for cells in panels(results.plan.cells).values():
            of = {cell.variant: cell for cell in cells}
            pairs = [
                (cell, of[control], kind)
                for variant, cell in of.items()
                if is_grapes(variant)
                for kind in KINDS
                if (control := control_of(variant, kind)) in of
            ]
            found += [
                compared(records[cell], records[control], kind, phase, metric)
                for cell, control, kind in pairs
                for phase, records in phases.items()
                if cell in records and control in records
            ]
    return found


def counts(found: Iterable[Comparison]) -> dict[tuple[str, str, str], Counter[str]]:
    """How often each word was found, by metric, kind of control and rate."""
    counted: dict[tuple[str, str, str], Counter[str]] = {}
    for c in found:
        counted.setdefault((c.metric.name, c.kind, c.phase), Counter())[c.word] += 1
    return counted


class Claim(NamedTuple):
    """Whether one form of GRAPES is better than all its controls."""

    panel: str
    variant: str
    metric: Metric
    words: dict[str, str]  # by kind of control, as far as there is a comparison
    holds: str  # yes, no, or not known


YES, NO, OPEN = "yes", "no", "not known"


def claims(results: Results, found: Iterable[Comparison]) -> list[Claim]:
    sorted_out: dict[tuple[str, str, Metric], list[Comparison]] = {
        (cell.panel, cell.variant, metric): []
        for metric in metrics_of(results.plan.experiment)
        for cell in results.plan.cells
        if is_grapes(cell.variant)
    }
    for c in found:
        if c.phase == CLAIM[c.kind]:
            sorted_out[c.panel, c.variant, c.metric].append(c)
    return [Claim(*k, {c.kind: c.word for c in v}, holds(v)) for k, v in sorted_out.items()]


def holds(against: list[Comparison]) -> str:
    """One control that is not beaten refutes it; where one is missing, it is not known."""
    words = {c.kind: c.word for c in against}
    if {NONE, WORSE} & set(words.values()) or any(c.diverged[0] for c in against):
        return NO
    return YES if all(words.get(kind) == BETTER for kind in KINDS) else OPEN
