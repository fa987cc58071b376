"""The optimizers whose steps are set side by side; the first is the unit."""

from collections.abc import Callable

import optax
from optax import contrib

from grapes_optax import WeightDimNumOrFn, scale_by_grapes

RATE = 1e-3
Optimizer = Callable[[WeightDimNumOrFn], optax.GradientTransformation]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda numbers: optax.sgd(RATE),
    "grapes + sgd": lambda numbers: optax.chain(scale_by_grapes(numbers), optax.sgd(RATE)),
    "momentum": lambda numbers: optax.sgd(RATE, momentum=0.9),
    "adam": lambda numbers: optax.adam(RATE),
    "muon": lambda numbers: contrib.muon(RATE),
}
