"""One experiment for each claim of the paper: which cells, how long, and on how many seeds.

Every list of cells has the controls beside GRAPES. The scale of a preset is a row of a table.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from examples.paper.cells import AUTHORS, INITS, OPTIMIZERS, Cell
from examples.paper.networks import CELLS, SPIKING
from examples.paper.training import RULES

LOCAL = "local GRAPES", "local, mean factor", "local, neighbour's factor"
PROPAGATED = "propagated GRAPES", "propagated, mean factor", "propagated, neighbour's factor"
FORMS = "plain", *LOCAL, *PROPAGATED
# Of every rule: with DFA the two forms are the same, and the authors have one of their own.
OF_RULE = {
    "BP": FORMS,
    "FA": ("plain", *PROPAGATED, "propagated, not clipped"),
    "DFA": ("plain", *LOCAL, "authors' DFA"),
}
OTHER_FACTORS = (
    "local, not clipped",
    "local, by the mean node",
    "propagated, not clipped",
    "propagated, by the mean node",
)
# Factors of 2 around the learning rate at which all are compared, and of 4 where the gradient
# grows with every layer.
GRID = 1 / 4, 1 / 2, 1.0, 2.0, 4.0
WIDE_GRID = 1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0


class Choice(NamedTuple):
    """What the command line narrows an experiment down to."""

    rules: Sequence[str] = tuple(RULES)
    optimizers: Sequence[str] = tuple(OPTIMIZERS)
    panels: Sequence[str] = ()  # all
    smoke: bool = False

    def few(self, rows: Sequence[Any], count: int = 1) -> Sequence[Any]:
        return rows[:count] if self.smoke else rows


EVERYTHING = Choice()


def contenders(panel: str, variants: Sequence[str], rule: str = "BP", **setup: Any) -> list[Cell]:
    """Cells of the variants in one set-up; the learning rate is the optimizer's, if not given."""
    _, rate = OPTIMIZERS[setup.get("optimizer", AUTHORS.optimizer)]
    chosen = dataclasses.replace(AUTHORS, **{"rate": rate, **setup})
    return [Cell(panel, variant, rule, chosen) for variant in variants]


def accuracy(choice: Choice) -> list[Cell]:
    cells = []
    for optimizer in choice.few(choice.optimizers):
        for rule in choice.rules:
            cells += contenders(f"{rule}, {optimizer}", OF_RULE[rule], rule, optimizer=optimizer)
    return cells


def factors(choice: Choice) -> list[Cell]:
    cells = contenders("sgd", (*FORMS, *OTHER_FACTORS))
    for optimizer in choice.few(("rmsprop", "adam"), 0):
        variants = "plain", *LOCAL, "local, before the optimizer"
        cells += contenders(optimizer, variants, optimizer=optimizer)
    return cells


def depth(choice: Choice) -> list[Cell]:
    depths = choice.few((1, 2, 4, 8), 2)
    return [c for n in depths for c in contenders(f"depth {n}", FORMS, depth=n, width=128)]


def width(choice: Choice) -> list[Cell]:
    widths, variants = choice.few((16, 64, 256, 1024), 2), ("plain", *PROPAGATED)
    return [c for n in widths for c in contenders(f"width {n}", variants, width=n)]


def forgetting(choice: Choice) -> list[Cell]:
    return contenders("permuted pixels", FORMS, optimizer="momentum", rate=0.001)


def recurrent(choice: Choice) -> list[Cell]:
    """In a single recurrent layer the local form is the same as the propagated one."""
    setup = {"width": 64, "depth": 1, "batch": 32, "optimizer": "momentum", "rate": 0.03}
    cells = choice.few(tuple(CELLS))
    return [c for n in cells for c in contenders(n, ("plain", *PROPAGATED), network=n, **setup)]


def spiking(choice: Choice) -> list[Cell]:
    setup = {"width": 128, "depth": 1, "batch": 32, "optimizer": "adam", "rate": 0.002}
    cells = []
    for name in choice.few(tuple(SPIKING)):
        through = ("propagated, through time",) if "recurrent" in name else ()
        cells += contenders(name, (*FORMS, *through), network=name, **setup)
    return cells


def memory(choice: Choice) -> list[Cell]:
    variants = "plain", "local GRAPES", "propagated GRAPES"
    return [
        cell for name in choice.optimizers for cell in contenders(name, variants, optimizer=name)
    ]


def distribution(choice: Choice) -> list[Cell]:
    return contenders("BP, sgd", FORMS)


def spread(choice: Choice) -> list[Cell]:
    """Initial weights whose sums differ much more from node to node than He's."""
    inits = choice.few(tuple(INITS)[::-1], 2)
    return [cell for init in inits for cell in contenders(init, FORMS, init=init)]


class Scale(NamedTuple):
    """How long: seeds and epochs of what is reported, and of the choice of the learning rate."""

    seeds: int
    epochs: int  # of every task
    tuning_seeds: int
    tuning_epochs: int


class Experiment(NamedTuple):
    question: str
    cells: Callable[[Choice], list[Cell]]
    digits: Scale  # standard: an hour at most on two cores, and much less on the digits
    images: Scale  # standard, on the other sets
    grid: Sequence[float] = GRID  # times the learning rate of the set-up; () not to tune
    tasks: int = 1
    observe: bool = False  # the weights of every layer too


DENSE = Scale(10, 30, 2, 15), Scale(5, 8, 1, 3)
EXPERIMENTS: dict[str, Experiment] = {
    "accuracy": Experiment(
        "Does GRAPES end at a higher accuracy, and does it learn faster?", accuracy, *DENSE
    ),
    "factors": Experiment(
        "Does it matter how the factor is made, and where it acts?", factors, *DENSE
    ),
    "depth": Experiment(
        "Does GRAPES help more in deeper networks?",
        depth,
        Scale(10, 30, 2, 15),
        Scale(5, 5, 1, 2),
        WIDE_GRID,
    ),
    "width": Experiment(
        "Does GRAPES help more in wider networks?", width, Scale(10, 30, 2, 15), Scale(5, 5, 1, 2)
    ),
    "forgetting": Experiment(
        "Does GRAPES forget less of earlier tasks?",
        forgetting,
        Scale(10, 20, 2, 10),
        Scale(5, 2, 1, 1),
        tasks=5,
    ),
    "recurrent": Experiment(
        "Does GRAPES help in recurrent networks?",
        recurrent,
        Scale(10, 20, 2, 10),
        Scale(5, 2, 1, 1),
    ),
    "spiking": Experiment(
        "Does GRAPES help in spiking networks?", spiking, Scale(5, 10, 1, 3), Scale(5, 1, 1, 1)
    ),
    "memory": Experiment(
        "How much memory does GRAPES need?", memory, Scale(1, 0, 0, 0), Scale(1, 0, 0, 0), ()
    ),
    "distribution": Experiment(
        "How do the weights and the factors move?",
        distribution,
        Scale(10, 30, 0, 0),
        Scale(5, 8, 0, 0),
        (),
        observe=True,
    ),
    "spread": Experiment(
        "Do the real factors help where they differ much from node to node?",
        spread,
        *DENSE,
        observe=True,
    ),
}
# One run serves both.
SAME_RUN = {"convergence": "accuracy"}
PRESETS = "smoke", "standard", "full"


def scale_of(experiment: Experiment, preset: str, dataset: str) -> Scale:
    """The paper's own length is 200 epochs and 10 runs."""
    standard = experiment.digits if dataset == "digits" else experiment.images
    if not standard.epochs or preset == "standard":
        return standard
    scale = {"smoke": Scale(2, 2, 2, 1), "full": Scale(10, 200, 2, 20)}[preset]
    return scale if experiment.grid else scale._replace(tuning_seeds=0, tuning_epochs=0)


class Plan(NamedTuple):
    """All that settles the numbers of a run."""

    experiment: str
    dataset: str
    preset: str
    scale: Scale
    tasks: int
    grid: Sequence[float]
    observe: bool
    cells: Sequence[Cell]


def plan(
    name: str,
    preset: str = "standard",
    dataset: str = "digits",
    choice: Choice = EVERYTHING,
    seeds: int | None = None,
    epochs: int | None = None,
    **setup: Any,
) -> Plan:
    """What will be run. `setup` changes fields of the set-up of all cells."""
    name = SAME_RUN.get(name, name)
    experiment, smoke = EXPERIMENTS[name], preset == "smoke"
    scale = scale_of(experiment, preset, dataset)
    scale = scale._replace(seeds=seeds or scale.seeds, epochs=epochs or scale.epochs)
    cells, grid = experiment.cells(choice._replace(smoke=smoke)), experiment.grid
    panels = list(dict.fromkeys(cell.panel for cell in cells))
    for panel in choice.panels:
        if panel not in panels:
            raise ValueError(f"there is no panel {panel!r} (there are {', '.join(panels)})")
    cells = [cell for cell in cells if cell.panel in (choice.panels or panels)]
    if setup.get("network", AUTHORS.network) != AUTHORS.network:  # it is for dense layers
        cells = [cell for cell in cells if cell.variant != "authors' DFA"]
    if smoke:  # compilation takes most of the time
        form = {"DFA": LOCAL}
        cells = [c for c in cells if c.variant in ("plain", *form.get(c.rule, PROPAGATED)[:2])]
        grid = (1.0, 2.0) if name == "factors" else ()
    cells = [dataclasses.replace(c, setup=dataclasses.replace(c.setup, **setup)) for c in cells]
    return Plan(name, dataset, preset, scale, experiment.tasks, grid, experiment.observe, cells)
