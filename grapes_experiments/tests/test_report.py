"""Reports of small runs that are made up, with answers that are known."""

import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
from scipy import stats

from grapes_experiments import figures, records
from grapes_experiments import statistics as numbers
from grapes_experiments.experiments import EXPERIMENTS, Choice, Plan, Scale, plan
from grapes_experiments.records import BEST, SAME, TUNING
from grapes_experiments.report import report

RUN = {
    "kind": "run",
    "command": "python -m grapes_experiments run accuracy",
    "versions": {"python": "3.11", "jax": "0.10"},
    "commit": "abc",
    "device": "cpu: cpu, 2 CPU cores",
}
Accuracy = Callable[..., np.ndarray]  # of a cell, a rate and seeds: (1 + epochs, tasks, seeds)


def layers(epoch: int) -> dict:
    histogram = np.histogram(np.linspace(0.8 + epoch / 100, 2, 50), np.linspace(0, 2, 41))[0]
    quantiles = np.array([0.5, 0.7, 0.9, 1, 1.1, 1.3, 2]) ** (1 + epoch / 100)
    told = {
        "factor_mean": 1.8 - epoch / 100,
        "factor_std": 0.05 + epoch / 500,
        "at_lower_bound": 0.125,
        "histogram": histogram.tolist(),
        "incoming": quantiles.tolist(),
    }
    return {f"params/Dense_{layer}/kernel": told for layer in range(2)}


def unit(wanted: Plan, index: int, phase: str, rates: list[float], accuracy: Accuracy) -> list:
    scale, cell = wanted.scale, wanted.cells[index]
    tuning = phase == TUNING
    seeds = scale.tuning_seeds if tuning else scale.seeds
    epochs = (scale.tuning_epochs if tuning else scale.epochs) * wanted.tasks
    right = np.stack([accuracy(cell, rate, epochs, wanted.tasks, seeds) for rate in rates], 1)
    bad = np.isnan(right).any((0, 2))  # (rates, seeds)
    lines: list[dict] = [
        {
            "kind": "unit",
            "cell": index,
            "phase": phase,
            "rates": rates,
            "seeds": list(range(seeds)),
            "epochs": epochs,
            "parameter_bytes": 1000,
            "state_bytes": 8 * (cell.setup.optimizer == "adam"),
        }
    ]
    for epoch in range(1 + epochs):
        line = {"kind": "epoch", "epoch": epoch}
        if epoch:
            line["seconds"] = 0.5
            line["loss"] = [[None if b else 1.0 for b in row] for row in bad]
        line["accuracy"] = np.nan_to_num(right[epoch], nan=0.1).round(6).tolist()
        if wanted.observe and not tuning:
            line["layers"] = layers(epoch)
        lines.append(line)
    return lines


def lines_of(wanted: Plan, accuracy: Accuracy) -> list[dict]:
    lines: list[dict] = [{**RUN, "plan": records.as_json(wanted)}]
    for index, cell in enumerate(wanted.cells):
        rate = best = cell.setup.rate
        if wanted.grid:
            rates = [rate * factor for factor in wanted.grid]
            tuned = unit(wanted, index, TUNING, rates, accuracy)
            lines += tuned
            best = records.best_rate(records.record(cell, tuned[0], tuned[1:]))
        lines += unit(wanted, index, SAME, [rate], accuracy)
        if best != rate:
            lines += unit(wanted, index, BEST, [best], accuracy)
    return lines


def write(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / records.NAME).write_text("".join(map(records.compact, lines)))
    return folder


JITTER = 0.001 * np.array([0.3, -0.5, 0.1, 0.9, -0.8])
# Final test accuracy above plain training's, by the panel and the variant.
ABOVE = {
    ("BP, sgd", "local GRAPES"): 0.03,
    ("BP, sgd", "local, mean factor"): 0.01,
    ("BP, sgd", "local, neighbour's factor"): 0.01,
    ("FA, sgd", "propagated GRAPES"): -0.02,
    ("FA, sgd", "propagated, not clipped"): np.nan,
}


def made_up(cell, rate, epochs, tasks, seeds):
    """Learning curves of slowness 0.1, best at twice the common rate but for the FA ones."""
    epoch = np.arange(1.0 + epochs)[:, None]
    level = 0.9 + np.resize(np.roll(JITTER, len(cell.variant)), seeds)
    level = level - 0.01 * abs(np.log2(rate / cell.setup.rate) - (cell.rule == "BP"))
    level = level + np.nan_to_num(above := ABOVE.get((cell.panel, cell.variant), 0))
    right = (level * epoch / (0.1 + epoch))[:, None].repeat(tasks, 1)
    if np.isnan(above):
        right[-1, :, -2:] = np.nan
    return right


def small(name: str = "accuracy", **options) -> Plan:
    wanted = plan(name, choice=Choice(("BP", "FA"), ("sgd",)), seeds=5, epochs=4)
    return wanted._replace(**options)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("run"), lines_of(small(), made_up))
    report(folder)
    return folder


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    part = text.split(f"# {heading}\n", 1)[1].split("\n#")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


# Numbers.


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([1.0, 1.2, 0.9, 1.1, 1.0], "better"),
        ([-1.0, -1.2, -0.9, -1.1, -1.0], "worse"),
        ([1.0, -1.2, 0.9, -1.1, 0.3], "no difference seen"),
        ([0.0, 0.0, 0.0, 0.0, 0.0], "no difference seen"),
        ([0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0, 0.0], "no difference seen"),  # 6e-17
        ([0.2] * 5, "better"),
        ([1.0, 1.2, 0.9, 1.1], "too few seeds"),
        ([1.0], "too few seeds"),
    ],
)
def test_judged(differences, word):
    opposite = {"better": "worse", "worse": "better"}
    assert numbers.judged(np.array(differences))[-1] == word
    assert numbers.judged(np.array(differences), -1)[-1] == opposite.get(word, word)


@pytest.mark.parametrize(("n", "plain"), [(5, 0.844), (10, 0.905)])
def test_intervals_hold_the_truth_as_often_as_measured(n, plain):
    samples = np.random.default_rng(2).normal(size=(600, n))
    for tail, share in (None, numbers.COVERAGE[n]), (0.025, plain):
        ends = np.array([numbers.interval(sample, tail) for sample in samples])
        assert np.mean((ends[:, 0] <= 0) & (ends[:, 1] >= 0)) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("n", [5, 10])
def test_interval_is_the_percentile_interval_of_scipy(n):
    sample = np.random.default_rng(3).normal(size=n)
    level = 1 - 2 * numbers.expanded_tail(n)
    theirs: Any = stats.bootstrap(
        (sample,), np.mean, n_resamples=100_000, method="percentile", confidence_level=level
    )
    np.testing.assert_allclose(numbers.interval(sample), theirs.confidence_interval, atol=0.04)


@pytest.mark.parametrize("slowness", [0.02, 0.3, 2.0])
def test_slowness_of_a_long_curve_is_its_own(slowness):
    epoch = np.arange(1.0, 2001)
    accuracy = 0.9 * epoch / (slowness + epoch)
    assert numbers.fitted_slowness(accuracy) == pytest.approx(slowness, rel=0.02)
    assert numbers.fitted_slowness(accuracy / 2) == pytest.approx(slowness, rel=0.02)


def test_slowness_has_the_least_squares():
    accuracy = np.array([0.7, 0.85, 0.84, 0.9, 0.88])
    epoch, tried = np.arange(1.0, 6), np.linspace(0, 1, 10_001)[:, None]
    squares = ((0.9 * epoch / (tried + epoch) - accuracy) ** 2).sum(1)
    best = tried[squares.argmin(), 0]
    assert numbers.fitted_slowness(accuracy) == pytest.approx(best, abs=1e-4)
    assert numbers.fitted_slowness(np.full(5, 0.9)) == pytest.approx(0, abs=1e-6)
    assert np.isnan(numbers.fitted_slowness(np.zeros(5)))


def test_forgetting():
    matrix = np.array([[0.9, 0.1, 0.2], [0.7, 0.8, 0.1], [0.5, 0.75, 0.9]])
    accuracy = np.concatenate([np.zeros((1, 3)), matrix.repeat(2, 0)])[:, None, :, None]
    cell = small().cells[0]
    record = records.Record(cell, SAME, (0.1,), accuracy, np.ones((6, 1, 1)), np.ones(6), 0, 0, [])
    np.testing.assert_allclose(numbers.forgetting(record), [(0.4 + 0.05) / 2])
    np.testing.assert_allclose(numbers.final(record), [(0.5 + 0.75 + 0.9) / 3])


# Reports.


def test_head(reported):
    text = (reported / "report.md").read_text()
    assert text.startswith(f"# {EXPERIMENTS['accuracy'].question}\n")
    assert "`python -m grapes_experiments run accuracy`." in text
    assert "the authors' set-up: dense network; width 256;" in text
    assert "5 seeds, 4 epochs." in text
    edge = "FA, sgd: propagated, not clipped (0.025)"
    assert f"on the edge of the grid for 1 of 12 contenders: {edge}." in text
    assert "missing, in" not in text


def test_accuracies(reported):
    text = (reported / "report.md").read_text()
    table = {row[0]: row[1:] for row in rows(text, "BP, sgd")}
    last = 4 / 4.1
    assert table["plain"][0] == table["plain"][1]
    assert float(table["plain"][0].split(" ±")[0]) == pytest.approx(89 * last, abs=0.01)
    assert table["plain"][2] == "0.2"
    assert float(table["plain"][3].split(" ±")[0]) == pytest.approx(90 * last, abs=0.01)
    spread = 100 * last * JITTER.std(ddof=1)
    assert float(table["local GRAPES"][0].split("± ")[1]) == pytest.approx(spread, abs=0.01)
    table = {row[0]: row[1:] for row in rows(text, "FA, sgd")}
    assert table["plain"][2] == "0.1"
    assert table["plain"][:2] == table["plain"][3:]  # one record serves both
    assert table["propagated, not clipped"][0] == "diverged (2 of 5)"


def test_verdicts(reported):
    text = (reported / "report.md").read_text()
    better, none = "better", "no difference seen"
    found = {
        tuple(row[:3]): row[4::2]
        for row in rows(text, "Difference in final test accuracy, in points")
    }
    bp, fa = "BP, sgd", "FA, sgd"
    assert found == {
        (bp, "local GRAPES", "plain"): [better] * 2,
        (bp, "local GRAPES", "local, mean factor"): [better] * 2,
        (bp, "local GRAPES", "local, neighbour's factor"): [better] * 2,
        (bp, "propagated GRAPES", "plain"): [none] * 2,
        (bp, "propagated GRAPES", "propagated, mean factor"): [none] * 2,
        (bp, "propagated GRAPES", "propagated, neighbour's factor"): [none] * 2,
        (fa, "propagated GRAPES", "plain"): ["worse"] * 2,
        (fa, "propagated GRAPES", "propagated, mean factor"): ["worse"] * 2,
        (fa, "propagated GRAPES", "propagated, neighbour's factor"): ["worse"] * 2,
        (fa, "propagated, not clipped", "plain"): ["diverged (variant 2 of 5)"] * 2,
        (fa, "propagated, not clipped", "propagated, mean factor"): ["diverged (variant 2 of 5)"]
        * 2,
        (fa, "propagated, not clipped", "propagated, neighbour's factor"): [
            "diverged (variant 2 of 5)"
        ]
        * 2,
    }
    counted = {tuple(row[:3]): row[3:] for row in rows(text, "How often")}
    for kind in numbers.KINDS:
        assert counted["final test accuracy", kind, "own best rates"] == ["1", "1", "1", "1"]
    claimed = [row[-1] for row in rows(text, "Better than all controls")]
    assert claimed[:4] == ["yes", "no", "no", "no"]
    short = text.split("\n\n")[1]
    assert (
        "In final test accuracy, GRAPES is better than all its controls in 1 of 4 cases"
        " (panels x variants), and in 3 it is not."
    ) in short
    assert "Of 36 comparisons with an interval, " in short
    assert "about 5 % would (7.5 % with 5 seeds), that is 2.7;" in short


def test_lower_slowness_is_better():
    def quicker(cell, rate, epochs, tasks, seeds):
        epoch = np.arange(1.0 + epochs)[:, None, None]
        slow = (0.1 if cell.variant == "local GRAPES" else 0.3) + np.resize(JITTER, seeds)
        return 0.9 * epoch / (slow + epoch).repeat(tasks, 1)

    lines = lines_of(small(grid=()), quicker)
    units = [lines[i : i + 6] for i in range(1, len(lines), 6)]
    cells = small().cells
    found = [records.record(cells[u["cell"]], u, e) for u, *e in units]
    judged = numbers.comparisons(records.Results(small(grid=()), lines[:1], found))
    words = {(c.variant, c.metric.name, c.kind): c.word for c in judged if c.panel == "BP, sgd"}
    assert words["local GRAPES", "slowness", "mean factor"] == "better"
    assert words["local GRAPES", "final test accuracy", "mean factor"] == "better"
    assert words["propagated GRAPES", "slowness", "mean factor"] == "no difference seen"


def test_claim_needs_every_control():
    first = numbers.Comparison("p", "v", "c", "plain", BEST, numbers.FINAL, 5, (0, 0))
    kinds = [first._replace(kind=kind, word="better") for kind in numbers.KINDS]
    assert numbers.holds(kinds) == "yes"
    assert numbers.holds(kinds[1:]) == "not known"
    assert numbers.holds([*kinds[1:], first._replace(word="worse")]) == "no"
    assert numbers.holds([*kinds[1:], first._replace(diverged=(0, 1))]) == "not known"
    assert numbers.holds([*kinds[1:], first._replace(diverged=(1, 0))]) == "no"


@pytest.mark.slow
def test_reports_are_the_same_to_the_byte(reported, tmp_path):
    report(write(tmp_path, lines_of(small(), made_up)))
    names = sorted(path.name for path in reported.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert {"learning_curves.svg", "learning_curves_best_rates.png", "slowness.svg"} < set(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (reported / name).read_bytes(), name


def test_unfinished_run(tmp_path, capsys):
    lines = lines_of(small(), made_up)
    report(write(tmp_path, lines[:70]))  # the third cell is not tuned yet
    text = (tmp_path / "report.md").read_text()
    assert "10 of 12 cells are missing, in whole or in part: BP, sgd: local, mean factor," in text
    assert "not yet" in text
    assert [row[-1] for row in rows(text, "Better than all controls")][:1] == ["not known"]
    report(write(tmp_path, lines[:3]))
    assert "Nothing is trained yet." in (tmp_path / "report.md").read_text()
    report(write(tmp_path, [lines[0], *lines[:70]]))
    assert "resumed 1 time" in (tmp_path / "report.md").read_text()


def test_nothing_to_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is nothing to report in"):
        report(tmp_path)


PICTURES = {
    "depth": {"depth", "learning_curves"},
    "forgetting": {"matrices", "averages"},
    "spread": {"factors", "histograms", "incoming", "learning_curves"},
    "memory": set(),
}


@pytest.mark.slow
def test_index_and_the_pictures_of_each_experiment(tmp_path, capsys):
    for name in PICTURES:
        wanted = plan(name, "smoke")
        write(tmp_path / name, lines_of(wanted, made_up))
    (tmp_path / "notes").mkdir()
    report(tmp_path)
    for name, pictures in PICTURES.items():
        found = {path.stem for path in (tmp_path / name).glob("*.svg")}
        assert found == {path.stem for path in (tmp_path / name).glob("*.png")} == pictures
        linked = re.findall(r"!\[.*\]\((.*)\.png\)", (tmp_path / name / "report.md").read_text())
        assert set(linked) == pictures
    index = (tmp_path / "README.md").read_text()
    listed = {row[0]: row[1:] for row in rows(index, "Experiments")}
    assert list(listed) == [f"[{name}]({name}/report.md)" for name in sorted(PICTURES)]
    assert listed["[memory](memory/report.md)"][0] == EXPERIMENTS["memory"].question
    assert listed["[forgetting](forgetting/report.md)"][3] == "10"
    assert "Verdicts over all runs" in index
    assert "In 5 of 5 combinations" in (tmp_path / "memory" / "report.md").read_text()
    factors = rows((tmp_path / "spread" / "report.md").read_text(), "Factors")
    assert factors[0][:3] == ["heavy tails", "plain", "Dense_0/kernel"]
    assert factors[0][3:] == ["1.800", "1.780", "0.050", "0.054", "12.5", "12.5"]


@pytest.mark.slow
def test_largest_picture_stays_small(tmp_path):
    wanted = plan("accuracy")._replace(grid=(), scale=Scale(10, 60, 0, 0))
    results = records.read(write(tmp_path, lines_of(wanted, made_up)))
    with matplotlib.rc_context(figures.SETTINGS):
        figures.save(figures.learning_curves(results, SAME), tmp_path / "all")
    assert (tmp_path / "all.svg").stat().st_size < 150_000
