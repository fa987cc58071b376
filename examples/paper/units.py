"""One unit: a cell at some learning rates on some seeds, trained at once, epoch by epoch."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import train_test_split

import grapes_optax
from examples.data import Data
from examples.paper.cells import at_rates, build, state_bytes, tree_bytes
from examples.paper.experiments import Plan
from examples.paper.records import BEST, SAME, TUNING
from examples.paper.training import accuracy, epoch_of, hidden, seed_keys, start

Array = jax.Array


class Unit(NamedTuple):
    """One cell at some learning rates on some seeds: what trains at once."""

    cell: int
    phase: str
    rates: tuple[float, ...]
    seeds: int
    epochs: int  # of all tasks

    @property
    def lanes(self) -> int:
        return len(self.rates) * self.seeds


def units_of(plan: Plan, cell: int, tuned: Callable[[], float]) -> Iterator[Unit]:
    """What a cell is trained for, in order: the last depends on what the first found."""
    scale, rate = plan.scale, plan.cells[cell].setup.rate
    if plan.grid:
        rates = tuple(rate * factor for factor in plan.grid)
        yield Unit(cell, TUNING, rates, scale.tuning_seeds, scale.tuning_epochs * plan.tasks)
    yield Unit(cell, SAME, (rate,), scale.seeds, scale.epochs * plan.tasks)
    if plan.grid and tuned() != rate:
        yield Unit(cell, BEST, (tuned(),), scale.seeds, scale.epochs * plan.tasks)


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


class Contender:
    """A cell, ready to train: what its units share, and so compile once."""

    def __init__(self, plan: Plan, cell: int, data: Data):
        self.plan, self.cell, self.data = plan, plan.cells[cell], data
        self.model, self.method, self.prepare = build(self.cell, plan.dataset)
        batch, fewest = self.cell.setup.batch, len(data.train_labels) * 5 // 6
        if batch > fewest:
            raise ValueError(f"a batch of {batch} is more than the {fewest} images to train on")
        self.epoch = epoch_of(self.model, self.method, batch=batch, prepare=self.prepare)

    def accuracy(self, params: Any, data: Data) -> Array:
        return accuracy(self.model, self.prepare, params, data)


class Lanes:
    """A unit in training: the seeds of the first rate, then those of the second, and so on."""

    def __init__(self, contender: Contender, unit: Unit):
        self.contender, self.unit, self.task = contender, unit, 0
        self.tasks = contender.plan.tasks
        self.observed = contender.plan.observe and unit.phase != TUNING
        self.data = data = held_out(contender.data) if unit.phase == TUNING else contender.data
        tests = (permuted(data.test_images, task) for task in range(self.tasks))
        self.tests = [data._replace(test_images=images) for images in tests]
        self.keys = jnp.tile(seed_keys(unit.seeds, unit.epochs), (1, len(unit.rates)))
        example = contender.prepare(self.keys[0, 0], data.train_images[:1])
        state = start(contender.model, contender.method, self.keys[:2], example)
        rates = jnp.repeat(jnp.array(unit.rates, jnp.float32), unit.seeds)
        self.state = state._replace(optimizer=at_rates(state.optimizer, rates))

    def told(self) -> dict[str, Any]:
        """The line of the unit."""
        one = jax.tree.map(lambda x: x[0], self.state.params)
        return {
            "kind": "unit",
            **self.unit._asdict(),
            "seeds": list(range(self.unit.seeds)),
            "parameter_bytes": tree_bytes(one),
            "state_bytes": state_bytes(self.contender.cell, one),
        }

    def train(self, number: int) -> dict[str, Any]:
        """Trains the epoch of this number, from 1, and returns its line; 0 only tests."""
        line: dict[str, Any] = {"kind": "epoch", "epoch": number}
        if number:
            self.turn_to((number - 1) * self.tasks // self.unit.epochs)
            clock = time.perf_counter()
            self.state, loss = self.contender.epoch(self.state, self.keys[number + 1], self.data)
            loss = np.asarray(jax.block_until_ready(loss), float).reshape(-1, self.unit.seeds)
            line["seconds"] = round(time.perf_counter() - clock, 4)
            line["loss"] = [[round(x, 6) if np.isfinite(x) else None for x in r] for r in loss]
        right = [self.contender.accuracy(self.state.params, test) for test in self.tests]
        right = np.asarray(right, float).reshape(self.tasks, -1, self.unit.seeds)
        line["accuracy"] = right.transpose(1, 0, 2).round(6).tolist()
        if self.observed:
            line["layers"] = observe(self.state.params)
        return line

    def turn_to(self, task: int) -> None:
        if task != self.task:
            images = permuted(self.tests[0].train_images, task)
            self.data, self.task = self.data._replace(train_images=images), task
