"""The suite of the paper's experiments: what it trains, that it resumes, what it refuses."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.data import Data, load
from grapes_experiments import __main__ as paper
from grapes_experiments import records, training
from grapes_experiments import run as runner
from grapes_experiments.cells import (
    AUTHORS,
    INITS,
    NETWORKS,
    OPTIMIZERS,
    Cell,
    at_rates,
    build,
    state_bytes,
)
from grapes_experiments.experiments import EXPERIMENTS, PRESETS, SAME_RUN, Choice, Scale, plan
from grapes_experiments.networks import MLP
from grapes_experiments.records import BEST, SAME, TUNING
from grapes_experiments.run import run
from grapes_experiments.units import Contender, Lanes, Unit, held_out, permuted

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

PLAIN = Cell("BP", "plain", "BP", dataclasses.replace(AUTHORS, width=12))


@pytest.fixture(scope="module")
def data() -> Data:
    whole = load()
    return Data(*(array[:320] for array in whole))


BRIEF = Scale(seeds=2, epochs=3, tuning_seeds=1, tuning_epochs=2)


def small(*cells: Cell, scale: Scale = BRIEF, tasks: int = 1, grid=(1.0, 4.0)):
    wanted = plan("accuracy", "smoke")
    return wanted._replace(cells=list(cells), scale=scale, tasks=tasks, grid=list(grid))


def numbers(out: Path) -> list[dict]:
    """All lines but those that tell of the run, without the time."""
    lines = records.lines_of(out / records.NAME)
    return [
        {k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] != "run"
    ]


def results(wanted, data, out):
    run(wanted, data, out)
    return records.read(out)


# What is trained.


def test_authors_set_up():
    model, method, prepare = build(Cell("", "propagated GRAPES", "BP", AUTHORS), "mnist")
    assert (AUTHORS.rate, AUTHORS.batch, AUTHORS.optimizer) == (0.1, 64, "sgd")
    params = model.init(jax.random.key(0), jnp.ones((1, 28, 28)))
    shapes = {"Dense_0": (784, 256), "Dense_1": (256, 256), "output": (256, 10)}
    for name, shape in shapes.items():
        layer = params["params"][name]
        assert list(layer) == ["kernel"]
        assert layer["kernel"].shape == shape
        bound = np.sqrt(6 / shape[0])
        assert 0.99 * bound < np.abs(layer["kernel"]).max() <= bound
    assert prepare is training.as_it_is
    x = jax.random.uniform(jax.random.key(1), (2000, 784))
    _, seen = model.apply(
        params, x, rngs={"dropout": jax.random.key(2)}, capture_intermediates=True, mutable=True
    )
    dropped, dense = (seen["intermediates"][n]["__call__"][0] for n in ("Dropout_0", "Dense_0"))
    positive = np.asarray(dense) > 0
    kept = (np.asarray(dropped) > 0)[positive]
    assert kept.mean() == pytest.approx(0.9, abs=0.01)
    np.testing.assert_allclose(
        np.asarray(dropped)[positive][kept], np.asarray(dense)[positive][kept] / 0.9, rtol=1e-6
    )
    forward = method.rule(model.apply)
    modulated = jax.grad(lambda p: forward(p, x[:4]).sum())(params)["params"]
    plain = jax.grad(lambda p: model.apply(p, x[:4]).sum())(params)["params"]
    assert np.array_equal(modulated["output"]["kernel"], plain["output"]["kernel"])
    assert not np.allclose(modulated["Dense_1"]["kernel"], plain["Dense_1"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "rule"), [("plain", "BP"), ("local GRAPES", "DFA")])
def test_unit_equals_the_training_of_the_examples(variant, rule, data, tmp_path):
    """The learning rate in the state, and lanes of several rates, change nothing."""
    cell = Cell("", variant, rule, dataclasses.replace(AUTHORS, width=12))
    wanted = small(cell, scale=Scale(2, 3, 2, 3))
    found = results(wanted, data, tmp_path)
    he = nn.initializers.he_uniform()
    model = MLP(12, 10, 2, bias=False, keep=0.9, hidden_init=he, output_init=he)
    for record in found.records:
        for i, rate in enumerate(record.rates):
            method = training.method(optax.sgd(rate), variant, rule)
            sets = held_out(data) if record.phase == TUNING else data
            expected = training.train(model, method, sets, seeds=2, epochs=3, batch=64)
            one_image = 1.01 / len(sets.test_labels)
            np.testing.assert_allclose(record.accuracy[1:, i, 0], expected.accuracy, atol=one_image)
    assert {record.phase for record in found.records} >= {TUNING, SAME}


def test_best_rate_is_that_of_the_held_out_images(data, tmp_path):
    found = results(small(PLAIN, grid=(1e-4, 1.0, 4.0)), data, tmp_path)
    tuning, same, *best = found.records
    assert (tuning.phase, same.phase) == (TUNING, SAME)
    scores = tuning.accuracy[-1].mean((1, 2))
    chosen = records.best_rate(tuning)
    assert scores[list(tuning.rates).index(chosen)] == scores.max()
    assert [record.phase for record in best] == [BEST] * (chosen != PLAIN.setup.rate)
    assert all(record.rates == (chosen,) for record in best)
    spoilt = tuning._replace(loss=np.where(np.array(tuning.rates)[:, None] == chosen, np.nan, 1.0))
    assert records.best_rate(spoilt._replace(loss=spoilt.loss[None])) != chosen


def test_held_out_images_are_of_the_training_set():
    data = load()
    tuned = held_out(data)
    assert len(tuned.train_labels) + len(tuned.test_labels) == len(data.train_labels)
    assert len(tuned.test_labels) == pytest.approx(len(data.train_labels) / 6, abs=1)
    both = np.concatenate([tuned.train_images, tuned.test_images])
    found, expected = (
        np.unique(images.reshape(len(both), -1), axis=0, return_counts=True)
        for images in (both, np.asarray(data.train_images))
    )
    assert all(map(np.array_equal, found, expected))


def test_tasks_are_permutations_of_the_pixels(data):
    images = data.test_images
    assert permuted(images, 0) is images
    for task in 1, 2:
        shuffled = permuted(images, task)
        assert shuffled.shape == images.shape
        assert not np.array_equal(shuffled, images)
        assert np.array_equal(shuffled, permuted(images, task))
        np.testing.assert_array_equal(
            np.sort(shuffled.reshape(320, -1)), np.sort(images.reshape(320, -1))
        )
        same = permuted(images[:5], task)  # whatever else is in the set
        assert np.array_equal(same, shuffled[:5])
    assert not np.array_equal(permuted(images, 1), permuted(images, 2))


def test_forgetting_trains_one_task_after_another(data):
    wanted = small(PLAIN, tasks=3, grid=())
    unit = Unit(0, SAME, (0.1,), 2, 6)
    contender, epochs = Contender(wanted, 0, data), []

    def epoch(state, key, data):
        epochs.append(np.asarray(data.train_images[0]))
        return state, jnp.zeros(2)

    contender.epoch = epoch
    lanes = Lanes(contender, unit)
    lines = [lanes.train(number) for number in range(7)]
    assert np.shape(lines[-1]["accuracy"]) == (1, 3, 2)
    tasks = [np.asarray(permuted(data.train_images[:1], task)[0]) for task in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_array_equal(epochs, tasks)


@pytest.mark.parametrize("init", INITS)
def test_initial_weights_have_the_variance_of_he(init):
    kernel = np.asarray(INITS[init](jax.random.key(0), (512, 256), jnp.float32))
    assert kernel.var() == pytest.approx(2 / 512, rel=0.02)
    share = float(init.split()[1]) / 100 if init.startswith("pruned") else 0.0
    assert (kernel == 0).mean() == pytest.approx(share, abs=1e-3)
    incoming = np.abs(kernel).sum(0)
    spread = incoming.std() / incoming.mean()
    assert spread < 0.03 if init == "he_uniform" else spread > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["local GRAPES", "propagated GRAPES"])
def test_what_is_pruned_stays_pruned(variant, data):
    cell = Cell("", variant, "BP", dataclasses.replace(AUTHORS, width=12, init="pruned 80 %"))
    model, method, prepare = build(cell, "digits")
    keys = training.seed_keys(2, 1)
    state = training.start(model, method, keys[:2], data.train_images[:1])
    zero = jax.tree.map(lambda p: p == 0, state.params)
    after, _ = training.epoch_of(model, method, batch=64, prepare=prepare)(state, keys[2], data)
    assert jax.tree.all(jax.tree.map(lambda z, p: bool((z == (p == 0)).all()), zero, after.params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_of_a_lane(name):
    optimizer, _ = OPTIMIZERS[name]
    cell = Cell("", "plain", "BP", dataclasses.replace(AUTHORS, optimizer=name))
    _, method, _ = build(cell, "digits")
    params = {"w": jnp.array([1.0, -2.0])}
    state = at_rates(method.optimizer.init(params), jnp.float32(0.25))
    updates, _ = method.optimizer.update({"w": jnp.array([0.3, 0.1])}, state, params)
    expected, _ = optimizer.update({"w": jnp.array([0.3, 0.1])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.25 * expected["w"], rtol=1e-6)


def test_grapes_needs_no_memory():
    params = {"params": {"Dense_0": {"kernel": jnp.ones((8, 4))}}}
    found = {}
    for name in OPTIMIZERS:
        for variant in "plain", "local GRAPES", "propagated GRAPES":
            cell = Cell("", variant, "BP", dataclasses.replace(AUTHORS, optimizer=name))
            found.setdefault(name, set()).add(state_bytes(cell, params))
    assert found == {
        "sgd": {0},
        "momentum": {128},
        "nesterov": {128},
        "rmsprop": {128},
        "adam": {2 * 128 + 4},  # and the count of steps
    }


# The plans.


def test_every_grapes_has_its_controls():
    for name, experiment in EXPERIMENTS.items():
        panels = {}
        for cell in experiment.cells(Choice()):
            panels.setdefault((cell.panel, cell.setup), set()).add(cell.variant)
        for variants in panels.values():
            assert "plain" in variants, name
            if name == "memory":
                continue
            for form in "local", "propagated":
                if f"{form} GRAPES" in variants:
                    assert {f"{form}, mean factor", f"{form}, neighbour's factor"} <= variants, name


def test_presets():
    for name in EXPERIMENTS:
        scales = [plan(name, preset, "mnist").scale for preset in PRESETS]
        assert [s.seeds for s in scales] == sorted(s.seeds for s in scales)
        if plan(name).scale.epochs:
            assert scales[-1][:2] == (10, 200)
            assert plan(name).scale.seeds >= 5
    assert plan("convergence") == plan("accuracy")
    assert set(SAME_RUN) == {"convergence"}


def test_plan_survives_the_file():
    for name in EXPERIMENTS:
        wanted = plan(name, seeds=3, width=7)
        assert records.as_plan(json.loads(json.dumps(records.as_json(wanted)))) == wanted._replace(
            grid=list(wanted.grid)
        )
        assert {cell.setup.width for cell in wanted.cells} == {7}
        residual = plan(name, network="ResNet-9").cells
        assert "authors' DFA" not in {cell.variant for cell in residual}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_any_set(name):
    cell = Cell("", "plain", "BP", dataclasses.replace(AUTHORS, network=name, width=4, depth=1))
    for dataset, classes in ("cifar100", 100), ("emnist", 47):
        model, _, prepare = build(cell, dataset)
        images = jnp.ones((2, 32, 32, 3) if dataset == "cifar100" else (2, 28, 28))
        x = prepare(jax.random.key(0), images)
        shape = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
        assert shape == (2, classes)


# Runs that stop and go on.


class StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [0.0, 1e9], ids=["with checkpoints", "without"])
def test_resumed_run_ends_with_the_same_numbers(save_every, data, tmp_path, monkeypatch):
    cells = [PLAIN, dataclasses.replace(PLAIN, variant="propagated GRAPES", rule="FA")]
    wanted = small(*cells, tasks=2)
    run(wanted, data, tmp_path / "whole")
    expected, out = numbers(tmp_path / "whole"), tmp_path / "stopped"
    add, written = runner.Folder.add, []

    def until(last):
        def stop(folder, line):
            add(folder, line)
            written.append(line["kind"])
            if written.count("epoch") == last:
                folder.stream.write('{"kind":"epoch","epo')  # a line that a kill cut off
                folder.stream.close()
                raise StopError

        return stop

    for last in 1, 4, 9, 15:
        monkeypatch.setattr(runner.Folder, "add", until(last))
        with pytest.raises(StopError):
            run(wanted, data, out, save_every=save_every)
    monkeypatch.setattr(runner.Folder, "add", add)
    run(wanted, data, out, save_every=save_every)
    assert numbers(out) == expected
    assert len(records.read(out).runs) == 5
    assert [path.name for path in out.iterdir()] == [records.NAME]
    assert {run["command"] for run in records.read(out).runs} == {""}
    before = numbers(out)
    monkeypatch.setattr(runner.Lanes, "train", None)  # nothing is left to do
    run(wanted, data, out)
    assert numbers(out) == before


def test_checkpoints_of_lines_that_are_gone(data, tmp_path, monkeypatch):
    wanted = small(PLAIN, grid=())
    run(wanted, data, tmp_path / "whole")
    out = tmp_path / "stopped"
    train = runner.Lanes.train

    def stop(lanes, number):
        if number == 3:
            raise StopError
        return train(lanes, number)

    monkeypatch.setattr(runner.Lanes, "train", stop)
    with pytest.raises(StopError):
        run(wanted, data, out, save_every=0.0)
    monkeypatch.setattr(runner.Lanes, "train", train)
    (out / records.NAME).unlink()
    run(wanted, data, out, save_every=0.0)
    assert numbers(out) == numbers(tmp_path / "whole")


def test_damaged_file(tmp_path, capsys):
    (tmp_path / records.NAME).write_text('{"kind":"run"\n{}\n')
    assert "epochs.jsonl, line 1: damaged" in refusal(["report", str(tmp_path)], capsys)
    assert "line 1: damaged" in refusal(["run", "memory", f"--out={tmp_path}"], capsys)


@pytest.mark.slow
def test_killed_process_goes_on(tmp_path):
    options = ["run", "depth", "--preset=smoke", "--panels=depth 1", "--epochs=12"]
    command = [
        sys.executable,
        "-m",
        "grapes_experiments",
        *options,
        "--save-every=0",
        f"--out={tmp_path}",
    ]
    file = tmp_path / records.NAME
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(records.lines_of(file)) < 9:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    stopped = numbers(tmp_path)
    paper.main([*options, f"--out={tmp_path}"])
    whole = plan("depth", "smoke", choice=Choice(panels=["depth 1"]), epochs=12)
    run(whole, load(), tmp_path / "whole")
    resumed = numbers(tmp_path)
    assert resumed == numbers(tmp_path / "whole")
    assert stopped[:-1] == resumed[: len(stopped) - 1]


# What goes wrong.


@pytest.mark.slow
def test_diverged_seeds_are_marked_and_the_rest_goes_on(data, tmp_path):
    wild = dataclasses.replace(PLAIN, setup=dataclasses.replace(PLAIN.setup, rate=1e20))
    found = results(small(wild, PLAIN, grid=()), data, tmp_path)
    assert [record.diverged.all() for record in found.records] == [True, False]
    assert not found.records[1].diverged.any()
    assert "NaN" not in (tmp_path / records.NAME).read_text()
    mixed = results(small(PLAIN, grid=(1.0, 1e21)), data, tmp_path / "mixed")
    assert mixed.records[0].diverged.ravel().tolist() == [False, True]
    assert records.best_rate(mixed.records[0]) == PLAIN.setup.rate


def refusal(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        paper.main(arguments)
    assert caught.value.code != 0
    return f"{caught.value.code}{capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "acuracy"], "did you mean accuracy?"),
        (["run", "acuracy"], "convergence, all"),  # what there is
        (["run", "depth", "--sedes=3"], "did you mean --seeds?"),
        (["run", "depth", "--sedes", "3"], "did you mean --seeds?"),
        (["run", "depth", "--preset=fulll"], "did you mean full?"),
        (["run", "depth", "--dataset=fashion"], "did you mean fashion_mnist?"),
        (["run", "depth", "--optimizers", "sgd", "adma"], "did you mean adam?"),
        (["run", "depth", "--network=resnet"], "did you mean ResNet-9?"),
        (["run", "depth", "--seeds=1"], "is not above 1"),
        (["run", "depth", "--seeds=many"], "invalid int value: 'many'"),
        (["run", "depth", "--rate=nan"], "is not above 0"),
        (["run", "depth", "--rate=inf"], "is not above 0"),
        (["run", "depth", "--keep=1.5"], "1.5 is not above 0 and at most 1"),
        (["run", "depth", "--width=0"], "0 is not above 0"),
        (["run", "depth", "more"], "what is 'more'?"),
        (["run", "depth", "--panels=depth 3"], "there is no panel 'depth 3'"),
        (["run", "depth", "--panels=depth 3"], "depth 1, depth 2, depth 4, depth 8"),
        (["run", "depth", "--dataset=mnist"], "put its train-*.parquet"),
        (["run", "depth", "--dataset=mnist", "--data=nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        ([], "run | report"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert message in refusal(arguments, capsys)


def test_folder_of_another_run(tmp_path, capsys):
    options = ["run", "memory", f"--out={tmp_path}"]
    paper.main(options)
    before = numbers(tmp_path)
    message = refusal([*options, "--width=8"], capsys)
    assert "holds another run" in message
    assert "cells" in message
    assert numbers(tmp_path) == before
    paper.main(options)
    assert numbers(tmp_path) == before


def test_batch_larger_than_the_set(tmp_path, capsys):
    message = refusal(["run", "depth", "--batch=1500", f"--out={tmp_path}"], capsys)
    assert "a batch of 1500 is more than the 1122 images to train on" in message


def test_command_that_is_recorded_names_no_folder(tmp_path):
    paper.main(
        ["run", "memory", "--optimizers", "sgd", "--out", str(tmp_path), f"--data={tmp_path}"]
    )
    run_line, *_ = records.read(tmp_path).runs
    assert run_line["command"] == (
        "python -m grapes_experiments run memory --optimizers sgd --data=FOLDER"
    )
    assert {"jax", "optax", "flax", "python"} <= set(run_line["versions"])
    assert run_line["commit"]
    assert run_line["device"].startswith(jax.default_backend())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError(f"Failed writing: {os.strerror(errno.ENOSPC)} [os_error_code='28']"),  # Orbax
    ],
)
def test_full_disk(error, tmp_path, monkeypatch, capsys):
    def full(folder, line):
        raise error

    monkeypatch.setattr(runner.Folder, "add", full)
    message = refusal(["run", "memory", f"--out={tmp_path}"], capsys)
    assert "disk is full" in message
    assert "give the same command again" in message


def test_interrupted_download(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr("datasets.load_dataset", interrupted)
    message = refusal(["run", "depth", "--dataset=mnist", "--download"], capsys)
    assert "download of ylecun/mnist failed, try again" in message


# Everything.


def test_tensorboard(data, tmp_path):
    run(small(PLAIN, grid=()), data, tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").rglob("events*")
    content = events.read_bytes()
    assert b"accuracy/rate_0.1/task_1" in content
    assert b"loss/rate_0.1" in content


def test_all_experiments_in_folders_of_their_own(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        paper, "run", lambda wanted, *rest, **options: called.append((wanted, rest))
    )
    paper.main(["run", "all", "--preset=smoke", "--seeds=3", f"--out={tmp_path}"])
    assert [wanted.experiment for wanted, _ in called] == list(EXPERIMENTS)
    assert {wanted.scale.seeds for wanted, _ in called} == {3}
    assert {rest[1].name for _, rest in called} == {f"{name}-digits-smoke" for name in EXPERIMENTS}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name, tmp_path):
    """Every experiment and its report; the digits are learned a little."""
    paper.main(["run", name, "--preset=smoke", f"--out={tmp_path}"])
    found = records.read(tmp_path)
    assert len(found.records) >= len(found.plan.cells)
    for record in found.records:
        assert not record.diverged.any()
        assert len(record.layers) == len(record.accuracy) * found.plan.observe
    if found.plan.scale.epochs:
        assert np.mean([record.accuracy[-1].mean() for record in found.records]) > 0.2
    paper.main(["report", str(tmp_path)])
    assert found.plan.experiment in EXPERIMENTS
    assert EXPERIMENTS[name].question in (tmp_path / "report.md").read_text()


def trained(method, epochs=1, **options):
    model, data = MLP(width=16), load()
    return training.train(model, method, data, seeds=2, epochs=epochs, **options)


@pytest.mark.slow
def test_methods_start_alike_and_longer_runs_go_on_where_shorter_ones_end():
    plain = training.method(optax.sgd(0.1))
    short, long = trained(plain), trained(plain, epochs=2)
    other = trained(training.method(optax.sgd(0.1), rule="DFA"))
    np.testing.assert_array_equal(long.accuracy[:1], short.accuracy)
    assert not np.array_equal(other.accuracy, short.accuracy)
    for result in long, other:
        jax.tree.map(np.testing.assert_array_equal, result.first, short.first)


@pytest.mark.slow
def test_model_sees_what_is_prepared():
    seen = set()

    def erased(key, images):
        jax.debug.callback(lambda key: seen.add(key.tobytes()), jax.random.key_data(key))
        return 0 * images

    blind = trained(training.Method(optax.sgd(0.1)), prepare=erased, epochs=2)
    assert blind.accuracy.max() < 0.2
    trainings, tests = 2 * 2 * (1347 // 32), 450  # epochs, seeds and steps; images
    assert len(seen) == 1 + trainings + tests  # a key for the shapes; new ones, and always the same
