"""Several processes that train one model: as one process does, also after one was killed."""

import re
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

EPOCHS = 2


def command(folder, *options):
    arguments = f"--epochs={EPOCHS}", f"--checkpoints={folder}", *options
    return [sys.executable, "-u", "-m", "examples.multihost", *arguments]


def losses(output):
    return {int(n): float(loss) for n, loss in re.findall(r"epoch (\d+): loss (\S+)", output)}


def last(folder):
    checkpointer, path = ocp.StandardCheckpointer(), folder / str(EPOCHS) / "default"
    saved = checkpointer.metadata(path)
    saved = getattr(saved, "item_metadata", saved)  # older releases: the tree itself
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), saved)
    return jax.tree.leaves(checkpointer.restore(path, target))


@pytest.mark.slow
def test_two_processes_one_of_them_killed(tmp_path):
    one = subprocess.run(
        command(tmp_path / "one", "--processes=1", "--process=0", "--devices=4"),
        capture_output=True,
        text=True,
        check=True,
    )
    alone = losses(one.stdout)
    assert list(alone) == [1, 2]
    assert alone[2] < alone[1] / 3

    job = subprocess.Popen(
        command(tmp_path / "two"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = ""
    for line in job.stdout:
        seen += line
        if "epoch 1:" in line:  # in the middle of the second epoch
            subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path}/two.*--process=1"], check=True)
            break
    seen += job.communicate()[0]
    assert job.returncode != 0
    assert "A process has failed" in seen
    before = losses(seen)
    assert EPOCHS not in before

    again = subprocess.run(command(tmp_path / "two"), capture_output=True, text=True, check=True)
    after = losses(again.stdout)
    assert min(after) == max(before) + 1
    together = before | after
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-5)
    for mine, theirs in zip(*map(last, (tmp_path / "one", tmp_path / "two")), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
