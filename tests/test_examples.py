"""Every example in a form of seconds, its accuracy against a floor that a broken rule misses."""

import re
import sys

import jax
import matplotlib
import pytest

from examples import digits

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _promotion_of_flax():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_digits(tmp_path, monkeypatch, capsys):
    options = ["--seeds=2", "--epochs=5", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["digits", *options])
    digits.main()
    rows = re.findall(r"^\| (\S.*?) +\| .* \| +([\d.]+) ±", capsys.readouterr().out, re.M)
    assert [name for name, _ in rows] == list(digits.methods(0.1))
    for name, accuracy in rows:
        assert float(accuracy) > {"BP": 90, "FA": 80, "DFA": 80}[name.split(":")[0]], name
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("options", [["--seeds=1"], ["--epochs=0"], ["--epoch=x"]])
def test_digits_refuses(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits", *options])
    with pytest.raises(SystemExit, match="2"):
        digits.main()
    assert "error: " in capsys.readouterr().err
