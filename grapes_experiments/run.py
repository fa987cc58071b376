"""Runs a plan cell by cell, in units that a killed run goes on with, bit for bit.

Every epoch is a line in the file at once; the state is saved by Orbax now and then. A run that
starts in the folder of an unfinished one drops the lines after the last saved state and goes on.
"""

import contextlib
import fcntl
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from examples.data import SETS, Data
from grapes_experiments import records
from grapes_experiments.cells import AUTHORS, Cell
from grapes_experiments.experiments import Plan
from grapes_experiments.units import Lanes, Runner, Unit, next_unit
from grapes_experiments.variants import PLAIN


def commit() -> str:
    """Of the checkout that this file is in, with "-dirty" if it was changed since."""
    git, here = "git describe --always --abbrev=40 --dirty", Path(__file__).parent
    with contextlib.suppress(OSError):
        return subprocess.run(git.split(), cwd=here, capture_output=True, text=True).stdout.strip()
    return ""  # there is no git


def surroundings() -> dict[str, Any]:
    """Versions, commit and device, as a run line has them."""
    packages = "jax", "jaxlib", "optax", "flax", "numpy", "grapes-optax"
    versions = {name: metadata.version(name) for name in packages}
    device = f"{jax.default_backend()} ({jax.devices()[0].device_kind})"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit() or "unknown",
        "device": f"{device}, {os.cpu_count()} cores",
    }


def locked(path: Path) -> int:
    """Holds a folder for this process alone, until the descriptor is closed or it dies."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OSError(
            f"{path}: another run is writing here. Wait for it, or choose another --out"
        ) from error
    return descriptor


@contextlib.contextmanager
def ctrl_c_waits() -> Iterator[None]:
    """Orbax, interrupted in the middle of a save, waits for minutes for itself."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


class Folder:
    """The file and the checkpoints of a run."""

    def __init__(self, path: Path, plan: Plan):
        self.plan, self.file = plan, path / records.NAME
        path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            held.callback(os.close, locked(path))
            self.open(path, records.as_json(plan), held)
            self.held = held.pop_all()

    def open(self, path: Path, wanted: dict[str, Any], held: contextlib.ExitStack) -> None:
        """What is in the folder, if it is of this plan."""
        lines = records.lines_of(self.file)
        for line in lines:
            if line["kind"] == "run" and line["plan"] != wanted:
                raise ValueError(
                    f"{path} holds another run ({'; '.join(differences(line['plan'], wanted))}):"
                    " choose another --out, or remove it"
                )
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        checkpoints = (path / "checkpoints").absolute()
        self.manager = ocp.CheckpointManager(checkpoints, options=options)

        def close(kind: Any, *_: Any) -> None:
            self.manager.close()
            if kind is None:  # nothing is left to resume
                shutil.rmtree(checkpoints)

        held.push(close)
        self.saved, self.units, self.written = time.monotonic(), {}, 0
        lines = self.trusted(lines)
        records.replace(self.file, "".join(map(records.compact, lines)).encode())
        for line in lines:
            self.note(line)
        for step in self.manager.all_steps():
            if step > self.written:  # of lines that somebody removed
                self.manager.delete(step)
        self.stream = held.enter_context(self.file.open("a"))

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *error: Any) -> None:
        self.held.__exit__(*error)

    def trusted(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The lines up to the last state that was saved, or to the last unit that is whole."""
        units = [i for i, line in enumerate(lines) if line["kind"] == "unit"]
        epochs = [i for i, line in enumerate(lines) if line["kind"] == "epoch"]
        ended = [lines[i]["epoch"] for i in epochs if i > max(units, default=0)][-1:]
        if not units or ended == [lines[units[-1]]["epochs"]]:
            return lines
        saved = self.manager.latest_step() or 0
        if 0 < saved <= len(epochs) and epochs[saved - 1] > units[-1]:
            return lines[: epochs[saved - 1] + 1]
        return lines[: units[-1]]

    def note(self, line: dict[str, Any]) -> None:
        if line["kind"] == "unit":
            key = line["cell"], line["phase"], tuple(line["rates"])
            self.unit = self.units[key] = line, []
        elif line["kind"] == "epoch":
            self.unit[1].append(line)
            self.written += 1

    def add(self, line: dict[str, Any]) -> None:
        self.stream.write(records.compact(line))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.note(line)

    def save(self, state: Any) -> None:
        with ctrl_c_waits():
            self.manager.save(self.written, args=ocp.args.StandardSave(state))
            self.manager.wait_until_finished()
        self.saved = time.monotonic()

    def restored(self, state: Any) -> Any:
        """The state that was saved after the last line, in the form of this one."""
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        return self.manager.restore(self.written, args=ocp.args.StandardRestore(like))

    def saved_ago(self) -> float:
        return time.monotonic() - self.saved

    def next_epoch(self, unit: Unit) -> int:
        """The first that is not in the file."""
        _, epochs = self.units.get((unit.cell, unit.phase, unit.rates), (None, []))
        return 1 + epochs[-1]["epoch"] if epochs else 0

    def whole(self, phase: str) -> dict[int, records.Record]:
        """What every cell was trained for in this phase, of all units that are whole."""
        found: dict[int, list[records.Record]] = {}
        for (cell, of, _), (unit, epochs) in self.units.items():
            if of == phase and epochs and epochs[-1]["epoch"] == unit["epochs"]:
                of_cell, classes = self.plan.cells[cell], SETS[self.plan.dataset].classes
                found.setdefault(cell, []).append(records.record(of_cell, unit, epochs, classes))
        return {cell: records.joined(of) for cell, of in found.items()}

    def todo(self) -> list[Unit]:
        """The next unit of every cell that is not complete; first the one that was begun."""
        tuned, reported = self.whole(records.TUNING), self.whole(records.REPORT)
        rates = {cell: record.rates for cell, record in reported.items()}
        units = (
            next_unit(self.plan, cell, tuned, rates.get(cell, ()))
            for cell in range(len(self.plan.cells))
        )
        return sorted(filter(None, units), key=lambda unit: not self.next_epoch(unit))

    def left(self, todo: list[Unit]) -> int:
        """About how many epochs of how many seeds are to be trained."""
        plan, scale = self.plan, self.plan.scale
        of_cell = scale.seeds * (1 + bool(plan.grid)) + scale.tuning_seeds * len(plan.grid)
        left = dict.fromkeys((unit.cell for unit in todo), of_cell * scale.epochs * plan.tasks)
        for (cell, *_), (unit, epochs) in self.units.items():
            if cell in left:
                trained = len(unit["rates"]) * len(unit["seeds"]) * max(len(epochs) - 1, 0)
                left[cell] -= trained
        return sum(max(left[unit.cell], unit.lanes * unit.epochs) for unit in todo)


DEFAULTS = vars(AUTHORS) | vars(PLAIN)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What another configuration has, and this one: "seeds: 2 → 3"."""
    texts = []
    for key in {**wanted, **found}:
        # The file leaves out what is as by default.
        before, after = ({**DEFAULTS, **plan}.get(key) for plan in (found, wanted))
        if isinstance(before, dict) and isinstance(after, dict):
            texts += differences(before, after)
        elif key == "cells" and isinstance(before, list) and isinstance(after, list):
            if len(before) != len(after):
                texts.append(f"cells: {len(before)} → {len(after)}")
            for one, other in zip(before, after, strict=False):
                texts += differences(one, other)
        elif before != after:
            texts.append(f"{key}: {shown(before)} → {shown(after)}")
    return list(dict.fromkeys(texts))


def shown(value: Any) -> str:
    return "none" if value in (None, [], {}, "") else str(value)


def run(
    plan: Plan,
    data: Data,
    out: Path,
    command: str = "",
    *,
    source: Data | None = None,
    save_every: float = 60.0,
    tensorboard: bool = False,
) -> bool:
    """Runs what is missing of a plan in a folder, and says whether anything was.

    The state is saved every so many seconds. `source` are the images that networks are
    trained on before they are transferred to those of the plan.
    """
    trained = False
    with Folder(out, plan) as folder, tqdm(unit="seed-epoch") as progress:
        line = {"command": command, **surroundings(), "plan": records.as_json(plan)}
        folder.add({"kind": "run", **line})
        runner = None
        while todo := folder.todo():
            unit, trained = todo[0], True
            cell = plan.cells[unit.cell]
            if not runner or runner.cell != cell:
                runner = Runner(plan, unit.cell, data, source)
            done = folder.next_epoch(unit)
            progress.set_description(f"{cell.panel}, {cell.name}")
            progress.total = progress.n + folder.left(todo)
            show = events(out, unit, cell) if tensorboard else contextlib.nullcontext()
            for epoch in resumed(folder, Lanes(runner, unit), done, save_every, show):
                progress.update(unit.lanes * ("loss" in epoch))
    return trained


def resumed(
    folder: Folder, lanes: Lanes, done: int, save_every: float, events: Any
) -> Iterator[dict[str, Any]]:
    """Trains a unit from the first epoch that is not in the file, line by line."""
    if done:
        lanes.state = folder.restored(lanes.state)
    else:
        folder.add(lanes.line())
    with events as writer:
        for number in range(done, 1 + lanes.unit.epochs):
            line = lanes.train(number)
            folder.add(line)
            if writer:
                show(writer, lanes, line)
            if 0 < number < lanes.unit.epochs and folder.saved_ago() > save_every:
                folder.save(lanes.state)
            yield line


# TensorBoard.


def events(out: Path, unit: Unit, cell: Cell) -> Any:
    name = "-".join([str(unit.cell), cell.panel, cell.name, unit.phase])
    path = out / "tensorboard" / re.sub(r"[^\w.-]+", "_", name)
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboardX is missing: pip install --group experiments"
        ) from error
    return tensorboardX.SummaryWriter(str(path))


def show(writer: Any, lanes: Lanes, line: dict[str, Any]) -> None:
    for row, rate in enumerate(lanes.unit.rates):
        for task, seeds in enumerate(line["correct"][row], start=1):
            tag, images = f"accuracy/rate_{rate:g}/task_{task}", len(lanes.data.test_labels)
            writer.add_scalar(tag, float(np.mean(seeds)) / images, line["epoch"])
        if "loss" in line and line["loss"][row] is not None:
            writer.add_scalar(f"loss/rate_{rate:g}", line["loss"][row], line["epoch"])
