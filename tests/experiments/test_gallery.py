"""The code of the recipes prints what their pages say it prints; the notebooks run and draw."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
RECIPES, NOTEBOOKS = (sorted((DOCS / name).glob("*.md")) for name in ("recipes", "gallery"))
NOTEBOOKS = [page for page in NOTEBOOKS if page.read_text().startswith("---\njupytext:")]
# Code, and what it prints, which follows in a block without a language.
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n+^```\n(.*?)^```$)?", re.M | re.S)
CELL = re.compile(r"^```\{code-cell\} ipython3\n(?::tags: .*?\n\n)?(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[+-]?\d+(?:\.(\d+))?(?:e[+-]?\d+)?")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)")


def check_printed(printed, shown, where):
    """Words as they are, numbers to two units of the last decimal: machines round differently."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), where
    for one, other in zip(NUMBER.finditer(printed), NUMBER.finditer(shown), strict=True):
        unit = 10.0 ** -len(other[1]) if other[1] else 0  # whole numbers are exact
        np.testing.assert_allclose(
            float(one[0]), float(other[0]), rtol=1e-9, atol=2 * unit, err_msg=where
        )


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_of_frameworks")
@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_recipes_print_what_they_say(page, capsys):
    names = {"__name__": "__main__"}
    for number, (code, shown) in enumerate(BLOCK.findall(page.read_text()), 1):
        where = f"{page.name}, block {number}"
        exec(compile(code, where, "exec"), names)
        check_printed(capsys.readouterr().out, shown, where)


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_of_frameworks")
@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_notebooks_run_and_draw(page, capsys):
    names = {"__name__": "__main__"}
    try:
        with plt.rc_context():
            for number, code in enumerate(CELL.findall(page.read_text()), 1):
                exec(compile(code, f"{page.name}, cell {number}", "exec"), names)
            figures = [plt.figure(number) for number in plt.get_fignums()]
            for figure in figures:
                figure.canvas.draw()
    finally:
        plt.close("all")
    assert len(figures) >= 2
    drawn = [(figure, ax) for figure in figures for ax in figure.axes if ax.has_data()]
    for figure, ax in drawn:
        labels = ax.get_xlabel(), ax.get_ylabel(), figure.get_supxlabel(), ax.get_title()
        assert any(labels), page.name
    printed = capsys.readouterr().out
    assert re.search(r"\d", printed)
    assert "nan" not in printed.split()


def test_every_page_has_code_that_is_run():
    assert len(RECIPES) >= 18
    assert len(NOTEBOOKS) >= 6
    for page in RECIPES:
        text = page.read_text()
        assert len(BLOCK.findall(text)) == text.count("\n```python\n") > 0, page.name
    for page in NOTEBOOKS:
        text = page.read_text()
        assert len(CELL.findall(text)) == text.count("\n```{") > 1, page.name


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*RECIPES, *NOTEBOOKS], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        path = (page.parent / target).resolve()
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_ruler():
    """Prints that differ are told from those that agree."""
    check_printed("loss 0.512, 3 of 4\n", "loss  0.511, 3 of 4\n", "")
    for other in ("loss 0.515", "error 0.512", "loss 0.512 0.512", "", "loss 1"):
        with pytest.raises(AssertionError):
            check_printed("loss 0.512", other, "")
    with pytest.raises(AssertionError):
        check_printed("(64, 128)", "(64, 127)", "")
    assert BLOCK.findall("```python\nprint(1)\n```\n\n```\n1\n```\n") == [("print(1)\n", "1\n")]
