"""The code of the recipes prints what their pages say it prints; the notebooks run and draw."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.md"))
NOTEBOOKS = sorted(
    page
    for page in (DOCS / "gallery").glob("*.md")
    if page.read_text().startswith("---\njupytext:")
)
# Code, and what it prints, which follows in a block without a language.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```\n(.*?)^```$)?", re.M | re.S)
CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[+-]?\d+(?:\.(\d+))?(?:e[+-]?\d+)?")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promotion_of_frameworks")]


def check_printed(printed, shown, where):
    """Words as they are, numbers to two units of the last digit shown; machines round differently."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), where
    for one, other in zip(NUMBER.finditer(printed), NUMBER.finditer(shown), strict=True):
        decimals = len(other[1] or "")
        unit = 2 * 10.0**-decimals if decimals else 0
        np.testing.assert_allclose(float(one[0]), float(other[0]), 1e-9, unit, err_msg=where)


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_recipes_print_what_they_say(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, (code, shown) in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
        check_printed(capsys.readouterr().out, shown, f"{page.name}, block {number}")


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_notebooks_run_and_draw(page, capsys):
    names = {"__name__": "__main__"}
    try:
        for number, code in enumerate(CELL.findall(page.read_text()), 1):
            exec(compile(code, f"{page.name}, cell {number}", "exec"), names)
        figures = [plt.figure(number) for number in plt.get_fignums()]
        assert figures, page.name
        for figure in figures:
            figure.canvas.draw()
        drawn = [ax for figure in figures for ax in figure.axes if ax.has_data()]
        assert drawn
        assert all(ax.get_xlabel() or ax.get_ylabel() for ax in drawn), page.name
    finally:
        plt.close("all")
    assert "nan" not in capsys.readouterr().out.split(), page.name


def test_ruler():
    """Prints that differ are told from those that agree."""
    check_printed("loss 0.512\n", "loss  0.511\n", "")
    for other in ("loss 0.515", "error 0.512", "loss 0.512 0.512", "", "loss 1"):
        with pytest.raises(AssertionError):
            check_printed("loss 0.512", other, "")
    assert BLOCK.findall("```python\nprint(1)\n```\n\n```\n1\n```\n") == [("print(1)\n", "1\n")]
