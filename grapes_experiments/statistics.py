"""What follows from the numbers: differences paired by the seed, Student's t, four outcomes."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from grapes_experiments.cells import Cell
from grapes_experiments.records import KEPT, Choice, Record, Results, candidates, choice, covers
from grapes_experiments.variants import CONTROLS, PLAIN, RATE, Variant

# Estimates.

LEVEL, POWER = 0.95, 0.8
FEWEST = 10  # seeds behind a verdict


class Estimate(NamedTuple):
    """A mean with its standard error, and the degrees of freedom of Student's t behind it."""

    mean: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided confidence interval of the mean."""
        reach = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def p(self) -> float:
        """Of both sides, that a mean of zero is as far away."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    @property
    def detectable(self) -> float:
        """The difference that a test at 5 % would have seen with a probability of 80 %."""
        return self.error * shift(self.freedom)


def shift(freedom: float) -> float:
    """Of the noncentral t, where the two-sided test at 5 % has the power wanted."""
    edge = stats.t.ppf((1 + LEVEL) / 2, freedom)

    def lacking(by: float) -> float:
        seen = stats.nct.sf(edge, freedom, by) + stats.nct.cdf(-edge, freedom, by)
        return float(seen) - POWER

    return root(lacking, 0.1, 60.0)


def root(of: Callable[[float], float], low: float, high: float) -> float:
    found: Any = optimize.brentq(of, low, high)
    return float(found)


def paired(differences: np.ndarray, *variances: float) -> Estimate:
    """The mean of paired differences; its variance, and what else there is, add up."""
    n = len(differences)
    return Estimate(
        float(differences.mean()),
        float(np.sqrt(differences.var(ddof=1) / n + sum(variances))),
        n - 1,
    )


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number, by Holm's step-down procedure."""
    values = np.asarray(p, float)
    order = np.argsort(values)
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def random_effects(estimates: Sequence[Estimate]) -> tuple[Estimate, float]:
    """The mean effect over data sets, and the standard deviation of the effect between them.

    Between-set variance by Paule and Mandel, interval by Hartung and Knapp (Student's t, one less
    than the sets), never narrower than the fixed-effect one of the same weights.
    """
    y, v = (np.array([getattr(e, name) for e in estimates]) for name in ("mean", "error"))
    v, k = v**2, len(y)

    def surplus(tau2: float) -> float:
        w = 1 / (v + tau2)
        return float((w * (y - (w * y).sum() / w.sum()) ** 2).sum() - (k - 1))

    tau2 = 0.0
    if surplus(0.0) > 0:
        high = 1.0
        while surplus(high) > 0:
            high *= 4
        tau2 = root(surplus, 0.0, high)
    w = 1 / (v + tau2)
    mean = float((w * y).sum() / w.sum())
    scale = max(1.0, float((w * (y - mean) ** 2).sum() / (k - 1)))
    return Estimate(mean, float(np.sqrt(scale / w.sum())), k - 1), float(np.sqrt(tau2))


# What is measured, of every seed.


def curve(record: Record) -> np.ndarray:
    """Accuracy (epochs, seeds) at the first rate, the mean over all tasks."""
    return record.accuracy[:, 0].mean(1)


def final(record: Record) -> np.ndarray:
    return curve(record)[-1]


def ends(record: Record) -> np.ndarray:
    """Accuracy (tasks, tasks, seeds): at the end of the task of the row, on that of the column."""
    tasks, last = record.accuracy.shape[2], record.epochs[-1]
    wanted = [last * (task + 1) // tasks for task in range(tasks)]
    return record.accuracy[np.isin(record.epochs, wanted), 0]


def forgetting(record: Record) -> np.ndarray:
    """What is lost of the best accuracy at the end of an earlier task: mean of all but the last."""
    matrix = ends(record)[:, :-1]
    return (matrix[:-1].max(0) - matrix[-1]).mean(0)


def fitted_slowness(epochs: np.ndarray, accuracy: np.ndarray) -> float:
    """Least squares of a * epoch / (slowness + epoch), a being the best accuracy."""
    limit = accuracy.max()
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
    """On the epochs that a shortened file keeps, so that it and the whole one agree."""
    rows = np.isin(record.epochs, [*KEPT, record.epochs[-1]]) & (record.epochs > 0)
    epochs = record.epochs[rows].astype(float)
    return np.array([fitted_slowness(epochs, seed) for seed in curve(record)[rows].T])


class Metric(NamedTuple):
    name: str
    unit: str
    of: Callable[[Record], np.ndarray]  # of every seed, at the first rate of the record
    scale: float  # to the unit
    digits: int
    sign: int = 1  # -1 where lower is better


FINAL = Metric("final test accuracy", "points", final, 100, 2)
SLOWNESS = Metric("slowness", "epochs", slowness, 1, 3, -1)
AVERAGE = Metric("average accuracy over all tasks after the last", "points", final, 100, 2)
FORGETTING = Metric("forgetting", "points", forgetting, 100, 2, -1)
SHAPED = 20  # epochs from which a curve has a shape to fit

# What counts as equal, in points, written down before the runs: 0.25 where 10,000 images of MNIST
# are tested; a digit more or less of the 450 is 0.22. Of the slowness a tenth of that of the
# control.
MARGINS = {"mnist": 0.25, "digits": 1.0}
MARGIN, OF_SLOWNESS = 0.5, 0.1


def metrics_of(results: Results) -> tuple[Metric, ...]:
    plan = results.plan
    if plan.tasks > 1:
        return AVERAGE, FORGETTING
    if not plan.scale.epochs:
        return ()
    shaped = plan.experiment in ("accuracy", "length") and plan.scale.epochs >= SHAPED
    return (FINAL, SLOWNESS) if shaped else (FINAL,)


def margin(metric: Metric, dataset: str, control: np.ndarray) -> float:
    if metric is SLOWNESS:
        return OF_SLOWNESS * float(control.mean())
    return MARGINS.get(dataset, MARGIN)


# Comparisons.

COMMON, BEST = "common rate", "own best rates"
BETTER, WORSE, EQUIVALENT, OPEN = "better", "worse", "equivalent", "inconclusive"
IDENTICAL, DIVERGED, FEW = "identical", "both diverged", "too few seeds"
EDGE, APART = "edge of the rates", "best rate not tried for both"
OUTCOMES = BETTER, EQUIVALENT, WORSE, OPEN, IDENTICAL, DIVERGED, EDGE, APART, FEW


class Comparison(NamedTuple):
    """A form of GRAPES against one control."""

    cell: Cell
    control: Cell
    metric: Metric
    phase: str
    seeds: int
    diverged: tuple[int, int]  # seeds of the two
    outcome: str
    estimate: Estimate | None = None  # of the difference, in the unit of the metric
    margin: float = np.nan
    repeated: bool = False  # the numbers of the common rate again

    @property
    def kind(self) -> str:
        """Of the control: "plain", or a name of CONTROLS."""
        return self.control.variant.control or "plain"


def outcome(estimate: Estimate, within: float, sign: int = 1) -> str:
    """Better, worse, equivalent or inconclusive; `sign` is -1 where lower is better.

    Equivalent by two one-sided tests at 5 %: the interval of 90 % lies within the margin.
    """
    low, high = estimate.interval()
    if low > 0 or high < 0:
        return BETTER if (low > 0) == (sign > 0) else WORSE
    low, high = estimate.interval(2 * LEVEL - 1)
    return EQUIVALENT if -within < low and high < within else OPEN


def judged(
    one: np.ndarray, other: np.ndarray, within: float, sign: int, *variances: float
) -> tuple[str, Estimate | None]:
    """The outcome of paired values, and the estimate behind it where they differ at all."""
    differences = np.round(one - other, 9)  # equal ones are to be equal
    if not differences.any():
        return IDENTICAL, None
    if len(differences) < FEWEST:
        return FEW, None
    estimate = paired(differences, *variances)
    if not estimate.error:
        return OPEN, None  # all differ alike: there is no error to judge by
    return outcome(estimate, within, sign), estimate


class Trained(NamedTuple):
    """A cell at one rate, and what the choice of that rate adds to the variance of its mean."""

    record: Record
    choice: Choice | None = None

    def values(self, metric: Metric) -> np.ndarray:
        return metric.scale * metric.of(self.record)


def chosen(results: Results, cell: Cell, phase: str) -> Trained | None:
    """A cell at the common rate, or at its own best one, as far as it is trained."""
    if cell not in results.report:
        return None
    record = results.report[cell]
    if phase == COMMON:
        return Trained(record.at(record.cell.setup.rate))
    found = choice(results.tuning[cell]) if cell in results.tuning else None
    return found and Trained(record.at(found.rate), found)


def choice_variance(results: Results, cell: Cell, metric: Metric) -> float:
    """Of the mean at the chosen rate, over what other tuning seeds would have chosen."""
    record, found = results.report[cell], choice(results.tuning[cell])
    rates = candidates(found)
    shares = np.array([found.shares[rate] for rate in rates])
    means = np.array([metric.scale * metric.of(record.at(rate)).mean() for rate in rates])
    shares /= shares.sum()
    return float((shares * (means - (shares * means).sum()) ** 2).sum())


def compared(
    results: Results, cell: Cell, control: Cell, metric: Metric, phase: str
) -> Comparison | None:
    one, other = (chosen(results, of, phase) for of in (cell, control))
    if one is None or other is None:
        return None
    diverged = int(one.record.diverged.sum()), int(other.record.diverged.sum())
    seeds = len(one.record.seeds)
    facts = Comparison(cell, control, metric, phase, seeds, diverged, DIVERGED)
    if phase == BEST:
        rates = [(of.choice, of.record.cell.setup.rate) for of in (one, other)]
        only = all(c and candidates(c) == [rate] for c, rate in rates)
        facts = facts._replace(repeated=only)
        found = [t.choice for t in (other, one) if t.choice and t.choice.inside]
        if len(found) < 2:
            return facts._replace(outcome=EDGE)
        tried = [results.tuning[of] for of in (cell, control)]
        if not all(covers(t, c.rate) for t, c in zip(tried, found, strict=True)):
            return facts._replace(outcome=APART)
    if min(diverged) == seeds:
        return facts
    values = one.values(metric), other.values(metric)
    within = margin(metric, results.plan.dataset, values[1])
    tuned = (cell, control) if phase == BEST else ()
    variances = [choice_variance(results, of, metric) for of in tuned]
    word, estimate = judged(*values, within, metric.sign, *variances)
    return facts._replace(outcome=word, estimate=estimate, margin=within)


def panels(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    sorted_out: dict[str, list[Cell]] = {}
    for cell in cells:
        sorted_out.setdefault(cell.panel, []).append(cell)
    return sorted_out


def controls_of(cell: Cell, panel: Sequence[Cell]) -> list[Cell]:
    """Plain training, and every control; a factor made otherwise has those of its form."""
    of = {other.variant: other for other in panel}
    wanted: list[Variant] = [PLAIN, RATE]
    for control in CONTROLS:
        if control and control != "rate":
            own = cell.variant.against(control)
            form = Variant(cell.variant.form, control)
            wanted.append(own if own in of else form)
    return [of[variant] for variant in wanted if variant in of]


def phases_of(results: Results) -> tuple[str, ...]:
    return (COMMON, BEST) if results.plan.grid else (COMMON,)


def comparisons(results: Results) -> list[Comparison]:
    """Every form of GRAPES against each control of its panel, as far as they are trained."""
    found = []
    for metric in metrics_of(results):
        for cells in panels(results.plan.cells).values():
            for cell in cells:
                if cell.variant.is_grapes:
                    for control in controls_of(cell, cells):
                        for phase in phases_of(results):
                            found.append(compared(results, cell, control, metric, phase))
    return [c for c in found if c is not None]


def counts(found: Iterable[Comparison]) -> dict[tuple[str, str, str], Counter[str]]:
    """How often each outcome was found, by metric, control and rates; every run counts once."""
    counted: dict[tuple[str, str, str], Counter[str]] = {}
    for c in found:
        if not c.repeated:
            counted.setdefault((c.metric.name, c.kind, c.phase), Counter())[c.outcome] += 1
    return counted


# Claims.

YES, NO, UNKNOWN = "yes", "no", "open"


class Claim(NamedTuple):
    """Whether a form of GRAPES is better than plain training and than every control."""

    cell: Cell
    metric: Metric
    plain: Comparison | None  # at own best rates, or at the common one if there are none
    controls: list[Comparison]  # at the common rate
    holds: str


def claims(found: Sequence[Comparison]) -> list[Claim]:
    sorted_out: dict[tuple[Cell, Metric], list[Comparison]] = {}
    for c in found:
        sorted_out.setdefault((c.cell, c.metric), []).append(c)
    made = []
    for (cell, metric), of_cell in sorted_out.items():
        plain = [c for c in of_cell if c.kind == "plain"]
        plain = [c for c in plain if c.phase == BEST] or plain
        others = [c for c in of_cell if c.kind not in ("plain", "rate") and c.phase == COMMON]
        made.append(Claim(cell, metric, next(iter(plain), None), others, holds(plain, others)))
    return made


def holds(plain: Sequence[Comparison], controls: Sequence[Comparison]) -> str:
    """What is not seen refutes nothing: only what is equivalent or better does."""
    words = {c.outcome for c in (*plain[:1], *controls)}
    if words & {WORSE, EQUIVALENT, IDENTICAL}:
        return NO
    return YES if plain and controls and words == {BETTER} else UNKNOWN


class Primary(NamedTuple):
    comparison: Comparison
    p: float
    adjusted: float


def primary(found: Sequence[Comparison]) -> list[Primary]:
    """The few comparisons that a claim rests on, with p-values after Holm's correction.

    The local and the propagated form, against plain training at own best rates (at the common one,
    where rates were not tuned), and against the mean factor and the equal step at the common one.
    """
    tuned = {c.cell for c in found if c.phase == BEST}
    chosen = []
    for c in found:
        usual = c.cell.variant in (Variant("local"), Variant("propagated"))
        phase = BEST if c.kind == "plain" and c.cell in tuned else COMMON
        if usual and c.kind in ("plain", "mean", "norm") and c.phase == phase and c.estimate:
            chosen.append((c, c.estimate.p))
    adjusted = holm([p for _, p in chosen])
    return [Primary(c, p, float(a)) for (c, p), a in zip(chosen, adjusted, strict=True)]
