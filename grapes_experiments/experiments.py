"""One experiment for each claim of the paper: which cells, how long, and on how many seeds.

Every list of cells has the controls beside GRAPES. The scale of a preset is a row of a table.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from grapes_experiments.cells import AUTHORS, INITS, OPTIMIZERS, Cell
from grapes_experiments.changes import CHANGES
from grapes_experiments.networks import CELLS, SPIKING
from grapes_experiments.variants import (
    LOCAL,
    OUTGOING,
    PLAIN,
    PROPAGATED,
    RATE,
    RULES,
    Variant,
    with_controls,
)

replace = dataclasses.replace
EVERY = [PLAIN, RATE, *with_controls(LOCAL), *with_controls(PROPAGATED)]
# Where a network takes long to train, or much is compared.
FORMS = [
    PLAIN,
    *with_controls(LOCAL, "mean", "norm", "reverse"),
    *with_controls(PROPAGATED, "mean", "reverse"),
]
BACKWARD = [PLAIN, *with_controls(PROPAGATED)]
# With direct feedback alignment the two forms are the same, and the authors have one of their own.
OF_RULE = {
    "BP": EVERY,
    "FA": [PLAIN, RATE, *with_controls(PROPAGATED), replace(PROPAGATED, clipped=False)],
    "DFA": [
        *(PLAIN, RATE, *with_controls(LOCAL, "mean", "norm", "roll", "reverse")),
        *with_controls(OUTGOING),
    ],
}
OTHER_FACTORS = [
    replace(form, **changed)
    for form in (LOCAL, PROPAGATED)
    for changed in ({"clipped": False}, {"normalization": "mean"})
]
# Factors of 2 around the learning rate at which all are compared, and of 4 where the gradient
# grows with every layer. A grid whose best rate lies on its edge is extended.
GRID = 1 / 2, 1.0, 2.0, 4.0, 8.0
WIDE_GRID = 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0


class Choice(NamedTuple):
    """What the command line narrows an experiment down to."""

    rules: Sequence[str] = tuple(RULES)
    optimizers: Sequence[str] = tuple(OPTIMIZERS)
    panels: Sequence[str] = ()  # all
    smoke: bool = False

    def few(self, rows: Sequence[Any], count: int = 1) -> Sequence[Any]:
        return rows[:count] if self.smoke else rows


EVERYTHING = Choice()


def compared(panel: str, variants: Sequence[Variant], rule: str = "BP", **setup: Any) -> list[Cell]:
    """Cells of the variants in one set-up; the learning rate is the optimizer's, if not given."""
    _, rate = OPTIMIZERS[setup.get("optimizer", AUTHORS.optimizer)]
    chosen = replace(AUTHORS, **{"rate": rate, **setup})
    return [Cell(panel, variant, rule, chosen) for variant in variants]


def accuracy(choice: Choice) -> list[Cell]:
    """All controls with SGD; what the other optimizers make of GRAPES, beside fewer of them."""
    cells = []
    for optimizer in choice.few(choice.optimizers):
        for rule in choice.rules:
            panel = f"{rule}, {optimizer}"
            if optimizer == "sgd":
                cells += compared(panel, OF_RULE[rule], rule)
            elif rule == "BP":
                cells += compared(panel, FORMS, optimizer=optimizer)
    return cells


def length(choice: Choice) -> list[Cell]:
    del choice
    local, propagated = (
        with_controls(form, "mean", "roll", "reverse") for form in (LOCAL, PROPAGATED)
    )
    norm = LOCAL.against("norm")
    return compared("BP, sgd", [PLAIN, *propagated, *local, norm, RATE])


def factors(choice: Choice) -> list[Cell]:
    cells = compared("sgd", [*FORMS, *OTHER_FACTORS])
    before = with_controls(Variant("before"), "mean", "norm", "reverse")
    local = with_controls(LOCAL, "mean", "norm", "reverse")
    for optimizer in choice.few(("rmsprop", "adam"), 0):
        cells += compared(optimizer, [PLAIN, *local, *before], optimizer=optimizer)
    return cells


def depth(choice: Choice) -> list[Cell]:
    depths = choice.few((1, 2, 4, 8), 2)
    return [c for n in depths for c in compared(f"depth {n}", FORMS, depth=n, width=128)]


def width(choice: Choice) -> list[Cell]:
    widths = choice.few((16, 64, 256, 1024), 2)
    return [c for n in widths for c in compared(f"width {n}", BACKWARD, width=n)]


def rates(choice: Choice) -> list[Cell]:
    return [
        cell
        for rate in choice.few((0.003, 0.01, 0.03), 2)
        for cell in compared(f"rate {rate:g}", FORMS, rate=rate)
    ]


def forgetting(choice: Choice) -> list[Cell]:
    del choice
    return compared("permuted pixels", FORMS, optimizer="momentum", rate=0.001)


def recurrent(choice: Choice) -> list[Cell]:
    """In a single recurrent layer the local form is the same as the propagated one."""
    setup = {"width": 64, "depth": 1, "optimizer": "momentum", "rate": 0.03}
    cells = choice.few(tuple(CELLS))
    return [c for n in cells for c in compared(n, BACKWARD, network=n, **setup)]


def spiking(choice: Choice) -> list[Cell]:
    """With SGD, for Adam would cancel the propagated factor of a single layer of neurons."""
    setup = {"width": 128, "depth": 1, "optimizer": "momentum", "rate": 0.1}
    cells = []
    for name in choice.few(tuple(SPIKING)):
        through = [replace(PROPAGATED, through_time=True)] if "recurrent" in name else []
        cells += compared(name, [*FORMS, *through], network=name, **setup)
    return cells


def convolutional(choice: Choice) -> list[Cell]:
    del choice
    setup = {"width": 8, "depth": 3, "optimizer": "momentum", "rate": 0.03}
    return compared("convolutional", FORMS, network="convolutional", **setup)


def memory(choice: Choice) -> list[Cell]:
    variants = [PLAIN, LOCAL, PROPAGATED]
    return [c for name in choice.optimizers for c in compared(name, variants, optimizer=name)]


def distribution(choice: Choice) -> list[Cell]:
    del choice
    return compared("BP, sgd", FORMS)


def spread(choice: Choice) -> list[Cell]:
    """Initial weights whose sums differ much more from node to node than He's, the first."""
    inits = choice.few(tuple(INITS)[:0:-1], 2)
    return [cell for init in inits for cell in compared(init, EVERY, init=init)]


def finetuning(choice: Choice) -> list[Cell]:
    """Networks whose nodes differ because of what was done to them."""
    changes = choice.few(tuple(CHANGES))
    return [c for name in changes for c in compared(name, FORMS, before=name, rate=0.03)]


class Scale(NamedTuple):
    """How long: seeds and epochs of what is reported, and of what chooses the learning rates."""

    seeds: int
    epochs: int  # of every task
    tuning_seeds: int = 5
    before: int = 0  # epochs of plain training before the run


class Experiment(NamedTuple):
    question: str
    cells: Callable[[Choice], list[Cell]]
    digits: Scale  # standard
    images: Scale  # standard, on the other sets
    grid: Sequence[float] = GRID  # times the learning rate of the set-up; () not to tune
    tasks: int = 1
    observe: bool = False  # the factors of every layer, before and after


DENSE = Scale(10, 30), Scale(10, 10)
EXPERIMENTS: dict[str, Experiment] = {
    "accuracy": Experiment(
        "Does GRAPES end at a higher accuracy, and does it learn faster?", accuracy, *DENSE
    ),
    "length": Experiment(
        "What is left of a gain after the 200 epochs of the paper?",
        length,
        Scale(10, 200),
        Scale(10, 200),
    ),
    "factors": Experiment(
        "Does it matter how the factor is made, and where it acts?", factors, *DENSE
    ),
    "depth": Experiment("Does GRAPES help more in deeper networks?", depth, *DENSE, WIDE_GRID),
    "width": Experiment("Does GRAPES help more in wider networks?", width, *DENSE),
    "rates": Experiment("Does GRAPES help at small learning rates?", rates, *DENSE, ()),
    "forgetting": Experiment(
        "Does GRAPES forget less of earlier tasks?",
        forgetting,
        Scale(10, 20),
        Scale(10, 2),
        (1.0, 2.0, 4.0, 8.0, 16.0),
        tasks=5,
    ),
    "recurrent": Experiment(
        "Does GRAPES help in recurrent networks?", recurrent, Scale(10, 20), Scale(10, 2)
    ),
    "spiking": Experiment(
        "Does GRAPES help in spiking networks?", spiking, Scale(10, 10), Scale(10, 2)
    ),
    "convolutional": Experiment(
        "Does GRAPES help in convolutional networks?", convolutional, Scale(10, 20), Scale(10, 3)
    ),
    "memory": Experiment(
        "How much memory does GRAPES need?", memory, Scale(1, 0, 0), Scale(1, 0, 0), ()
    ),
    "distribution": Experiment(
        "How do the weights and the factors move?", distribution, *DENSE, (), observe=True
    ),
    "spread": Experiment(
        "Do the real factors help where they differ much from node to node?",
        spread,
        *DENSE,
        observe=True,
    ),
    "finetuning": Experiment(
        "Do the real factors help in networks whose nodes differ by construction?",
        finetuning,
        Scale(10, 20, before=20),
        Scale(10, 5, before=5),
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
    short = {"smoke": {"seeds": 2, "epochs": 2, "tuning_seeds": 2}, "full": {"epochs": 200}}
    return standard._replace(
        **short[preset], before=min(standard.before, 2 + (preset == "full") * 98)
    )


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
    first_seed: int = 0  # of the report; a replication takes seeds of its own


def plan(
    name: str,
    preset: str = "standard",
    dataset: str = "digits",
    choice: Choice = EVERYTHING,
    seeds: int | None = None,
    epochs: int | None = None,
    first_seed: int = 0,
    tuned: bool = True,
    **setup: Any,
) -> Plan:
    """What will be run. `setup` changes fields of the set-up of all cells."""
    name = SAME_RUN.get(name, name)
    experiment, smoke = EXPERIMENTS[name], preset == "smoke"
    scale = scale_of(experiment, preset, dataset)
    scale = scale._replace(seeds=seeds or scale.seeds, epochs=epochs or scale.epochs)
    cells, grid = experiment.cells(choice._replace(smoke=smoke)), experiment.grid if tuned else ()
    panels = list(dict.fromkeys(cell.panel for cell in cells))
    for panel in choice.panels:
        if panel not in panels:
            raise ValueError(f"there is no panel {panel!r} (there are {', '.join(panels)})")
    cells = [cell for cell in cells if cell.panel in (choice.panels or panels)]
    if setup.get("network", AUTHORS.network) != AUTHORS.network:  # it is for dense layers
        cells = [cell for cell in cells if cell.variant.form != "outgoing"]
    if smoke:  # compilation takes most of the time
        cells = [c for c in cells if c.variant.control in ("", "mean") and c.variant.clipped]
        grid = (1.0, 2.0) if name == "factors" else ()
    cells = [replace(c, setup=replace(c.setup, **setup)) for c in cells]
    if not grid:
        scale = scale._replace(tuning_seeds=0)
    return Plan(
        name, dataset, preset, scale, experiment.tasks, grid, experiment.observe, cells, first_seed
    )
