"""The file of a run: JSON Lines, written line by line, and read back as arrays.

    {"kind": "run", "plan": {...}, "command": ..., "versions": {...}, "commit": ..., ...}
    {"kind": "unit", "cell": 0, "phase": "report", "rates": [0.1], "seeds": [0, 1], ...}
    {"kind": "epoch", "epoch": 1, "loss": [0.3], "correct": [[[430, 431]]], "seconds": 0.81, ...}

A run line holds the full configuration, with all cells; a run that was resumed has several. A
unit trains one cell for one purpose; its epochs follow, beginning with 0, before training. The
axes of what is correct are (rates, tasks, seeds); the loss and the lengths of the steps are means
over the seeds of each rate that are finite; `diverged` lists the others, by rate and seed.
"""

import itertools
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.data import SETS
from grapes_experiments.cells import AUTHORS, Cell, Setup
from grapes_experiments.experiments import Plan, Scale
from grapes_experiments.variants import Variant

NAME = "epochs.jsonl"
KEYS = {  # of each kind of line, without which it is damaged
    "run": {"plan"},
    "unit": {"cell", "phase", "rates", "seeds", "epochs", "images"},
    "epoch": {"epoch", "correct"},
}
TUNING, REPORT = "tuning", "report"


class Record(NamedTuple):
    """A cell trained at some rates: to choose one of them, or to report what they do."""

    cell: Cell
    phase: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: np.ndarray  # (k,), the numbers of those that the file has; from 0 to the last
    accuracy: np.ndarray  # (k, rates, tasks, seeds), in [0, 1]; chance where training diverged
    diverged: np.ndarray  # (rates, seeds): loss not finite, or at the level of chance at the end
    loss: np.ndarray  # (k, rates); nan before training and where no seed is finite
    steps: dict[str, np.ndarray]  # length of a step of each kernel, (k, rates) likewise
    seconds: np.ndarray  # (k,), of the training of all lanes, without the tests; nan at 0
    parameter_bytes: int  # of one network
    state_bytes: int  # of its optimizer
    layers: list[dict[str, Any]]  # before and after, if they were observed

    def at(self, rate: float) -> "Record":
        """This rate alone; the axes stay."""
        row = [self.rates.index(rate)]
        return self._replace(
            rates=(rate,),
            accuracy=self.accuracy[:, row],
            diverged=self.diverged[row],
            loss=self.loss[:, row],
            steps={name: steps[:, row] for name, steps in self.steps.items()},
        )


class Results(NamedTuple):
    plan: Plan
    runs: list[dict[str, Any]]  # the lines that say where, when and with what versions
    tuning: dict[Cell, Record]  # with the rates of all units of the cell, in order
    report: dict[Cell, Record]  # at the common rate, and at what may be the best

    @property
    def missing(self) -> list[Cell]:
        """Cells that are not whole yet."""
        return [cell for cell in self.plan.cells if cell not in self.report]


def changed(value: Any, default: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not those of the default."""
    return {k: v for k, v in vars(value).items() if v != vars(default)[k]}


def as_json(plan: Plan) -> dict[str, Any]:
    cells = [
        {
            "panel": cell.panel,
            "variant": changed(cell.variant, Variant()),
            "rule": cell.rule,
            "setup": changed(cell.setup, AUTHORS),
        }
        for cell in plan.cells
    ]
    return json.loads(json.dumps(plan._asdict() | {"scale": plan.scale._asdict(), "cells": cells}))


def as_plan(values: dict[str, Any]) -> Plan:
    cells = [
        Cell(c["panel"], Variant(**c["variant"]), c["rule"], Setup(**c["setup"]))
        for c in values["cells"]
    ]
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


def record(cell: Cell, unit: dict[str, Any], epochs: list[dict[str, Any]], classes: int) -> Record:
    correct = np.array([epoch["correct"] for epoch in epochs], float)
    accuracy = correct / unit["images"]
    finite = np.ones((len(epochs), len(unit["rates"]), len(unit["seeds"])), bool)
    for row, epoch in enumerate(epochs):
        for rate, seed in epoch.get("diverged", ()):
            finite[row, rate, seed] = False
    finite = np.logical_and.accumulate(finite)
    collapsed = accuracy[-1].mean(1) <= 1.2 / classes
    by_rate = [None] * len(unit["rates"])

    def column(of: Any) -> np.ndarray:
        return np.array([of(epoch) if epoch["epoch"] else by_rate for epoch in epochs], float)

    trained = epochs[-1] if epochs[-1]["epoch"] else {}
    return Record(
        cell,
        unit["phase"],
        tuple(unit["rates"]),
        tuple(unit["seeds"]),
        np.array([epoch["epoch"] for epoch in epochs]),
        np.where(finite[:, :, None], accuracy, 1 / classes),
        ~finite[-1] | (collapsed if trained else False),
        column(lambda epoch: epoch["loss"]),
        {
            name: column(lambda epoch, n=name: epoch["steps"][n])
            for name in trained.get("steps", ())
        },
        np.array([epoch.get("seconds") for epoch in epochs], float),
        unit["parameter_bytes"],
        unit["state_bytes"],
        [epoch["layers"] for epoch in epochs if "layers" in epoch],
    )


def joined(records: Sequence[Record]) -> Record:
    """The records of one cell at different rates, in order of these."""
    of_rate = sorted((r.at(rate) for r in records for rate in r.rates), key=lambda r: r.rates)
    return records[0]._replace(
        rates=tuple(r.rates[0] for r in of_rate),
        accuracy=np.concatenate([r.accuracy for r in of_rate], 1),
        diverged=np.concatenate([r.diverged for r in of_rate]),
        loss=np.concatenate([r.loss for r in of_rate], 1),
        steps={n: np.concatenate([r.steps[n] for r in of_rate], 1) for n in records[0].steps},
    )


def read(folder: Path) -> Results:
    """The results in a folder; of a run that is not finished, the units that are."""
    path = folder / NAME
    lines = lines_of(path)
    runs = [line for line in lines if line["kind"] == "run"]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no results: there is no whole {NAME}")
    plan, units = as_plan(runs[0]["plan"]), []
    for number, line in enumerate(lines, start=1):
        if line["kind"] == "unit":
            units.append((line, []))
        elif line["kind"] == "epoch":
            if not units:
                raise ValueError(f"{path}, line {number}: damaged (an epoch of no unit)")
            units[-1][1].append(line)
    classes, found = SETS[plan.dataset].classes, {TUNING: {}, REPORT: {}}
    for unit, epochs in units:
        if epochs and epochs[-1]["epoch"] == unit["epochs"]:
            cell = plan.cells[unit["cell"]]
            made = record(cell, unit, epochs, classes)
            found[unit["phase"]].setdefault(cell, []).append(made)
    by_cell = ({cell: joined(of) for cell, of in found[phase].items()} for phase in found)
    return Results(plan, runs, *by_cell)


# The choice of a learning rate.


class Choice(NamedTuple):
    """The best rate on what was held out, and what other seeds would have chosen."""

    rate: float
    shares: dict[float, float]  # of all resamples of the seeds, the share that chose each rate
    inside: bool  # of the rates that were tried, not on their edge


@cache
def resamples(n: int) -> np.ndarray:
    """Rows of n indices: all n ** n of them where these are few, or else 10,000 at random."""
    if n**n <= 10_000:
        return np.array(list(itertools.product(range(n), repeat=n)))
    return np.random.default_rng(0).integers(n, size=(10_000, n))


def choice(tuned: Record) -> Choice:
    """By the mean accuracy at the end, over seeds and tasks; of equal ones, the least rate."""
    scores = tuned.accuracy[-1].mean(1)  # (rates, seeds)
    best = int(scores.mean(1).argmax())
    drawn = scores[:, resamples(scores.shape[1])].mean(2).argmax(0)
    shares = np.bincount(drawn, minlength=len(scores)) / len(drawn)
    chosen = {rate: float(share) for rate, share in zip(tuned.rates, shares, strict=True) if share}
    return Choice(tuned.rates[best], chosen, 0 < best < len(tuned.rates) - 1)


def candidates(found: Choice) -> list[float]:
    """The best rate, and every other that at least one of twenty resamples chose."""
    return [found.rate, *(r for r, s in found.shares.items() if s >= 0.05 and r != found.rate)]


MOST_RATES = 17


def covers(tuned: Record, rate: float) -> bool:
    """Whether a rate is within those that were tried, but for rounding."""
    return 0.999 * tuned.rates[0] < rate < 1.001 * tuned.rates[-1]


def further(tuned: Record, others: Sequence[float] = ()) -> tuple[float, ...]:
    """Two more rates on the side where the best lies on the edge; none where it lies inside.

    And on the side where the best of another variant lies that was not tried: a search over rates
    finds the next peak, so variants that are compared are searched over the same peaks.
    """
    found = choice(tuned)
    missed = [rate for rate in others if not covers(tuned, rate)]
    wanted = missed if found.inside else [found.rate, *missed]
    if not wanted or len(tuned.rates) >= MOST_RATES:
        return ()
    ratio, low, high = tuned.rates[1] / tuned.rates[0], tuned.rates[0], tuned.rates[-1]
    if min(wanted) <= low:
        return (low / ratio**2, low / ratio)
    return (high * ratio, high * ratio**2)


# What is committed.

KEPT = {*range(9), 10, 12, 15, 20, 25, 30, 40, 50, 60, 70, 80, 100, 120, 140, 160, 180}


def shortened(lines: Sequence[dict[str, Any]], tasks: int) -> list[dict[str, Any]]:
    """What a report needs: of tuning the end alone, of long curves some of the epochs.

    Of several tasks, the end of each.
    """
    kept, unit = [], {}
    for line in lines:
        if line["kind"] == "unit":
            unit = line
        if line["kind"] == "epoch":
            number, last = line["epoch"], unit["epochs"]
            ends = {last * (task + 1) // tasks for task in range(tasks)}
            wanted = {last} if unit["phase"] == TUNING else ends | (KEPT if tasks == 1 else {0})
            if number not in wanted:
                continue
            if unit["phase"] == TUNING:
                line = {k: v for k, v in line.items() if k != "steps"}
        kept.append(line)
    return kept
