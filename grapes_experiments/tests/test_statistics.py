"""What follows from numbers: against SciPy, closed forms and simulation."""

import numpy as np
import pytest
from scipy import stats

from grapes_experiments import records
from grapes_experiments import statistics as st
from grapes_experiments.cells import Cell
from grapes_experiments.experiments import Scale, plan
from grapes_experiments.records import REPORT, TUNING, Record, Results
from grapes_experiments.variants import LOCAL, PLAIN, PROPAGATED, RATE, Variant, with_controls

RNG = np.random.default_rng(0)


def made(cell, accuracy, phase=REPORT, diverged=None):
    """A record of one epoch: accuracies by rate, of every seed."""
    values = np.array([*accuracy.values()], float)
    nothing = np.full((2, len(values)), np.nan)
    diverged = np.zeros(values.shape, bool) if diverged is None else diverged
    both = np.stack([np.full_like(values, 0.1), values])[:, :, None]
    seeds = tuple(range(values.shape[1]))
    start = cell, phase, tuple(accuracy), seeds, np.arange(2), both, diverged
    return Record(*start, nothing, {}, np.array([np.nan, 1.0]), 0, 0, [])


def results(report, tuning=None, dataset="mnist", **changed):
    wanted = plan("spread", dataset=dataset)._replace(
        cells=[*report], grid=[1.0] if tuning else [], scale=Scale(10, 1), **changed
    )
    return Results(wanted, [], tuning or {}, report)


CELL = {v: Cell("p", v) for v in (PLAIN, RATE, *with_controls(LOCAL), *with_controls(PROPAGATED))}


def draws(mean=0.9, deviation=0.01, seeds=10):
    return RNG.normal(mean, deviation, seeds)


# Estimates.


def test_paired_is_the_t_test():
    one, other = draws(), draws()
    expected = stats.ttest_rel(one, other)
    found = st.paired(one - other)
    np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-9)
    low, high = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.interval(), (low, high), rtol=1e-9)
    more = st.paired(one - other, 0.5, 0.25)
    np.testing.assert_allclose(more.error**2, found.error**2 + 0.75)


def test_interval_holds_the_truth_as_often_as_it_says():
    held = [
        low <= 0.3 <= high
        for low, high in (st.paired(RNG.normal(0.3, 1, 10)).interval() for _ in range(4000))
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_detectable_difference_is_seen_four_times_of_five():
    errors = st.paired(RNG.normal(0, 1, 10))._replace(error=1 / np.sqrt(10)).detectable
    seen = [st.paired(RNG.normal(errors, 1, 10)).p < 0.05 for _ in range(4000)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.025)


def test_holm():
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(st.holm([0.9, 0.8]), [1, 1])
    assert len(st.holm([])) == 0


def test_random_effects():
    alike = [st.Estimate(0.2, 0.1, 9)] * 3
    mean, between = st.random_effects(alike)
    assert (mean.mean, between, mean.freedom) == (pytest.approx(0.2), 0.0, 2)
    np.testing.assert_allclose(mean.error, 0.1 / np.sqrt(3))
    # Of errors that vanish beside the spread, the plain mean and t of the effects themselves.
    effects = np.array([-1.0, 0.4, 2.0, 0.8])
    mean, between = st.random_effects([st.Estimate(e, 1e-6, 9) for e in effects])
    np.testing.assert_allclose(mean.mean, effects.mean(), rtol=1e-6)
    np.testing.assert_allclose(mean.error, stats.sem(effects), rtol=1e-6)
    np.testing.assert_allclose(between, effects.std(ddof=1), rtol=1e-6)


# Outcomes.


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.5, 0.1, st.BETTER),
        (-0.5, 0.1, st.WORSE),
        (0.05, 0.04, st.EQUIVALENT),
        (0.1, 0.2, st.OPEN),
        (0.1, 0.01, st.BETTER),  # within the margin, and better
    ],
)
def test_four_outcomes(mean, error, expected):
    estimate = st.Estimate(mean, error, 9)
    assert st.outcome(estimate, 0.25) == expected
    swapped = {st.BETTER: st.WORSE, st.WORSE: st.BETTER}
    assert st.outcome(estimate, 0.25, -1) == swapped.get(expected, expected)


def test_equivalence_is_two_one_sided_tests():
    differences = RNG.normal(0.02, 0.2, 12)
    for within in np.linspace(0.01, 0.4, 60):
        upper = stats.ttest_1samp(differences, within, alternative="less").pvalue
        lower = stats.ttest_1samp(differences, -within, alternative="greater").pvalue
        found = st.outcome(st.paired(differences), within)
        assert (found == st.EQUIVALENT) == (max(upper, lower) < 0.05)


def test_what_is_no_estimate():
    values = draws()
    assert st.judged(values, values, 1, 1) == (st.IDENTICAL, None)
    assert st.judged(values[:9], values[:9] + draws()[:9], 1, 1) == (st.FEW, None)
    assert st.judged(values + 0.25, values, 1, 1) == (st.OPEN, None)  # no error to judge by


def one(found, **wanted):
    def fits(c):
        return all(getattr(c, name) == value for name, value in wanted.items())

    (only,) = filter(fits, found)
    return only


def test_comparisons_at_the_common_rate():
    values = {cell: draws() for cell in CELL.values()}
    report = {cell: made(cell, {0.1: v}) for cell, v in values.items()}
    found = st.comparisons(results(report))
    assert {c.phase for c in found} == {st.COMMON}
    assert len(found) == (2 + 6) + (2 + 3)
    c = one(found, cell=CELL[LOCAL], control=CELL[LOCAL.against("norm")])
    expected = 100 * (values[c.cell] - values[c.control])
    np.testing.assert_allclose(c.estimate.mean, expected.mean(), rtol=1e-6)
    assert c.margin == 0.25
    assert {c.kind for c in found} == {"plain", *(v.control for v in CELL if v.control)}


def test_factor_made_otherwise_has_the_controls_of_its_form():
    odd = Variant("local", clipped=False)
    panel = [Cell("p", v) for v in (PLAIN, odd, LOCAL, LOCAL.against("mean"))]
    assert [c.variant for c in st.controls_of(panel[1], panel)] == [PLAIN, LOCAL.against("mean")]


def two(plain, grapes, tuned_plain, tuned_grapes):
    cells = CELL[PLAIN], CELL[PROPAGATED]
    report = {c: made(c, r) for c, r in zip(cells, (plain, grapes), strict=True)}
    both = zip(cells, (tuned_plain, tuned_grapes), strict=True)
    return results(report, {c: made(c, r, TUNING) for c, r in both})


SURE = {0.05: [0.1] * 5, 0.1: [0.9] * 5, 0.2: [0.2] * 5}


def test_noise_of_the_choice_enters():
    torn = {
        0.05: [0.1] * 5,
        0.1: [0.90, 0.91, 0.90, 0.91, 0.95],
        0.2: [0.93, 0.90, 0.91, 0.92, 0.90],
    }
    torn |= {0.4: [0.1] * 5}
    low, high, plain = draws(0.9), draws(0.8), draws(0.9)
    found = two({0.1: plain}, {0.1: low, 0.2: high}, SURE, torn)
    choice = records.choice(found.tuning[CELL[PROPAGATED]])
    assert choice.inside
    assert 0.05 < choice.shares[0.2] < 0.95
    c = one(st.comparisons(found), phase=st.BEST)
    share = choice.shares[0.2] / (choice.shares[0.1] + choice.shares[0.2])
    variance = share * (1 - share) * (100 * (low.mean() - high.mean())) ** 2
    chosen = {0.1: low, 0.2: high}[choice.rate]
    alone = st.paired(100 * (chosen - plain))
    np.testing.assert_allclose(c.estimate.error**2, alone.error**2 + variance, rtol=1e-6)


def test_rates_on_the_edge_have_no_outcome():
    edge = {0.1: [0.9] * 5, 0.2: [0.2] * 5}
    found = st.comparisons(two({0.1: draws()}, {0.1: draws()}, SURE, edge))
    c = one(found, phase=st.BEST)
    assert (c.outcome, c.estimate) == (st.EDGE, None)
    assert one(found, phase=st.COMMON).estimate


def test_rates_not_tried_for_both_have_no_outcome():
    low = {0.0125: [0.2] * 5, 0.025: [0.9] * 5, 0.05: [0.2] * 5, 0.1: [0.3] * 5}
    report = {0.1: draws(), 0.025: draws()}
    found = st.comparisons(two({0.1: draws()}, report, SURE, low))
    c = one(found, phase=st.BEST)
    assert (c.outcome, c.estimate) == (st.APART, None)


def test_numbers_that_are_the_same_count_once():
    found = st.comparisons(two({0.1: draws()}, {0.1: draws()}, SURE, SURE))
    assert [c.repeated for c in found] == [False, True]
    assert sum(sum(count.values()) for count in st.counts(found).values()) == 1


def test_diverged_seeds_count_with_chance_and_are_told():
    lost = np.array([[True] * 3 + [False] * 7])
    values = np.where(lost[0], 0.1, 0.9)
    plain, grapes = CELL[PLAIN], CELL[PROPAGATED]
    report = {plain: made(plain, {0.1: draws()}), grapes: made(grapes, {0.1: values}, REPORT, lost)}
    c = one(st.comparisons(results(report)))
    assert c.diverged == (3, 0)
    np.testing.assert_allclose(
        c.estimate.mean, 100 * (values - report[plain].accuracy[1, 0, 0]).mean(), rtol=1e-6
    )
    report = {cell: made(cell, {0.1: draws()}, REPORT, np.ones((1, 10), bool)) for cell in report}
    assert one(st.comparisons(results(report))).outcome == st.DIVERGED


# Claims.


def comparison(kind, outcome, phase=st.COMMON):
    control = PLAIN if kind == "plain" else LOCAL.against(kind)
    estimate = st.Estimate(0.5, 0.1, 9)
    place = CELL[LOCAL], CELL[control], st.FINAL, phase, 10, (0, 0)
    return st.Comparison(*place, outcome, estimate)


@pytest.mark.parametrize(
    ("plain", "control", "expected"),
    [
        (st.BETTER, st.BETTER, st.YES),
        (st.BETTER, st.EQUIVALENT, st.NO),
        (st.WORSE, st.BETTER, st.NO),
        (st.BETTER, st.OPEN, st.UNKNOWN),
        (st.OPEN, st.OPEN, st.UNKNOWN),  # what is not seen refutes nothing
        (st.EDGE, st.BETTER, st.UNKNOWN),
        (st.BETTER, st.IDENTICAL, st.NO),
    ],
)
def test_claims(plain, control, expected):
    found = [comparison("plain", st.BETTER), comparison("plain", plain, st.BEST)]
    found += [comparison("mean", control), comparison("norm", st.BETTER)]
    (claim,) = st.claims(found)
    assert claim.holds == expected
    assert claim.plain.phase == st.BEST


def test_primary_comparisons():
    found = [comparison(kind, st.BETTER) for kind in ("plain", "mean", "norm", "roll")]
    assert [p.comparison.kind for p in st.primary(found)] == ["plain", "mean", "norm"]
    tuned = [*found, comparison("plain", st.BETTER, st.BEST)]
    assert [(p.comparison.kind, p.comparison.phase) for p in st.primary(tuned)] == [
        ("mean", st.COMMON),
        ("norm", st.COMMON),
        ("plain", st.BEST),
    ]
    p = st.Estimate(0.5, 0.1, 9).p
    np.testing.assert_allclose([x.adjusted for x in st.primary(tuned)], [3 * p] * 3)


# What is measured.


def test_slowness_is_what_a_hyperbola_has():
    epochs = np.arange(1.0, 200)
    assert st.fitted_slowness(epochs, 0.9 * epochs / (0.3 + epochs)) == pytest.approx(0.3, abs=0.01)


def test_slowness_of_a_shortened_curve_is_that_of_the_whole_one():
    epochs = np.arange(41)
    values = 0.9 * epochs / (0.2 + epochs) + RNG.normal(0, 0.01, 41)
    record = made(CELL[PLAIN], {0.1: draws()})
    whole = record._replace(epochs=epochs, accuracy=values[:, None, None, None])
    rows = [n for n in epochs if n in records.KEPT or n == 40]
    short = whole._replace(epochs=epochs[rows], accuracy=whole.accuracy[rows])
    assert len(rows) < 41
    np.testing.assert_array_equal(st.slowness(whole), st.slowness(short))


def test_slowness_only_where_a_curve_has_shape():
    for epochs, expected in (8, 1), (20, 2):
        wanted = plan("accuracy", epochs=epochs)
        assert len(st.metrics_of(Results(wanted, [], {}, {}))) == expected
    assert st.metrics_of(Results(plan("forgetting"), [], {}, {})) == (st.AVERAGE, st.FORGETTING)
    assert st.metrics_of(Results(plan("memory"), [], {}, {})) == ()


def test_forgetting():
    record = made(CELL[PLAIN], {0.1: [0.5]})
    accuracy = np.array([[0.1] * 3, [0.9, 0.1, 0.1], [0.7, 0.8, 0.2], [0.6, 0.7, 0.9]])
    record = record._replace(epochs=np.arange(4), accuracy=accuracy[:, None, :, None])
    np.testing.assert_allclose(st.forgetting(record), ((0.9 - 0.6) + (0.8 - 0.7)) / 2)
    np.testing.assert_allclose(st.final(record), (0.6 + 0.7 + 0.9) / 3)


def test_margins():
    assert st.margin(st.FINAL, "mnist", np.ones(3)) == 0.25
    assert st.margin(st.FINAL, "emnist", np.ones(3)) == st.MARGIN
    assert st.margin(st.SLOWNESS, "mnist", np.array([0.1, 0.3])) == pytest.approx(0.02)
