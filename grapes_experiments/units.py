"""One unit: a cell at some learning rates on some seeds, trained at once, epoch by epoch."""

import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.model_selection import train_test_split

import grapes_optax
from examples.data import Data
from grapes_experiments.cells import AUTHORS, at_rates, build, state_bytes, tree_bytes
from grapes_experiments.changes import CHANGES
from grapes_experiments.experiments import Plan
from grapes_experiments.records import REPORT, TUNING, Record, candidates, choice, further
from grapes_experiments.training import (
    correct,
    epoch_of,
    initial_params,
    seed_keys,
    start,
)
from grapes_experiments.variants import PLAIN, hidden, method

Array = jax.Array
TUNING_SEEDS = 1000  # the first of those that choose learning rates; no report uses them


class Unit(NamedTuple):
    """One cell at some learning rates on some seeds: what trains at once."""

    cell: int
    phase: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int  # of all tasks

    @property
    def lanes(self) -> int:
        return len(self.rates) * len(self.seeds)


def next_unit(
    plan: Plan, cell: int, tuned: Mapping[int, Record], reported: Collection[float]
) -> Unit | None:
    """What a cell is to be trained for next, by what chose the rates of all cells so far.

    `reported` are the rates at which the cell itself is trained for the report.
    """
    scale, rate, panel = plan.scale, plan.cells[cell].setup.rate, plan.cells[cell].panel
    epochs, wanted = scale.epochs * plan.tasks, [rate]
    if plan.grid:
        rates = tuple(rate * factor for factor in plan.grid)
        if cell in tuned:
            others = [choice(r).rate for r in tuned.values() if r.cell.panel == panel]
            rates = further(tuned[cell], others)
            wanted += [r for r in candidates(choice(tuned[cell])) if r != rate]
        if rates:
            seeds = tuple(range(TUNING_SEEDS, TUNING_SEEDS + scale.tuning_seeds))
            return Unit(cell, TUNING, rates, seeds, epochs)
    missing = tuple(r for r in wanted if r not in reported)
    seeds = tuple(range(plan.first_seed, plan.first_seed + scale.seeds))
    return Unit(cell, REPORT, missing, seeds, epochs) if missing else None


# Data.


def held_out(data: Data) -> Data:
    """A sixth of the training set in place of the test set, to choose learning rates by."""
    rows = np.arange(len(data.train_labels))
    kept, tested = train_test_split(rows, test_size=1 / 6, random_state=0)
    images, labels = data.train_images, data.train_labels
    return Data(images[kept], labels[kept], images[tested], labels[tested])


def permuted(images: Array, task: int) -> Array:
    """The images with their pixels in the order of a task; the first leaves them as they are."""
    if task == 0:
        return images
    order = jax.random.permutation(jax.random.key(task), images[0].size)
    return images.reshape(len(images), -1)[:, order].reshape(images.shape)


# The weights.


def observe(params: Any) -> dict[str, Any]:
    """Incoming weights and factors of the hidden kernels, over the nodes of all seeds."""
    found = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel") or not hidden(name):
            continue
        incoming = jax.vmap(grapes_optax.node_importance)(kernel)
        share = np.asarray(incoming / incoming.mean(-1, keepdims=True))
        factor = np.asarray(jax.vmap(grapes_optax.importance_factor)(kernel))
        unbounded = partial(grapes_optax.importance_factor, bounds=None)
        free = np.asarray(jax.vmap(unbounded)(kernel))
        found[name] = {
            "factor_mean": round(float(factor.mean()), 5),
            "factor_std": round(float(factor.std(-1).mean()), 5),
            "at_lower_bound": round(float((free <= 1).mean()), 5),
            "histogram": np.histogram(free, np.linspace(0, 2, 41))[0].tolist(),
            "incoming": np.quantile(share, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).round(5).tolist(),
        }
    return found


# Training.


class Runner:
    """A cell, ready to train: what its units share, and so compile once."""

    def __init__(self, plan: Plan, cell: int, data: Data, source: Data | None = None):
        self.plan, self.cell, self.data, self.source = plan, plan.cells[cell], data, source
        self.model, self.method, self.prepare = build(self.cell, plan.dataset)
        batch, fewest = self.cell.setup.batch, len(data.train_labels) * 5 // 6
        if batch > fewest:
            raise ValueError(f"a batch of {batch} is more than the {fewest} images to train on")
        self.epoch = epoch_of(self.model, self.method, batch=batch, prepare=self.prepare)

    def correct(self, params: Any, data: Data) -> Array:
        return correct(self.model, self.prepare, params, data)

    def params(self, keys: Array, data: Data) -> Any:
        """Initial weights of every seed; the rows of keys are those of `seed_keys`.

        Where the run goes on from trained ones, these are trained plainly, in the authors' set-up,
        on the images that the run goes on with, on those of another set, or on permuted ones.
        """
        setup, epochs = self.cell.setup, self.plan.scale.before
        example = self.prepare(keys[0, 0], data.train_images[:1])
        params = initial_params(self.model, keys[0], example)
        if not setup.before:
            return params
        change, stays = CHANGES[setup.before]
        if not stays:
            other = permuted(data.train_images, 1)
            data = self.source or data._replace(train_images=other)
        plain = method(optax.sgd(AUTHORS.rate), PLAIN)
        state = start(self.model, plain, keys[:2], example, params)
        epoch = epoch_of(self.model, plain, batch=setup.batch, prepare=self.prepare)
        for key in keys[2 : 2 + epochs]:
            state, *_ = epoch(state, key, data)
        kernels, tree = jax.tree.flatten(state.params)
        return jax.tree.unflatten(tree, jax.vmap(change)(keys[0], kernels))


class Lanes:
    """A unit in training: the seeds of the first rate, then those of the second, and so on."""

    def __init__(self, runner: Runner, unit: Unit):
        self.runner, self.unit, self.task = runner, unit, 0
        plan, rates = runner.plan, len(unit.rates)
        self.tasks = plan.tasks
        self.observed = (0, unit.epochs) if plan.observe and unit.phase == REPORT else ()
        self.data = data = held_out(runner.data) if unit.phase == TUNING else runner.data
        tests = (permuted(data.test_images, task) for task in range(self.tasks))
        self.tests = [data._replace(test_images=images) for images in tests]
        keys = seed_keys(unit.seeds, unit.epochs + plan.scale.before)
        self.keys = jnp.tile(keys, (1, rates))
        params = runner.params(keys, data)
        params = jax.tree.map(lambda p: jnp.tile(p, (rates, *[1] * (p.ndim - 1))), params)
        example = runner.prepare(self.keys[0, 0], data.train_images[:1])
        state = start(runner.model, runner.method, self.keys[:2], example, params)
        of_lanes = jnp.repeat(jnp.array(unit.rates, jnp.float32), len(unit.seeds))
        self.state = state._replace(optimizer=at_rates(state.optimizer, of_lanes))
        self.shape = rates, len(unit.seeds)

    def line(self) -> dict[str, Any]:
        """The line of the unit."""
        one = jax.tree.map(lambda x: x[0], self.state.params)
        return {
            "kind": "unit",
            **self.unit._asdict(),
            "images": len(self.data.test_labels),
            "parameter_bytes": tree_bytes(one),
            "state_bytes": state_bytes(self.runner.cell, one),
        }

    def train(self, number: int) -> dict[str, Any]:
        """Trains the epoch of this number, from 1, and returns its line; 0 only tests."""
        line: dict[str, Any] = {"kind": "epoch", "epoch": number}
        if number:
            self.turn_to((number - 1) * self.tasks // self.unit.epochs)
            clock = time.perf_counter()
            key = self.keys[self.runner.plan.scale.before + number + 1]
            self.state, loss, steps = self.runner.epoch(self.state, key, self.data)
            loss = np.asarray(jax.block_until_ready(loss), float).reshape(self.shape)
            line["seconds"] = round(time.perf_counter() - clock, 4)
            line["loss"] = [rounded(of_rate) for of_rate in loss]
            line["steps"] = {
                name: [rounded(of_rate) for of_rate in np.asarray(s).reshape(self.shape)]
                for name, s in steps.items()
            }
            line["diverged"] = np.argwhere(~np.isfinite(loss)).tolist()
        right = [self.runner.correct(self.state.params, test) for test in self.tests]
        right = np.asarray(right).reshape(self.tasks, *self.shape)
        line["correct"] = right.transpose(1, 0, 2).tolist()
        if number in self.observed:
            line["layers"] = observe(self.state.params)
        return line

    def turn_to(self, task: int) -> None:
        if task != self.task:
            images = permuted(self.tests[0].train_images, task)
            self.data, self.task = self.data._replace(train_images=images), task


def rounded(values: np.ndarray) -> float | None:
    """The mean over the seeds whose value is finite, to five digits."""
    finite = values[np.isfinite(values)]
    return float(f"{finite.mean():.5g}") if len(finite) else None
