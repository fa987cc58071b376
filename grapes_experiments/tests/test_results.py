"""The committed results: every number of their reports follows from the lines of the runs."""

from pathlib import Path

import pytest

from grapes_experiments import figures, records
from grapes_experiments import report as reports
from grapes_experiments.statistics import (
    BEST,
    BETTER,
    EQUIVALENT,
    FEWEST,
    FINAL,
    OPEN,
    YES,
    claims,
    comparisons,
    curve,
)
from grapes_experiments.variants import PLAIN, PROPAGATED

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{records.NAME}"))
pytestmark = pytest.mark.skipif(
    not RESULTS.exists(), reason="docs/results is in the repository alone"
)


@pytest.fixture
def without_pictures(monkeypatch):
    """They are drawn, which can fail, but not rendered, which takes long."""
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


@pytest.mark.slow
def test_reports_follow_from_the_lines(tmp_path, without_pictures):
    for folder in FOLDERS:
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / records.NAME).symlink_to(folder / records.NAME)
    reports.report(tmp_path)
    for page in ["README.md", *(f"{folder.name}/report.md" for folder in FOLDERS)]:
        assert (tmp_path / page).read_text() == (RESULTS / page).read_text(), page
    for folder in FOLDERS:
        text = (folder / "report.md").read_text()
        drawn = {path.name for path in folder.iterdir()} - {records.NAME, "report.md"}
        assert drawn == {f"{name}.png" for name in figures.draw(records.read(folder), tmp_path)}
        assert all(f"]({name})" in text for name in drawn)


def test_results_are_small_and_of_committed_code():
    assert FOLDERS
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) <= 3e6
    for folder in FOLDERS:
        found = records.read(folder)
        assert found.plan.scale.seeds >= FEWEST or found.plan.experiment == "memory"
        for run in found.runs:
            assert run["commit"].isalnum(), "of a checkout that was changed"
            assert "--out" not in run["command"]


@pytest.mark.slow
def test_grapes_is_nowhere_better_than_all_its_controls():
    """As the page says."""
    found = set()
    for folder in FOLDERS:
        results = records.read(folder)
        for claim in claims(comparisons(results)):
            if claim.holds == YES:
                found.add((folder.name, claim.cell.panel, claim.cell.name, claim.metric.name))
    assert found == set()


def rows(text: str) -> set[tuple[str, ...]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {tuple(cell.strip() for cell in line.split("|")) for line in lines if "-|-" not in line}


def test_page_quotes_the_reports():
    """Each row of its tables is a row of some report, whatever the widths of the columns."""
    reported = set()
    for path in RESULTS.glob("**/*.md"):
        # Links of the index are seen from the page above it.
        reported |= rows(path.read_text().replace("](", "](results/"))
        reported |= rows(path.read_text())
    quoted = rows((RESULTS.parent / "does_it_help.md").read_text())
    assert quoted
    assert not quoted - reported


def test_numbers_in_the_prose_of_the_page():
    text = " ".join((RESULTS.parent / "does_it_help.md").read_text().split())
    found = [c for folder in FOLDERS for c in comparisons(records.read(folder))]
    outcomes = [
        c.outcome
        for c in found
        if (c.kind, c.phase, c.metric, c.repeated) == ("reverse", BEST, FINAL, False)
    ]
    better, equal, unclear = map(outcomes.count, (BETTER, EQUIVALENT, OPEN))
    assert better + equal + unclear == len(outcomes)
    assert (
        f"better than its reversal in {better} of {len(outcomes)} comparisons, equivalent in"
        f" {equal}, and {unclear} are inconclusive" in text
    )
    by_variant = {
        cell.variant: record
        for cell, record in records.read(RESULTS / "length-mnist").report.items()
    }
    gain = 100 * (curve(by_variant[PROPAGATED]) - curve(by_variant[PLAIN])).mean(1)
    assert (
        f"{gain[1]:.2f} points ahead of plain training after the first epoch and"
        f" {gain[-1]:.2f} points after the last" in text
    )
    cells = records.read(RESULTS / "finetuning-digits").report.items()
    layers = [
        layer
        for cell, record in cells
        if cell.panel == "transferred"  # He's initial weights, trained: a usual network
        for observed in record.layers
        for layer in observed.values()
    ]
    means, deviations = ([layer[f"factor_{of}"] for layer in layers] for of in ("mean", "std"))
    assert f"factors are {min(means):.1f} to {max(means):.1f} on average" in text
    assert f"standard deviation is {min(deviations):.2f} to {max(deviations):.2f}" in text
