"""The file of a run: JSON Lines, written line by line, and read back as arrays.

    {"kind": "run", "plan": {...}, "command": ..., "versions": {...}, "commit": ..., ...}
    {"kind": "unit", "cell": 0, "phase": "same rate", "rates": [0.1], "seeds": [0, 1], ...}
    {"kind": "epoch", "epoch": 1, "loss": [[...]], "accuracy": [[[...]]], "seconds": 0.81}

A run line holds the full configuration, with all cells; a run that was resumed has several. A
unit trains one cell for one purpose; its epochs follow, beginning with 0, before training. The
axes of the loss are (rates, seeds), those of the accuracy (rates, tasks, seeds). What is not
finite is null.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.paper.cells import Cell, Setup
from examples.paper.experiments import Plan, Scale

NAME = "epochs.jsonl"
KEYS = {  # of each kind of line, without which it is damaged
    "run": {"plan"},
    "unit": {"cell", "phase", "epochs"},
    "epoch": {"epoch"},
}
TUNING, SAME, BEST = "tuning", "same rate", "best rate"


class Record(NamedTuple):
    """One unit: a cell trained to choose a learning rate, at the common one, or at its best."""

    cell: Cell
    phase: str
    rates: tuple[float, ...]
    accuracy: np.ndarray  # (1 + epochs, rates, tasks, seeds), in [0, 1]
    loss: np.ndarray  # (epochs, rates, seeds), of the training batches; nan if not finite
    seconds: np.ndarray  # (epochs,), of the training of all lanes, without the tests
    parameter_bytes: int  # of one network
    state_bytes: int  # of its optimizer
    layers: list[dict[str, Any]]  # by epoch, if they were observed

    @property
    def diverged(self) -> np.ndarray:
        """Which lanes (rates, seeds) met a loss that is not finite."""
        return np.logical_not(np.isfinite(self.loss).all(axis=0))


class Results(NamedTuple):
    plan: Plan
    runs: list[dict[str, Any]]  # the lines that say where, when and with what versions
    records: list[Record]


def as_json(plan: Plan) -> dict[str, Any]:
    cells = [{**vars(cell), "setup": vars(cell.setup)} for cell in plan.cells]
    values = plan._asdict() | {"scale": plan.scale._asdict(), "cells": cells}
    return json.loads(json.dumps(values))


def as_plan(values: dict[str, Any]) -> Plan:
    cells = [Cell(**{**cell, "setup": Setup(**cell["setup"])}) for cell in values["cells"]]
    return Plan(**{**values, "scale": Scale(**values["scale"]), "cells": cells})


def compact(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a kill cut off is not there yet."""
    text, lines = path.read_text() if path.exists() else "", []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if line.endswith("\n"):
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: damaged ({error})") from error
            if not isinstance(found, dict) or not KEYS.get(str(found.get("kind")), {""}) <= set(
                found
            ):
                raise ValueError(f"{path}, line {number}: damaged (no record of a run)")
            lines.append(found)
    return lines


def replace(path: Path, content: bytes) -> None:
    """Writes the whole file anew, or leaves it as it was, also where the power fails."""
    draft = path.with_suffix(".tmp")
    try:
        with draft.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the new name
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def record(cell: Cell, unit: dict[str, Any], epochs: list[dict[str, Any]]) -> Record:
    seeds, rates = len(unit["seeds"]), len(unit["rates"])
    loss = np.array([epoch["loss"] for epoch in epochs[1:]], float)
    return Record(
        cell,
        unit["phase"],
        tuple(unit["rates"]),
        np.array([epoch["accuracy"] for epoch in epochs], float),
        loss.reshape(len(epochs[1:]), rates, seeds),
        np.array([epoch["seconds"] for epoch in epochs[1:]], float),
        unit["parameter_bytes"],
        unit["state_bytes"],
        [epoch["layers"] for epoch in epochs if "layers" in epoch],
    )


def read(folder: Path) -> Results:
    """The results in a folder; of a run that is not finished, the units that are."""
    lines = lines_of(folder / NAME)
    runs = [line for line in lines if line["kind"] == "run"]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no results: there is no whole {NAME}")
    plan, units = as_plan(runs[0]["plan"]), []
    for line in lines:
        if line["kind"] == "unit":
            units.append((line, []))
        elif line["kind"] == "epoch":
            units[-1][1].append(line)
    records = [
        record(plan.cells[unit["cell"]], unit, epochs)
        for unit, epochs in units
        if len(epochs) == 1 + unit["epochs"]
    ]
    return Results(plan, runs, records)


def best_rate(tuned: Record) -> float:
    """The rate with the best validation accuracy at the end, over seeds and tasks.

    One at which a seed diverged is out, unless all are.
    """
    score = tuned.accuracy[-1].mean((1, 2)) - tuned.diverged.any(1)
    return tuned.rates[int(score.argmax())]
