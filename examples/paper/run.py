"""Runs a plan cell by cell, in units that a killed run goes on with, bit for bit.

Every epoch is a line in the file at once; the state is saved by Orbax now and then. A run that
starts in the folder of an unfinished one drops the lines after the last saved state and goes on.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import grapes_optax
from examples.data import Data, package
from examples.paper import records
from examples.paper.cells import at_rates, build, state_bytes, tree_bytes
from examples.paper.experiments import Plan
from examples.paper.records import BEST, SAME, TUNING, Record
from examples.training import accuracy, epoch_of, hidden, seed_keys, start

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


# One unit.


def observe(params: Any) -> dict[str, Any]:
    """Incoming weights and factors of the hidden kernels, over the nodes of all seeds."""
    found = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel") or not hidden(name):
            continue
        sums = jax.vmap(grapes_optax.node_importance)(kernel)
        share = np.asarray(sums / sums.mean(-1, keepdims=True))
        factor = np.asarray(jax.vmap(grapes_optax.importance_factor)(kernel))
        free = np.asarray(
            jax.vmap(lambda k: grapes_optax.importance_factor(k, bounds=None))(kernel)
        )
        found[name] = {
            "factor_mean": round(float(factor.mean()), 5),
            "factor_std": round(float(factor.std(-1).mean()), 5),
            "at_lower_bound": round(float((free <= 1).mean()), 5),
            "histogram": np.histogram(free, np.linspace(0, 2, 41))[0].tolist(),
            "incoming": np.quantile(share, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).round(5).tolist(),
        }
    return found


class Lanes:
    """A unit in training: the seeds of the first rate, then those of the second, and so on."""

    def __init__(self, plan: Plan, unit: Unit, built: Any, epoch: Any, data: Data):
        self.model, method, self.prepare = built
        self.plan, self.unit, self.epoch = plan, unit, epoch
        data = held_out(data) if unit.phase == TUNING else data
        self.data, self.task = data, 0
        self.tests = [
            data._replace(test_images=permuted(data.test_images, task))
            for task in range(plan.tasks)
        ]
        self.keys = jnp.tile(seed_keys(unit.seeds, unit.epochs), (1, len(unit.rates)))
        example = self.prepare(self.keys[0, 0], data.train_images[:1])
        state = start(self.model, method, self.keys[:2], example)
        rates = jnp.repeat(jnp.array(unit.rates, jnp.float32), unit.seeds)
        self.state = state._replace(optimizer=at_rates(state.optimizer, rates))
        self.parameter_bytes = tree_bytes(state.params) // unit.lanes
        one = jax.tree.map(lambda x: x[0], state.params)
        self.state_bytes = state_bytes(plan.cells[unit.cell], one)

    def train(self, number: int) -> dict[str, Any]:
        """Trains the epoch of this number, from 1, and tells of it; 0 tells of the start."""
        told: dict[str, Any] = {"kind": "epoch", "epoch": number}
        if number:
            task = (number - 1) * self.plan.tasks // self.unit.epochs
            if task != self.task:
                images = permuted(self.tests[0].train_images, task)
                self.data, self.task = self.data._replace(train_images=images), task
            clock = time.perf_counter()
            self.state, loss = self.epoch(self.state, self.keys[number + 1], self.data)
            loss = np.asarray(jax.block_until_ready(loss), float).reshape(-1, self.unit.seeds)
            told["seconds"] = round(time.perf_counter() - clock, 4)
            told["loss"] = [[round(x, 6) if np.isfinite(x) else None for x in r] for r in loss]
        right = [accuracy(self.model, self.prepare, self.state.params, t) for t in self.tests]
        right = np.asarray(right, float).reshape(len(self.tests), -1, self.unit.seeds)
        told["accuracy"] = right.transpose(1, 0, 2).round(6).tolist()
        if self.plan.observe and self.unit.phase != TUNING:
            told["layers"] = observe(self.state.params)
        return told


# All of them.


def surroundings() -> dict[str, Any]:
    """Versions, commit and device, as a run line has them."""
    packages = "jax", "jaxlib", "optax", "flax", "numpy", "grapes-optax"
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "commit": found.stdout.strip() or "unknown",
        "device": f"{device.platform}: {device.device_kind}, {os.cpu_count()} CPU cores",
    }


class Folder:
    """The file and the checkpoints of a run."""

    def __init__(self, path: Path, plan: Plan, command: str):
        self.file, wanted = path / records.NAME, records.as_json(plan)
        path.mkdir(parents=True, exist_ok=True)
        lines = records.lines_of(self.file)
        for line in lines:
            if line["kind"] == "run" and line["plan"] != wanted:
                differ = [key for key in wanted if line["plan"].get(key) != wanted[key]]
                raise ValueError(
                    f"{path} holds another run, which differs in {', '.join(differ)}: choose"
                    " another --out, or remove it"
                )
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = ocp.CheckpointManager((path / "checkpoints").absolute(), options=options)
        self.saved, self.units, self.written = time.monotonic(), {}, 0
        lines = self.trusted(lines)
        records.replace(self.file, lines)
        for line in lines:
            self.note(line)
        self.stream = self.file.open("a")
        self.add({"kind": "run", "command": command, **surroundings(), "plan": wanted})

    def trusted(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines up to the last state that was saved, or to the last unit that is whole."""
        units = [i for i, line in enumerate(lines) if line["kind"] == "unit"]
        epochs = [i for i, line in enumerate(lines) if line["kind"] == "epoch"]
        if not units or len([i for i in epochs if i > units[-1]]) > lines[units[-1]]["epochs"]:
            return lines
        saved = self.manager.latest_step() or 0
        if saved and epochs[saved - 1] > units[-1]:
            return lines[: epochs[saved - 1] + 1]
        return lines[: units[-1]]

    def note(self, line: dict[str, Any]) -> None:
        if line["kind"] == "unit":
            self.unit = self.units[line["cell"], line["phase"]] = line, []
        elif line["kind"] == "epoch":
            self.unit[1].append(line)
            self.written += 1

    def add(self, line: dict[str, Any]) -> None:
        self.stream.write(records.compact(line))
        self.stream.flush()
        self.note(line)

    def save(self, state: Any) -> None:
        self.manager.save(self.written, args=ocp.args.StandardSave(state))
        self.manager.wait_until_finished()
        self.saved = time.monotonic()

    def restored(self, state: Any) -> Any:
        """The state that was saved after the last line, in the form of this one."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return self.manager.restore(self.written, args=ocp.args.StandardRestore(like))

    def record(self, cell: int, phase: str, plan: Plan) -> Record:
        return records.record(plan.cells[cell], *self.units[cell, phase])


def run(
    plan: Plan,
    data: Data,
    out: Path,
    command: str = "",
    *,
    save_every: float = 60.0,
    tensorboard: bool = False,
) -> None:
    """Runs what is missing of a plan in a folder. The state is saved every so many seconds."""
    folder = Folder(out, plan, command)
    scale = plan.scale
    of_cell = scale.epochs * scale.seeds * (1 + bool(plan.grid))
    of_cell += scale.tuning_epochs * scale.tuning_seeds * len(plan.grid)
    with tqdm(total=of_cell * plan.tasks * len(plan.cells), unit="seed-epoch") as progress:
        for index, cell in enumerate(plan.cells):
            progress.set_description(f"{cell.panel}, {cell.variant}")
            built = build(cell, plan.dataset)
            model, method, prepare = built
            epoch = epoch_of(model, method, batch=cell.setup.batch, prepare=prepare)

            def tuned(index=index):
                return records.best_rate(folder.record(index, TUNING, plan))

            left = of_cell * plan.tasks
            for unit in units_of(plan, index, tuned):
                left -= unit.lanes * unit.epochs
                train(plan, unit, folder, built, epoch, data, progress, save_every, tensorboard)
            progress.total -= left  # where the best learning rate is the common one
            progress.refresh()
    folder.stream.close()
    folder.manager.close()
    shutil.rmtree(out / "checkpoints")


def train(
    plan: Plan,
    unit: Unit,
    folder: Folder,
    built: Any,
    epoch: Any,
    data: Data,
    progress: tqdm,
    save_every: float,
    tensorboard: bool,
) -> None:
    _, done = folder.units.get(unit[:2], (None, []))
    progress.total -= unit.lanes * len(done[1:])
    if len(done) == 1 + unit.epochs:
        return
    lanes = Lanes(plan, unit, built, epoch, data)
    if done:
        lanes.state = folder.restored(lanes.state)
    else:
        folder.add(
            {
                "kind": "unit",
                **unit._asdict(),
                "seeds": list(range(unit.seeds)),
                "parameter_bytes": lanes.parameter_bytes,
                "state_bytes": lanes.state_bytes,
            }
        )
    with events(folder, unit, plan) if tensorboard else contextlib.nullcontext() as writer:
        for number in range(len(done), 1 + unit.epochs):
            line = lanes.train(number)
            folder.add(line)
            if writer:
                show(writer, unit, line)
            if number and number < unit.epochs and time.monotonic() - folder.saved > save_every:
                folder.save(lanes.state)
            progress.update(unit.lanes * bool(number))


# TensorBoard.


def events(folder: Folder, unit: Unit, plan: Plan) -> Any:
    cell = plan.cells[unit.cell]
    name = "-".join([str(unit.cell), cell.panel, cell.variant, unit.phase])
    path = folder.file.parent / "tensorboard" / re.sub(r"[^\w.-]+", "_", name)
    return package("tensorboardX").SummaryWriter(str(path))


def show(writer: Any, unit: Unit, line: dict[str, Any]) -> None:
    for rate, of_rate in zip(unit.rates, line["accuracy"], strict=True):
        for task, seeds in enumerate(of_rate):
            tag = f"accuracy/rate {rate:g}" + f", task {task + 1}" * (len(of_rate) > 1)
            writer.add_scalar(tag, float(np.mean(seeds)), line["epoch"])
    for rate, seeds in zip(unit.rates, line.get("loss", []), strict=False):
        if None not in seeds:
            writer.add_scalar(f"loss/rate {rate:g}", float(np.mean(seeds)), line["epoch"])
