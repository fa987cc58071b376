"""The suite of the paper's experiments: what it trains, that it resumes, what it refuses."""

import contextlib
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

import grapes_optax
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
from grapes_experiments.changes import CHANGES
from grapes_experiments.experiments import EXPERIMENTS, PRESETS, SAME_RUN, Choice, Scale, plan
from grapes_experiments.networks import MLP, spikes
from grapes_experiments.records import REPORT, TUNING, Record
from grapes_experiments.run import run
from grapes_experiments.units import (
    TUNING_SEEDS,
    Lanes,
    Runner,
    Unit,
    held_out,
    next_unit,
    permuted,
)
from grapes_experiments.variants import (
    CONTROLS,
    CONTROLS_OF,
    HIDDEN,
    LOCAL,
    OUTGOING,
    PLAIN,
    PROPAGATED,
    RATE,
    Variant,
    method,
    with_controls,
)
from grapes_optax.spiking import rate_code

NARROW = dataclasses.replace(AUTHORS, width=12)
CELL = Cell("BP", PLAIN, "BP", NARROW)


@pytest.fixture(scope="module")
def data() -> Data:
    whole = load()
    return Data(*(array[:320] for array in whole))


BRIEF = Scale(seeds=2, epochs=3, tuning_seeds=2)


INSIDE = 0.01, 1.0, 100.0  # of these, the middle one is the best


def small(*cells: Cell, scale: Scale = BRIEF, tasks: int = 1, grid=INSIDE):
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
    model, of, prepare = build(Cell("", PROPAGATED), "mnist")
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
    forward = of.rule(model.apply)
    modulated = jax.grad(lambda p: forward(p, x[:4]).sum())(params)["params"]
    plain = jax.grad(lambda p: model.apply(p, x[:4]).sum())(params)["params"]
    assert np.array_equal(modulated["output"]["kernel"], plain["output"]["kernel"])
    assert not np.allclose(modulated["Dense_1"]["kernel"], plain["Dense_1"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "rule"), [(PLAIN, "BP"), (LOCAL, "DFA")])
def test_lanes_are_what_one_rate_alone_makes(variant, rule, data, tmp_path):
    """The learning rate in the state, and lanes of several rates, change nothing."""
    found = results(small(Cell("", variant, rule, NARROW), scale=Scale(2, 3)), data, tmp_path)
    he = nn.initializers.he_uniform()
    model = MLP(12, 10, 2, bias=False, keep=0.9, hidden_init=he, output_init=he)
    (record,) = found.report.values()
    for i, rate in enumerate(record.rates):
        of = method(optax.sgd(rate), variant, rule)
        expected = training.train(model, of, data, seeds=2, epochs=3, batch=64)
        np.testing.assert_allclose(record.accuracy[1:, i, 0], expected, atol=1.01 / 320)


def test_rates_are_chosen_by_other_seeds_on_held_out_images(data, tmp_path):
    found = results(small(CELL, grid=(1e-4, 1.0, 4.0)), data, tmp_path)
    (tuned,), (report,) = found.tuning.values(), found.report.values()
    assert tuned.seeds == (TUNING_SEEDS, TUNING_SEEDS + 1)
    assert report.seeds == (0, 1)
    scores = tuned.accuracy[-1].mean((1, 2))
    chosen = records.choice(tuned)
    assert scores[tuned.rates.index(chosen.rate)] == scores.max()
    assert set(report.rates) == {CELL.setup.rate, *records.candidates(chosen)}
    units = [line for line in numbers(tmp_path) if line["kind"] == "unit"]
    assert [unit["images"] for unit in units[-2:]] == [54, 320]
    assert units[0]["epochs"] == units[-1]["epochs"]  # the whole horizon


def tuned(scores: dict[float, list[float]]) -> Record:
    values = np.array([*scores.values()])
    rates, seeds = values.shape
    accuracy = np.stack([values, values])[:, :, None]
    nothing = np.zeros((2, rates))
    return Record(
        *(CELL, TUNING, tuple(scores), tuple(range(seeds)), np.arange(2), accuracy),
        *(np.zeros((rates, seeds), bool), nothing, {}, np.zeros(2), 0, 0, []),
    )


def test_choice_of_a_rate():
    sure = records.choice(tuned({0.1: [0.5, 0.5], 0.2: [0.9, 0.8], 0.4: [0.1, 0.6]}))
    assert sure == records.Choice(0.2, {0.2: 1.0}, True)
    # Of the four resamples of two seeds, one is the second seed twice: it prefers 0.1.
    torn = records.choice(tuned({0.1: [0.0, 0.5], 0.2: [0.9, 0.4], 0.4: [0.0, 0.0]}))
    assert torn == records.Choice(0.2, {0.1: 0.25, 0.2: 0.75}, True)
    assert records.candidates(torn) == [0.2, 0.1]


def test_grid_is_extended_until_the_best_lies_inside():
    assert records.further(tuned({0.1: [0.5], 0.2: [0.9], 0.4: [0.1]})) == ()
    assert records.further(tuned({0.1: [0.5], 0.2: [0.6], 0.4: [0.7]})) == (0.8, 1.6)
    assert records.further(tuned({0.1: [0.8], 0.4: [0.6]})) == pytest.approx((0.00625, 0.025))
    inside = tuned({0.1: [0.5], 0.2: [0.9], 0.4: [0.1]})
    assert records.further(inside, [0.1, 0.4]) == ()
    assert records.further(inside, [0.1, 0.8]) == pytest.approx((0.8, 1.6))
    assert records.further(inside, [0.02, 0.8]) == pytest.approx((0.025, 0.05))
    endless = {2.0**-k: [float(k)] for k in reversed(range(records.MOST_RATES))}
    assert records.further(tuned(endless)) == ()
    assert not records.choice(tuned(endless)).inside


def test_variants_of_a_panel_are_tried_at_the_same_rates():
    """All at what one found best, in order; what was tried or reported is not trained again."""
    other = dataclasses.replace(CELL, variant=PROPAGATED)
    apart = dataclasses.replace(other, panel="FA")
    wanted = small(CELL, other, apart, grid=(0.5, 1.0, 2.0))
    rates = tuple(CELL.setup.rate * factor for factor in wanted.grid)
    inside = dict(zip(rates, ([0.5], [0.9], [0.1]), strict=True))
    low = {rate / 16: scores for rate, scores in inside.items()} | {rate: [0.1] for rate in rates}
    tuned_at = {0: tuned(inside)._replace(cell=CELL), 1: tuned(low)._replace(cell=other)}
    assert next_unit(wanted, 2, tuned_at, ())[1:3] == (TUNING, rates)
    tuned_at[2] = tuned(inside)._replace(cell=apart)
    phase, at = next_unit(wanted, 0, tuned_at, ())[1:3]
    assert (phase, at) == (TUNING, pytest.approx((rates[0] / 4, rates[0] / 2)))
    for cell, reported in (1, (0.1, *candidates(tuned_at[1]))), (2, (0.1,)):
        assert next_unit(wanted, cell, tuned_at, reported) is None
    assert next_unit(wanted, 2, tuned_at, ())[1:3] == (REPORT, (0.1,))
    tuned_at[0] = tuned(low)._replace(cell=CELL)
    phase, at = next_unit(wanted, 0, tuned_at, (0.1,))[1:3]
    assert (phase, at) == (REPORT, tuple(candidates(tuned_at[1])))


def candidates(found):
    return records.candidates(records.choice(found))


def test_report_at_rates_that_were_found_later(data, tmp_path):
    """Both units of the report are one record, at the common rate as before."""
    wanted = small(CELL)
    before = results(wanted, data, tmp_path).report[CELL]
    unit = Unit(0, REPORT, (0.05,), before.seeds, wanted.scale.epochs)
    with runner.Folder(tmp_path, wanted) as folder:
        lanes = Lanes(Runner(wanted, 0, data), unit)
        for _ in runner.resumed(folder, lanes, 0, 0.0, contextlib.nullcontext()):
            pass
        assert not folder.todo()
    after = records.read(tmp_path).report[CELL]
    assert set(after.rates) == {0.05, *before.rates}
    np.testing.assert_array_equal(after.at(0.1).accuracy, before.at(0.1).accuracy)
    assert not run(wanted, data, tmp_path)


def test_extended_grid_is_trained(data, tmp_path):
    found = results(small(CELL, scale=Scale(2, 1, 1), grid=(1e-6, 2e-6)), data, tmp_path)
    (record,) = found.tuning.values()
    assert len(record.rates) > 2
    assert list(record.rates) == sorted(record.rates)


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
    wanted = small(CELL, tasks=3, grid=())
    unit = Unit(0, REPORT, (0.1,), (0, 1), 6)
    runner, epochs = Runner(wanted, 0, data), []

    def epoch(state, key, data):
        epochs.append(np.asarray(data.train_images[0]))
        return state, jnp.zeros(2), {}

    runner.epoch = epoch
    lanes = Lanes(runner, unit)
    lines = [lanes.train(number) for number in range(7)]
    assert np.shape(lines[-1]["correct"]) == (1, 3, 2)
    tasks = [np.asarray(permuted(data.train_images[:1], task)[0]) for task in (0, 0, 1, 1, 2, 2)]
    np.testing.assert_array_equal(epochs, tasks)


def test_seeds_are_their_numbers_whatever_else_is_trained():
    keys = jax.random.key_data(training.seed_keys((0, 1, 7), 5))
    alone = jax.random.key_data(training.seed_keys((7,), 2))
    np.testing.assert_array_equal(keys[:4, 2], alone[:, 0])
    assert len({key.tobytes() for key in np.asarray(keys).reshape(-1, 2)}) == 7 * 3


def test_lengths_of_the_steps(data, tmp_path):
    """Of one step at a rate of 1, that of the gradient."""
    batch = Data(*(array[:64] for array in data))
    model, of, prepare = build(CELL, "digits")
    keys = training.seed_keys((3,), 1)
    state = training.start(model, of, keys[:2], data.train_images[:1])
    state = state._replace(optimizer=at_rates(state.optimizer, jnp.array([1.0])))
    after, _, steps = training.epoch_of(model, of, batch=64, prepare=prepare)(state, keys[2], batch)
    for path, moved in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(jnp.subtract, after.params, state.params)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_allclose(steps[name][0], np.linalg.norm(moved), rtol=1e-4)


# The controls beyond those of the library.


def weights() -> dict:
    keys = jax.random.split(jax.random.key(5), 3)
    shapes = {"Dense_0": (6, 5), "Dense_1": (5, 4), "output": (4, 3)}
    return {
        n: {"kernel": jax.random.normal(k, s)}
        for (n, s), k in zip(shapes.items(), keys, strict=True)
    }


def updated(variant: Variant, params, state=None):
    optimizer = method(optax.sgd(1.0), variant).optimizer
    state = optimizer.init(params) if state is None else state
    updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    return jax.tree.map(lambda u: -u, updates), state


def test_frozen_factors_are_those_of_the_start():
    params, changed = weights(), jax.tree.map(jnp.flip, weights())
    frozen = LOCAL.against("frozen")
    first, state = updated(frozen, params)
    later, _ = updated(frozen, changed, state)
    jax.tree.map(np.testing.assert_array_equal, first, later)
    jax.tree.map(np.testing.assert_array_equal, first, updated(LOCAL, params)[0])
    assert not np.array_equal(later["Dense_0"]["kernel"], updated(LOCAL, changed)[0]["Dense_0"])


def test_permuted_factors_are_those_of_today_at_other_nodes():
    permuted_factors = LOCAL.against("permutation")
    params, changed = weights(), jax.tree.map(jnp.flip, weights())
    first, state = updated(permuted_factors, params)
    later, _ = updated(permuted_factors, changed, state)
    for found, of in (first, params), (later, changed):
        grapes, _ = updated(LOCAL, of)
        for name in "Dense_0", "Dense_1":
            np.testing.assert_array_equal(
                np.sort(found[name]["kernel"][0]), np.sort(grapes[name]["kernel"][0])
            )
        np.testing.assert_array_equal(found["output"]["kernel"], np.ones((4, 3)))
    others = jax.tree.map(lambda p: p + 1e-6, params)
    orders = [jax.tree.leaves(updated(permuted_factors, p)[1]) for p in (params, others)]
    assert not all(map(np.array_equal, *orders))  # of each network its own


def test_rate_times_the_mean_factor():
    params = weights()
    found, _ = updated(RATE, params)
    factors = jax.tree.leaves(grapes_optax.factors(params, HIDDEN))
    mean = np.concatenate([np.ravel(f) for f in factors]).mean()
    jax.tree.map(lambda u: np.testing.assert_allclose(u, mean, rtol=1e-6), found)


@pytest.mark.parametrize("form", CONTROLS_OF)
def test_variants_have_names_of_their_own(form):
    variants = with_controls(Variant(form))
    names = [variant.name for variant in [PLAIN, RATE, *variants]]
    assert len(set(names)) == len(names)
    assert [v.is_grapes for v in variants] == [True] + [False] * (len(variants) - 1)
    for variant in variants:  # that each is something to train
        assert method(optax.sgd(1.0), variant, "BP", ["Dense_0/kernel", "Dense_1/kernel"])


def test_names_of_variants():
    assert PLAIN.name == "plain"
    assert RATE.name == "plain, rate times mean factor"
    assert PROPAGATED.against("roll").name == "propagated, neighbour's factor"
    assert PROPAGATED.against("plain") == PLAIN
    unlike = Variant("local", "mean", clipped=False, normalization="mean")
    assert unlike.name == "local, mean factor, not clipped, by the mean node"
    assert OUTGOING.name == "outgoing GRAPES"
    assert {c for of in CONTROLS_OF.values() for c in of} | {"", "rate"} == set(CONTROLS)


# Networks whose nodes differ by construction.


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_trained_networks(name):
    key = jax.random.key(1)
    kernels = [jax.random.normal(key, shape) for shape in ((8, 40), (40, 20), (20, 3))]
    x = jax.random.normal(jax.random.key(2), (7, 8))
    found = CHANGES[name][0](key, kernels)
    assert [k.shape for k in found] == [k.shape for k in kernels]
    if name == "pruned 80 %":
        zero = [float((k == 0).mean()) for k in found]
        assert zero == pytest.approx([0.8, 0.8, 0.0], abs=0.01)
    elif name == "widened":
        halves = [kernels[0][:, :20], kernels[1][:20, :10], kernels[2][:10]]

        def forward(kernels):
            h = x
            for kernel in kernels[:-1]:
                h = nn.relu(h @ kernel)
            return h @ kernels[-1]

        np.testing.assert_allclose(forward(found), forward(halves), rtol=2e-4, atol=1e-4)
    elif name == "dead nodes":
        share = np.abs(found[0]).sum(0) / np.abs(kernels[0]).sum(0)
        assert {round(float(s), 4) for s in share} == {0.01, 1.0}
    else:
        jax.tree.map(np.testing.assert_array_equal, found, kernels)


@pytest.mark.slow
def test_run_goes_on_from_trained_networks(data, tmp_path):
    setup = dataclasses.replace(AUTHORS, width=64, before="pruned 80 %")
    scale = Scale(2, 1, 0, before=30)
    found = results(small(Cell("", PLAIN, "BP", setup), scale=scale, grid=()), data, tmp_path)
    (record,) = found.report.values()
    assert record.accuracy[0].mean() > 0.3  # before the run, where 0.1 is chance
    lanes = Lanes(Runner(found.plan, 0, data), Unit(0, REPORT, (0.1,), (0, 1), 1))
    lanes.train(1)
    zero = [(k == 0).mean() for k in jax.tree.leaves(lanes.state.params)]
    assert zero == pytest.approx([0.8, 0.8, 0], abs=0.02)


def test_spikes_have_the_rates_of_rate_code():
    images = jnp.linspace(0, 1, 11)[None].repeat(2000, 0)
    found = spikes(jax.random.key(0), images, 0.3)
    expected = rate_code(jax.random.key(1), images, steps=20, rate=0.3)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert set(np.unique(found)) == {0.0, 1.0}
    np.testing.assert_allclose(found.mean((0, 1)), 0.3 * images[0], atol=0.01)
    np.testing.assert_allclose(found.mean((0, 1)), expected.mean((0, 1)), atol=0.015)
    assert (spikes(jax.random.key(0), images, 1.0)[..., -1] == 1).all()


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
@pytest.mark.parametrize("variant", [LOCAL, PROPAGATED])
def test_what_is_pruned_stays_pruned(variant, data):
    cell = Cell("", variant, "BP", dataclasses.replace(NARROW, init="pruned 80 %"))
    model, of, prepare = build(cell, "digits")
    keys = training.seed_keys((0, 1), 1)
    state = training.start(model, of, keys[:2], data.train_images[:1])
    zero = jax.tree.map(lambda p: p == 0, state.params)
    after, *_ = training.epoch_of(model, of, batch=64, prepare=prepare)(state, keys[2], data)
    assert jax.tree.all(jax.tree.map(lambda z, p: bool((z == (p == 0)).all()), zero, after.params))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_of_a_lane(name):
    optimizer, _ = OPTIMIZERS[name]
    cell = Cell("", PLAIN, "BP", dataclasses.replace(AUTHORS, optimizer=name))
    _, of, _ = build(cell, "digits")
    params = {"w": jnp.array([1.0, -2.0])}
    state = at_rates(of.optimizer.init(params), jnp.float32(0.25))
    updates, _ = of.optimizer.update({"w": jnp.array([0.3, 0.1])}, state, params)
    expected, _ = optimizer.update({"w": jnp.array([0.3, 0.1])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], 0.25 * expected["w"], rtol=1e-6)


def test_grapes_needs_no_memory():
    params = {"params": {"Dense_0": {"kernel": jnp.ones((8, 4))}}}
    found = {}
    for name in OPTIMIZERS:
        for variant in PLAIN, LOCAL, PROPAGATED:
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
            assert PLAIN in variants, name
            standard = {LOCAL, PROPAGATED, Variant("before"), OUTGOING} & variants
            for form in standard if name != "memory" else ():
                assert {form.against("mean"), form.against("reverse")} <= variants, name
                assert form.form not in ("local", "before") or form.against("norm") in variants


def test_presets():
    for name, experiment in EXPERIMENTS.items():
        scales = [plan(name, preset, "mnist").scale for preset in PRESETS]
        if plan(name).scale.epochs:
            assert scales[-1][:2] == (10, 200)
            assert plan(name).scale.seeds >= 10  # or no verdict
            assert (plan(name).scale.tuning_seeds >= 5) == bool(experiment.grid)
    assert plan("convergence") == plan("accuracy")
    assert set(SAME_RUN) == {"convergence"}
    untuned = plan("accuracy", tuned=False, first_seed=40)
    assert (untuned.grid, untuned.scale.tuning_seeds, untuned.first_seed) == ((), 0, 40)


def test_plan_survives_the_file():
    for name in EXPERIMENTS:
        wanted = plan(name, seeds=3, width=7)
        found = records.as_plan(json.loads(json.dumps(records.as_json(wanted))))
        assert found == wanted._replace(grid=list(wanted.grid))
        assert {cell.setup.width for cell in wanted.cells} == {7}
        residual = plan(name, network="ResNet-9").cells
        assert "outgoing" not in {cell.variant.form for cell in residual}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_learn_any_set(name):
    setup = dataclasses.replace(AUTHORS, network=name, width=4, depth=1)
    cell = Cell("", PLAIN, "BP", setup)
    for dataset, classes in ("cifar100", 100), ("emnist", 47):
        model, _, prepare = build(cell, dataset)
        images = jnp.ones((2, 32, 32, 3) if dataset == "cifar100" else (2, 28, 28))
        x = prepare(jax.random.key(0), images)
        shape = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0].shape
        assert shape == (2, classes)


# Runs that stop and go on.


class StopError(Exception):
    pass


FEEDBACK = dataclasses.replace(CELL, variant=PROPAGATED, rule="FA")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_every", "cells", "grid"),
    [
        (0.0, [FEEDBACK], (1.0, 4.0)),  # which is extended
        (1e9, [CELL, FEEDBACK], INSIDE),
    ],
    ids=["with checkpoints", "without"],
)
def test_resumed_run_ends_with_the_same_numbers(
    save_every, cells, grid, data, tmp_path, monkeypatch
):
    wanted = small(*cells, tasks=2, grid=grid)
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
    wanted = small(CELL, grid=())
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
    wild = dataclasses.replace(CELL, setup=dataclasses.replace(NARROW, rate=1e20))
    found = results(small(wild, CELL, grid=()), data, tmp_path)
    assert found.report[wild].diverged.all()
    assert (found.report[wild].accuracy[-1] == 0.1).all()  # chance
    assert not found.report[CELL].diverged.any()
    assert "NaN" not in (tmp_path / records.NAME).read_text()
    wanted = small(CELL, grid=(0.5, 1.0, 1e21))
    mixed = results(wanted, data, tmp_path / "mixed").tuning[CELL]
    assert mixed.diverged[2].all()
    assert (mixed.accuracy[-1, 2] == 0.1).all()
    assert np.isfinite(mixed.loss[1:, :2]).all()
    assert np.isnan(mixed.loss[1:, 2]).all()
    assert records.choice(mixed).rate < 1


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
        (["shorten", "nowhere", "out"], "nowhere"),
        (["run", "depth", "--first-seed=-1"], "-1 is not above -1"),
        ([], "run | report | shorten"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert message in refusal(arguments, capsys)


def test_folder_of_another_run(tmp_path, capsys):
    options = ["run", "memory", f"--out={tmp_path}"]
    paper.main(options)
    before = numbers(tmp_path)
    message = refusal([*options, "--width=8"], capsys)
    assert "holds another run (width: 256 → 8)" in message
    assert numbers(tmp_path) == before
    capsys.readouterr()
    paper.main(options)
    assert numbers(tmp_path) == before
    assert "is complete: nothing was left to train" in capsys.readouterr().out


def test_what_differs_is_told():
    one, other = (records.as_json(plan("accuracy", "smoke", seeds=n)) for n in (2, 3))
    assert runner.differences(one, one) == []
    assert runner.differences(one, other) == ["seeds: 2 → 3"]
    slow = records.as_json(plan("accuracy", "smoke", seeds=2, rate=0.5, first_seed=3))
    assert runner.differences(one, slow) == ["rate: 0.1 → 0.5", "first_seed: 0 → 3"]
    few = records.as_json(plan("accuracy", "smoke", choice=Choice(rules=["BP"]), seeds=2))
    assert runner.differences(one, few) == ["cells: 11 → 5"]


def test_help_shows_every_default_and_choice(capsys):
    with pytest.raises(SystemExit):
        paper.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for known in (PRESETS, OPTIMIZERS, NETWORKS, INITS, EXPERIMENTS):
        assert all(name in text for name in known)
    for default in "(default: standard)", "(default: digits)", "(default: 0)", "(default: 60)":
        assert default in text


@pytest.mark.parametrize("tasks", [1, 2])
def test_shortened_run_is_read_alike(tasks, data, tmp_path, capsys):
    wanted = small(CELL, tasks=tasks, scale=Scale(2, 10, 2))
    run(wanted, data, tmp_path / "whole")
    paper.main(["shorten", str(tmp_path / "whole"), str(tmp_path / "short")])
    whole, short = (records.read(tmp_path / name) for name in ("whole", "short"))
    for phase in "tuning", "report":
        (one,), (other,) = (getattr(found, phase).values() for found in (whole, short))
        rows = [list(one.epochs).index(number) for number in other.epochs]
        assert len(rows) < len(one.epochs)
        np.testing.assert_array_equal(one.accuracy[rows], other.accuracy)
        assert (one.rates, one.seeds) == (other.rates, other.seeds)
        np.testing.assert_array_equal(one.diverged, other.diverged)
    assert short.report[CELL].epochs[-1] == 10 * tasks
    assert (tmp_path / "short" / records.NAME).stat().st_size < (
        tmp_path / "whole" / records.NAME
    ).stat().st_size
    run(wanted, data, tmp_path / "short")  # nothing is left to train
    again = records.read(tmp_path / "short")
    np.testing.assert_array_equal(again.report[CELL].accuracy, short.report[CELL].accuracy)


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
    run(small(CELL, grid=()), data, tmp_path, tensorboard=True)
    (events,) = (tmp_path / "tensorboard").rglob("events*")
    content = events.read_bytes()
    assert b"accuracy/rate_0.1/task_1" in content
    assert b"loss/rate_0.1" in content


def test_all_experiments_in_folders_of_their_own(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        paper, "run", lambda wanted, *rest, **options: called.append((wanted, rest)) or True
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
    assert not found.missing
    for record in found.report.values():
        assert not record.diverged.all()
        assert len(record.layers) == 2 * found.plan.observe
    if found.plan.scale.epochs:
        ends = [record.accuracy[-1].mean() for record in found.report.values()]
        assert np.mean(ends) > 0.2
    paper.main(["report", str(tmp_path)])
    assert EXPERIMENTS[name].question in (tmp_path / "report.md").read_text()


def trained(of, epochs=1, **options):
    return training.train(MLP(width=16), of, load(), seeds=2, epochs=epochs, **options)


@pytest.mark.slow
def test_longer_runs_go_on_where_shorter_ones_end():
    plain = method(optax.sgd(0.1))
    short, long = trained(plain), trained(plain, epochs=2)
    np.testing.assert_array_equal(long[:1], short)
    assert not np.array_equal(trained(method(optax.sgd(0.1), rule="DFA")), short)


@pytest.mark.slow
def test_model_sees_what_is_prepared():
    seen = set()

    def erased(key, images):
        jax.debug.callback(lambda key: seen.add(key.tobytes()), jax.random.key_data(key))
        return 0 * images

    blind = trained(training.Method(optax.sgd(0.1)), prepare=erased, epochs=2)
    assert blind.max() < 0.2
    steps = 2 * 2 * (1347 // 32)  # epochs, seeds
    assert len(seen) == 1 + steps + 1  # for the shapes; new ones; of the test, always the same
