"""Reports of small runs that are made up, with answers that are known."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grapes_experiments import figures, records
from grapes_experiments.cells import Cell
from grapes_experiments.experiments import EXPERIMENTS, Choice, Plan, plan
from grapes_experiments.records import REPORT, TUNING
from grapes_experiments.report import CLAIMS, report
from grapes_experiments.variants import LOCAL, PLAIN, PROPAGATED

RUN = {
    "kind": "run",
    "command": "python -m grapes_experiments run accuracy",
    "versions": {"python": "3.11", "jax": "0.10"},
    "commit": "abc",
    "device": "cpu (cpu), 2 cores",
}
IMAGES = 10_000
Accuracy = Callable[[Cell, float, int], float]  # of a cell, a rate and a seed, at the end


def layers(epoch: int) -> dict:
    histogram = np.histogram(np.linspace(0.8 + epoch / 100, 2, 50), np.linspace(0, 2, 41))[0]
    found = {
        "factor_mean": 1.8 - epoch / 100,
        "factor_std": 0.05,
        "at_lower_bound": 0.125,
        "histogram": histogram.tolist(),
    }
    return {f"params/Dense_{layer}/kernel": found for layer in range(2)}


def unit(wanted: Plan, index: int, phase: str, rates: list[float], accuracy: Accuracy) -> list:
    """From chance to the accuracy at the end; None stands for what diverged."""
    scale, cell, tasks = wanted.scale, wanted.cells[index], wanted.tasks
    seeds = list(range(1000, 1000 + scale.tuning_seeds) if phase == TUNING else range(scale.seeds))
    last = scale.epochs * tasks
    lines: list[dict] = [
        {
            **{"kind": "unit", "cell": index, "phase": phase, "rates": rates, "seeds": seeds},
            **{"epochs": last, "images": IMAGES, "parameter_bytes": 1000},
            "state_bytes": 8 * (cell.setup.optimizer == "adam"),
        }
    ]
    ends = np.array([[accuracy(cell, rate, seed) for seed in seeds] for rate in rates])
    lost = np.argwhere(np.isnan(ends)).tolist()
    ends = np.nan_to_num(ends, nan=0.1)
    for epoch in range(1 + last):
        line = {"kind": "epoch", "epoch": epoch}
        now = 0.1 + (ends - 0.1) * (epoch / (0.3 + epoch)) * ((0.3 + last) / max(last, 1))
        line["correct"] = (IMAGES * now[:, None].repeat(tasks, 1)).round().astype(int).tolist()
        if epoch:
            length = 1.5 if cell.variant.is_grapes else 1.0
            line |= {"seconds": 0.5, "loss": [1.0] * len(rates), "diverged": lost}
            line["steps"] = {"params/Dense_0/kernel": [length] * len(rates)}
        if wanted.observe and phase == REPORT and epoch in (0, last):
            line["layers"] = layers(epoch)
        lines.append(line)
    return lines


def write(folder: Path, wanted: Plan, accuracy: Accuracy, cells: int | None = None) -> Path:
    """The file of a run whose tuning finds what `accuracy` says."""
    lines: list[dict] = [{**RUN, "plan": records.as_json(wanted)}]
    for index, cell in list(enumerate(wanted.cells))[:cells]:
        rates = [cell.setup.rate]
        if wanted.grid:
            tried = [cell.setup.rate * factor for factor in wanted.grid]
            tuned = unit(wanted, index, TUNING, tried, accuracy)
            lines += tuned
            found = records.choice(records.record(cell, tuned[0], tuned[1:], 10))
            rates += [rate for rate in records.candidates(found) if rate not in rates]
        lines += unit(wanted, index, REPORT, rates, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / records.NAME).write_text("".join(map(records.compact, lines)))
    return folder


def noise(cell: Cell, seed: int, deviation: float = 0.001) -> float:
    rng = np.random.default_rng([seed, abs(hash(cell.name)) % 1000, 5])
    return float(rng.normal(0, deviation))


@pytest.fixture(autouse=True)
def fixed_hash(monkeypatch):
    """Of names, which Python draws anew in every process."""
    names = {}
    monkeypatch.setitem(globals(), "hash", lambda name: names.setdefault(name, 37 * len(names)))


def small(name: str = "accuracy", dataset: str = "mnist", **changed) -> Plan:
    choice = Choice(rules=["BP"], optimizers=["sgd"])
    return plan(name, dataset=dataset, choice=choice, epochs=4, **changed)


def usual(cell: Cell, rate: float, seed: int) -> float:
    """GRAPES gains two points at the common rate, its controls as much; the best rate is 0.2."""
    gain = 0.02 * (cell.variant != PLAIN) * (rate < 0.2)
    return 0.9 + gain + 0.03 * (rate == 0.2) - 0.05 * (rate > 0.2) + noise(cell, seed)


def text_of(folder: Path) -> str:
    report(folder)
    return (folder / "report.md").read_text()


def row(text: str, *cells: str) -> list[str]:
    """The one row of a table that begins so."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (only,) = {tuple(line) for line in found if tuple(line[: len(cells)]) == cells}
    return list(only)


def section(text: str, title: str) -> str:
    after = text.split(f"# {title}")[1]
    return after.split("\n## ")[0].split("\n### ")[0]


def test_report_of_a_gain_that_every_control_has(tmp_path):
    text = text_of(write(tmp_path, small(), usual))
    title, verdict, *_ = text.split("\n\n")
    assert title == f"# {EXPERIMENTS['accuracy'].question}"
    assert "better than plain training and than every control in 0 of 2 cases" in verdict
    assert "in 2 plain training or a control is as good or better, 0 are open." in verdict
    table = section(text, "Difference in final test accuracy, in points")
    plain = row(table, "BP, sgd", "propagated GRAPES", "plain")
    assert float(plain[3].split()[0]) == pytest.approx(2, abs=0.2)
    assert plain[4] == "better"
    assert float(plain[5]) < 0.3
    assert plain[7] == "equivalent"
    assert row(table, "BP, sgd", "local GRAPES", "local, equal step")[4] == "equivalent"
    values = section(text, "BP, sgd")
    assert row(values, "plain")[-2:] == ["0.2", "0.2: 100%"]
    assert "The best is the one" in text
    assert "for 0 of 13" in text
    assert row(section(text, "Length of the steps"), "BP, sgd", "plain")[2] == "0.667"
    assert row(section(text, "Does it help?"), "BP, sgd", "local GRAPES")[-1] == "no"


def test_numbers_are_those_of_the_file(tmp_path):
    folder = write(tmp_path, small(tuned=False), usual)
    found = records.read(folder).report
    one, other = (
        100 * next(r for c, r in found.items() if c.variant == v).accuracy[-1, 0, 0]
        for v in (PROPAGATED, PLAIN)
    )
    mean = (one - other).mean()
    reach = 2.262157 * (one - other).std(ddof=1) / np.sqrt(10)  # Student's t of 9
    table = section(text_of(folder), "Difference in final test accuracy, in points")
    text = row(table, "BP, sgd", "propagated GRAPES", "plain")[3]
    assert text == f"{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]"
    assert f"{other.mean():.2f} ± {other.std(ddof=1):.2f}" in text_of(folder)


def test_too_few_seeds_are_the_first_thing_that_is_told(tmp_path):
    text = text_of(write(tmp_path, small(seeds=5, tuned=False), usual))
    assert text.split("\n\n")[1].startswith("**Too few seeds**: 5 seeds")
    assert "better" not in section(text, "Difference in final test accuracy, in points")


def test_rates_on_the_edge_are_told(tmp_path):
    def rising(cell, rate, seed):
        return 0.5 + rate / 10 + noise(cell, seed)

    text = text_of(write(tmp_path, small(), rising))
    assert "It lies on the edge for 13 of 13: BP, sgd: plain (0.8)" in text
    outcomes = section(text, "Difference in final test accuracy, in points")
    assert row(outcomes, "BP, sgd", "local GRAPES", "plain")[-2] == "edge of the rates"


def test_diverged_seeds_are_told(tmp_path):
    def wild(cell, rate, seed):
        if cell.variant == PROPAGATED or (cell.variant == LOCAL and seed < 3):
            return np.nan
        return usual(cell, rate, seed)

    text = text_of(write(tmp_path, small(tuned=False), wild))
    table = section(text, "Difference in final test accuracy, in points")
    found = row(table, "BP, sgd", "propagated GRAPES", "plain")
    assert found[4] == "worse (GRAPES 10/10 diverged)"
    assert float(found[3].split()[0]) == pytest.approx(-80, abs=0.2)  # chance
    assert "GRAPES 3/10 diverged" in row(table, "BP, sgd", "local GRAPES", "plain")[4]
    assert "(10/10 diverged)" in row(section(text, "BP, sgd"), "propagated GRAPES")[1]


def test_unfinished_run(tmp_path):
    text = text_of(write(tmp_path, small(tuned=False), usual, cells=5))
    assert "* **Not finished**: 8 of 13 cells are missing: BP, sgd: local, neighbour's" in text
    assert row(section(text, "BP, sgd"), "propagated GRAPES")[1] == "not yet"


def test_nothing_is_trained_yet(tmp_path):
    text = text_of(write(tmp_path, small(), usual, cells=0))
    assert "Nothing is trained yet." in text


def test_steps_of_networks_of_several_depths_are_under_their_layers(tmp_path):
    folder = write(tmp_path, small("depth", tuned=False), usual)
    lines = records.lines_of(folder / records.NAME)
    wanted, depth = records.read(folder).plan, 0
    for line in lines:
        if line["kind"] == "unit":
            depth = wanted.cells[line["cell"]].setup.depth
        if "steps" in line:
            (lengths,) = line["steps"].values()
            layers = [*(f"Dense_{n}" for n in range(depth)), "output"]
            line["steps"] = {
                f"params/{layer}/kernel": [x * (1 if x == 1.5 else 1 + n) for x in lengths]
                for n, layer in enumerate(layers)
            }
    (folder / records.NAME).write_text("".join(map(records.compact, lines)))
    table = section(text_of(folder), "Length of the steps")
    assert row(table, "panel")[2:] == [*(f"Dense_{n}" for n in range(8)), "output"]
    assert row(table, "depth 1", "plain")[2:] == ["0.667", *[""] * 7, "1.333"]
    assert row(table, "depth 2", "plain")[2:] == ["0.667", "1.333", *[""] * 6, "2.000"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_report_and_small_pictures(name, tmp_path):
    def forgetful(cell, rate, seed):
        return usual(cell, rate / cell.setup.rate / 10, seed)

    folder = write(tmp_path, small(name), forgetful)
    text = text_of(folder)
    drawn = sorted(path.name for path in folder.glob("*.png"))
    wanted = figures.PICTURES.get(name, figures.USUAL)
    assert drawn == sorted(f"{picture.name}.png" for picture in wanted)
    for picture in drawn:
        assert f"]({picture})" in text
        assert (folder / picture).stat().st_size < 60_000
        with Image.open(folder / picture) as image:
            assert image.mode == "P"
            assert image.width > 500


def test_memory(tmp_path):
    wanted = plan("memory")
    text = text_of(write(tmp_path, wanted, lambda *_: 0.1))
    assert "In 10 of 10 combinations" in text.split("\n\n")[1]


def test_index_of_several_runs(tmp_path):
    for dataset in "digits", "mnist", "fashion_mnist":
        write(tmp_path / f"accuracy-{dataset}", small(dataset=dataset), usual)
    write(tmp_path / "memory-digits", plan("memory"), lambda *_: 0.1)
    report(tmp_path)
    text = (tmp_path / "README.md").read_text()
    claim = row(text, CLAIMS[0].text)
    assert len(claim) == 4
    for name, cell in zip(("digits", "fashion_mnist", "mnist"), claim[1:], strict=True):
        cell = cell.replace("\N{NO-BREAK SPACE}", " ")
        assert cell.startswith("propagated: ▲ = / = =<br>local: ▲ = / = =<br>")
        assert f"(accuracy-{name}/report.md)" in cell
    over_all = row(text, "propagated against plain, common rate")
    assert over_all[1] == "3"
    assert float(over_all[2].split()[0]) == pytest.approx(2, abs=0.2)
    assert (tmp_path / "forest.png").exists()
    assert row(text, "[memory-digits](memory-digits/report.md)")[-1].startswith("In 10 of 10")


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to report"):
        report(tmp_path)
