"""Every example in a form of seconds, its results against what a broken rule misses."""

import importlib
import re
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from examples import digits
from examples.data import load

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


class Case(NamedTuple):
    options: str
    floor: float  # of the accuracy in % after the last epoch


# Chance is 10 %, and so are gradients of zero. Where the hidden layers stay as they are and only
# the readout learns, digits reaches 85 %.
CASES = {
    "digits": Case("--epochs=5", 93),
}


def run(example, options, folder, capsys):
    """Rows of the table: a name, and what is before ± in the columns."""
    importlib.import_module(f"examples.{example}").main([*options.split(), f"--out={folder}"])
    rows = re.findall(r"^\| (\S.*?) +\|(.*)", capsys.readouterr().out, re.M)
    numbers = {name: re.findall(r"(\S+) ±", cells) for name, cells in rows}
    return {name: [float(x) for x in row] for name, row in numbers.items() if row}


@pytest.mark.slow
@pytest.mark.parametrize("example", CASES)
def test_example(example, tmp_path, capsys):
    module, case = importlib.import_module(f"examples.{example}"), CASES[example]
    rows = run(example, f"--seeds=2 {case.options}", tmp_path, capsys)
    assert [name for name in rows if " minus " not in name] == list(module.METHODS)
    for name in module.METHODS:
        assert rows[name][-1] > case.floor, name
    for name in rows.keys() - module.METHODS.keys():
        method, other = name.split(" minus ")
        difference = np.subtract(rows[method], rows[other])
        np.testing.assert_allclose(rows[name], difference, atol=0.011, err_msg=name)
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("example", CASES)
def test_one_method_runs_beside_plain_on_the_same_weights_and_batches(example, tmp_path, capsys):
    options = "--seeds=2 --epochs=1 --method=local"
    first = run(example, options, tmp_path, capsys)
    assert list(first) == ["plain", "local", "local minus plain"]
    assert first == run(example, options, tmp_path, capsys)


@pytest.mark.parametrize("example", CASES)
@pytest.mark.parametrize("option", ["--seeds=1", "--epochs=0", "--epochs=x", "--method=grapse"])
def test_example_refuses(example, option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(example, option, tmp_path, capsys)
    assert "error: " in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoint_of_digits_holds_the_network_of_the_table(tmp_path, capsys):
    rows = run("digits", "--seeds=2 --epochs=1 --method=plain", tmp_path, capsys)
    data, accuracies = load(), []
    for seed in range(2):
        model = digits.MLP(64, 10, nnx.Rngs(99))
        optimizer = nnx.Optimizer(model, digits.METHODS["plain"][0], wrt=nnx.Param)
        state = nnx.state((model, optimizer))
        with ocp.StandardCheckpointer() as saver:
            nnx.update((model, optimizer), saver.restore(tmp_path / f"plain-{seed}", state))
        accuracies.append(100 * (model(data.test_images).argmax(-1) == data.test_labels).mean())
    assert rows["plain"][-1] == pytest.approx(np.mean(accuracies), abs=0.006)
