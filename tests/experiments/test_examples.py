"""Every example in a form of seconds, its results against what a broken rule misses."""

import importlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import grapes_optax
from examples import chain, digits, language, recurrent
from examples.data import load

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


class Case(NamedTuple):
    options: str
    floor: float  # of the accuracy in % after the last epoch


# Chance is 10 %, and so are gradients of zero. The floors lie above what is reached where factors
# are zero, so that hidden layers stay as they are, and far above what negative ones reach.
CASES = {
    "digits": Case("--epochs=5", 93),
    "resnet": Case("--epochs=1", 80),
    "recurrent": Case("--epochs=4", 70),
    "spiking": Case("--epochs=1", 86.5),
    "chain": Case("--epochs=2", 91),
}


def run(example, options, folder, capsys):
    """Rows of the table: a name, and what is before ± in the columns."""
    importlib.import_module(f"examples.{example}").main([*options.split(), f"--out={folder}"])
    printed = capsys.readouterr().out
    assert f"\nWrote {folder}/" in printed
    rows = re.findall(r"^\| (\S.*?) +\|(.*)", printed, re.M)
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


@pytest.mark.parametrize("example", [*CASES, "language", "feedback"])
def test_example_that_cannot_write_does_not_train(example, tmp_path, monkeypatch):
    module, taken = importlib.import_module(f"examples.{example}"), tmp_path / "taken"
    taken.touch()
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("it trains"))
    with pytest.raises(FileExistsError, match="taken"):
        module.main([f"--out={taken}"])


@pytest.mark.slow
@pytest.mark.parametrize("example", ["digits", "chain"])
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


@pytest.mark.slow
def test_language(tmp_path, capsys):
    """Bits per character: 7 of no knowledge, 4.8 of the frequencies of the characters."""
    rows = run("language", "--seeds=2 --epochs=1", tmp_path, capsys)
    assert [name for name in rows if " minus " not in name] == list(language.METHODS)
    for name in language.METHODS:
        assert rows[name][-1] < 3.9, name
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000


def test_language_sees_the_past_alone():
    model = language.GPT(nnx.Rngs(0))
    codes = np.array(language.WINDOWS[:1, :-1])
    before, codes[0, 20] = model(codes), 0
    changed = np.abs(before - model(codes)).max(-1)[0] > 0
    np.testing.assert_array_equal(changed, np.arange(language.CONTEXT) >= 20)


@pytest.mark.slow
def test_local_and_propagated_are_the_same_in_one_recurrent_layer(tmp_path, capsys):
    for cell in recurrent.CELLS:
        rows = run("recurrent", f"--seeds=2 --epochs=1 --cell={cell}", tmp_path, capsys)
        assert rows["propagated minus local"] == [0, 0], cell


def test_chain_multiplies_the_decay_where_grapes_comes_behind_it():
    params = nnx.state(chain.MLP(nnx.Rngs(0)), nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)
    taken = {}
    for name, parts in chain.METHODS.items():
        tx = optax.chain(*parts)
        taken[name], _ = tx.update(zeros, tx.init(params), params)
    for name in "plain", "local", "mean":
        jax.tree.map(lambda u, p: np.testing.assert_allclose(u, 1e-3 * p), taken[name], params)
    kernel = params["hidden1"]["kernel"][...]
    factor = grapes_optax.importance_factor(kernel)
    expected = 1e-3 * kernel * np.expand_dims(factor, 0)
    np.testing.assert_allclose(taken["behind"]["hidden1"]["kernel"][...], expected, rtol=1e-6)
    assert 1.3 < factor.mean() < 1.9


@pytest.mark.slow
def test_chain_logs_the_factors(tmp_path, capsys):
    run("chain", "--seeds=2 --epochs=2 --method=local", tmp_path, capsys)
    for name in "plain", "local":
        rows = np.loadtxt(tmp_path / f"{name}.csv", delimiter=",")
        assert rows.shape == (4, 7)
        for low, mean, high in (*rows[:, 1:4], *rows[:, 4:]):
            assert 1 <= low < mean < high == 2
