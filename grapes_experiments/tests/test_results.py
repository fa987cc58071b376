"""The committed results: every number of their reports follows from the lines of the runs."""

from pathlib import Path

import pytest

from grapes_experiments import figures, records
from grapes_experiments import report as reports
from grapes_experiments.statistics import YES, claims, comparisons

RESULTS = Path(__file__).parents[2] / "docs" / "results"
UNFINISHED = {"spiking-mnist"}  # cut off, and its report says so
FOLDERS = sorted(path.parent for path in RESULTS.glob(f"*/{records.NAME}"))
pytestmark = pytest.mark.skipif(
    not RESULTS.exists(), reason="docs/results is in the repository alone"
)


@pytest.fixture
def without_pictures(monkeypatch):
    """They are drawn, which can fail, but not rendered, which takes long."""
    monkeypatch.setattr(figures, "save", lambda figure, path: None)


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_report_follows_from_the_lines(folder, tmp_path, without_pictures):
    (tmp_path / records.NAME).write_bytes((folder / records.NAME).read_bytes())
    reports.report(tmp_path)
    expected = (folder / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == expected
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {f"{name}.png" for name in figures.draw(records.read(folder), tmp_path)}
    assert {path.stem for path in folder.glob("*.svg")} == {name[:-4] for name in drawn}
    assert all(f"]({name})" in expected for name in drawn)


@pytest.mark.slow
def test_index_follows_from_the_lines(tmp_path, without_pictures):
    for folder in FOLDERS:
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / records.NAME).symlink_to(folder / records.NAME)
    reports.report(tmp_path)
    assert (tmp_path / "README.md").read_text() == (RESULTS / "README.md").read_text()


def test_results_are_whole():
    assert FOLDERS
    for folder in FOLDERS:
        found = records.read(folder)
        assert not reports.missing(found) or folder.name in UNFINISHED
        assert found.plan.scale.seeds >= 5 or found.plan.experiment == "memory"
        assert found.plan.preset == "standard"
        for run in found.runs:
            assert run["commit"].isalnum(), "of a checkout that was changed"
            assert "--out" not in run["command"]


@pytest.mark.slow
def test_where_grapes_is_better_than_all_its_controls():
    """The page says where, and that it is nowhere else."""
    found = set()
    for folder in FOLDERS:
        results = records.read(folder)
        for claim in claims(results, comparisons(results)):
            if claim.holds == YES:
                found.add((folder.name, claim.panel, claim.variant, claim.metric.name))
    assert found == {
        ("spread-digits-replication", "pruned 95 %", "local GRAPES", "final test accuracy")
    }


def test_page_quotes_the_reports():
    """Each row of its tables is a row of some report, whatever the widths of the columns."""

    def rows(text: str) -> set[tuple[str, ...]]:
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return {
            tuple(cell.strip() for cell in line.split("|")) for line in lines if "-|-" not in line
        }

    reported = set().union(*(rows(path.read_text()) for path in RESULTS.glob("**/*.md")))
    quoted = rows((RESULTS.parent / "does_it_help.md").read_text())
    assert quoted
    assert not quoted - reported
