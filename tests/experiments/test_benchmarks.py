"""The benchmark of steps on a tiny network: what it counts, and what it writes."""

import json

import jax
import numpy as np
import pytest

from benchmarks import networks, step
from benchmarks.timing import seconds_side_by_side
from grapes_optax import by_path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(step, "NETWORKS", {"tiny": lambda: networks.mlp(2, 32)})
    monkeypatch.setattr(step, "COPIED", 2**16)


def test_step_is_counted_timed_and_drawn(tmp_path, capsys):
    # As a program of its own: Adam counts steps in integers, and biases have fewer axes.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step.main(["--rounds=2", "--batch=4", f"--output={tmp_path}"])
    result = json.loads((tmp_path / "step.json").read_text())
    found = {(r["kind"], r["dtype"], r["optimizer"]): r for r in result["records"]}
    assert set(found) == {
        (kind, dtype, name)
        for kind, names in step.KINDS.items()
        for dtype in step.DTYPES
        for name in names
    }
    grapes = found["optimizer", "float32", "grapes + sgd"]
    # Node vectors are written and read beside the kernels: of 32 inputs they are not small.
    assert 4 < grapes["bytes"] < 4.3
    assert grapes["state"] == 0
    assert found["optimizer", "float32", "sgd"]["bytes"] == 3
    assert found["optimizer", "float32", "adam"]["state"] == pytest.approx(2, rel=0.01)
    for record in result["records"]:
        assert record["quartiles"][0] <= record["time"] <= record["quartiles"][1]
        assert record["rounds"] == 2
    assert (tmp_path / "step.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "bandwidth / copy" in printed
    for kind in step.KINDS:
        rows = step.overview(result["records"], kind)
        assert rows in printed
        assert len(rows.splitlines()) == 2 + len(step.DTYPES)


def test_networks_name_their_layers():
    """GRAPES modulates every kernel of the networks, and nothing else."""
    for make in networks.NETWORKS.values():
        shapes = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
            make().shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        flat = jax.tree_util.tree_leaves_with_path(shapes)
        numbers = by_path()(shapes)
        described = jax.tree_util.tree_leaves_with_path(
            numbers, is_leaf=lambda x: hasattr(x, "output_axis")
        )
        kernels = {jax.tree_util.keystr(path) for path, _ in flat if path[-1].key == "kernel"}
        read = {jax.tree_util.keystr(path) for path, _ in described if path[-1].key == "kernel"}
        assert read == kernels


def test_a_slow_step_sits_out_after_the_first_round():
    table = seconds_side_by_side([lambda: None, lambda: sum(range(10**6))], 3, limit=1e-9)
    assert (table[0] > 0).all()
    assert np.isnan(table[1:]).all()
