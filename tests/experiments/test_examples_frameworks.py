"""The examples in the frameworks, of feedback alignment, and of a mesh, in a form of seconds."""

import importlib
import re

import pytest

from examples import feedback, sharded

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promotion_of_frameworks")]

# Accuracy after three epochs in %; chance is 10.
FLOORS = {"linen": 87, "equinox": 77, "haiku": 87, "jax": 87, "spyx": 65}


def rows(capsys):
    """Of the printed table, without its head: the first cell, and the numbers of every other."""
    _, *lines = re.findall(r"^\| (.*?) *\| +(.*) \|$", capsys.readouterr().out, re.M)
    return {
        name: [re.findall(r"[-+\d.]+(?:e[-+]\d+)?", cell) for cell in x.split("|")]
        for name, x in lines
    }


@pytest.mark.parametrize("method", ["local", "propagated"])
@pytest.mark.parametrize(
    "framework",
    [pytest.param(f, marks=[pytest.mark.slow] * (f == "spyx")) for f in FLOORS],
)
def test_framework(framework, method, capsys):
    example = importlib.import_module(f"examples.digits_{framework}")
    assert list(example.METHODS) == ["plain", "local", "mean", "propagated", "propagated-mean"]
    example.main(["--epochs=3", "--seeds=2", f"--method={method}"])
    table = rows(capsys)
    assert list(table) == ["plain", method, f"{method} minus plain"]
    *accuracies, (first, last) = table.values()
    for _, (mean, _) in accuracies:
        assert float(mean) > FLOORS[framework]
    assert {*first, *last} - {"+0.00", "0.00"}, "the method is plain training"


@pytest.mark.parametrize("method", ["FA-grapes", "DFA"])
def test_feedback(method, tmp_path, capsys):
    feedback.main(["--epochs=4", "--seeds=2", f"--method={method}", f"--out={tmp_path}"])
    (backpropagation, *zeros), (aligned, *angles) = rows(capsys).values()
    assert float(backpropagation[0]) > 90
    assert float(aligned[0]) > 82
    assert all(float(number) == 0 for cell in zeros for number in cell)
    for angle, _ in angles:  # neither the gradient itself nor what chance gives
        assert 30 < float(angle) < 85
    assert (tmp_path / "alignment.png").stat().st_size > 10_000


def test_sharded(capsys):
    sharded.main(["--epochs=1", "--method=local"])
    ((accuracy,), parts, (difference,)) = rows(capsys)["local"]
    assert float(accuracy) > 80
    assert parts == ["16", "64", "64", "32", "64", "10"]
    assert float(difference) < 1e-4


@pytest.mark.parametrize("example", [feedback, *FLOORS])
@pytest.mark.parametrize("option", ["--epochs=0", "--seeds=1", "--method=best"])
def test_refuses(example, option, capsys):
    if isinstance(example, str):
        example = importlib.import_module(f"examples.digits_{example}")
    with pytest.raises(SystemExit, match="2"):
        example.main([option])
    assert "error: " in capsys.readouterr().err
