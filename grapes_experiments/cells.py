"""What is trained: a cell is one network under one learning rule, optimizer and form of GRAPES.

Each choice is a row of a table; a cell names the rows, so that it can be written to a file.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from examples.data import SETS
from grapes_experiments.networks import (
    CELLS,
    MLP,
    SPIKING,
    ConvNet,
    Reader,
    ResNet9,
    Spiking,
    spikes,
)
from grapes_experiments.training import Array, Method, Prepare, as_it_is
from grapes_experiments.variants import PLAIN, Variant, method


@dataclasses.dataclass(frozen=True)
class Setup:
    """A network and how it is trained. The defaults are the authors' own set-up for dense ones.

    That is 784-256-256-10 on MNIST, ReLU, no bias, He-uniform weights, SGD with a learning rate
    of 0.1, batches of 64, dropout that keeps 0.9, and an output layer that is not modulated.
    """

    network: str = "dense"
    width: int = 256
    depth: int = 2  # hidden layers; of a ResNet-9 it is given
    bias: bool = False  # only of dense networks, as are dropout and the initialisation
    keep: float = 0.9
    init: str = "he_uniform"
    optimizer: str = "sgd"
    rate: float = 0.1  # of every variant, when all are compared at the same one
    batch: int = 64
    before: str = ""  # what is done to trained weights before the run, of changes.CHANGES


AUTHORS = Setup()


@dataclasses.dataclass(frozen=True)
class Cell:
    """One variant, among those of its panel."""

    panel: str
    variant: Variant = PLAIN
    rule: str = "BP"  # of variants.RULES
    setup: Setup = AUTHORS

    @property
    def name(self) -> str:
        return self.variant.name


# Initial weights.


def pruned(share: float) -> Callable[..., Array]:
    """He-uniform kernels whose smallest weights are zero, then scaled to He's variance."""

    def init(key, shape, dtype=jnp.float32):
        kernel = nn.initializers.he_uniform()(key, shape, dtype)
        size = jnp.abs(kernel)
        return he_variance(jnp.where(size < jnp.quantile(size, share), 0, kernel))

    return init


def heavy_tailed(freedom: float) -> Callable[..., Array]:
    """Student's t, scaled to He's variance: a few weights outweigh all others of their node."""

    def init(key, shape, dtype=jnp.float32):
        return he_variance(jax.random.t(key, freedom, shape, dtype))

    return init


def he_variance(kernel: Array) -> Array:
    return kernel * jnp.sqrt(2 / kernel.shape[0] / jnp.mean(kernel**2))


INITS: dict[str, Callable[..., Array]] = {
    "he_uniform": nn.initializers.he_uniform(),
    "pruned 50 %": pruned(0.5),
    "pruned 80 %": pruned(0.8),
    "pruned 95 %": pruned(0.95),
    "heavy tails": heavy_tailed(2.0),
}


def keep_zeros() -> optax.GradientTransformation:
    """Leaves weights that are exactly zero as they are: what is pruned stays pruned."""

    def update(updates, params):
        return jax.tree.map(lambda u, p: jnp.where((p == 0) & (p.ndim > 1), 0, u), updates, params)

    return optax.stateless(update)


# Networks.


class Network(NamedTuple):
    build: Callable[[Setup, int], nn.Module]  # the number of classes comes second
    prepare: Callable[[str], Prepare] = lambda dataset: as_it_is


def dense(setup: Setup, classes: int) -> nn.Module:
    init = INITS[setup.init]
    return MLP(setup.width, classes, setup.depth, setup.bias, setup.keep, init, init)


# The authors' rate is for 784 pixels; of the 64 of the digits it leaves too few spikes.
SPIKES: dict[bool, Prepare] = {True: spikes, False: partial(spikes, rate=6 / 20)}


def spikes_for(dataset: str) -> Prepare:
    return SPIKES[dataset == "digits"]


NETWORKS: dict[str, Network] = {
    "dense": Network(dense),
    "convolutional": Network(lambda setup, classes: ConvNet(setup.width, setup.depth, classes)),
    "ResNet-9": Network(lambda setup, classes: ResNet9(setup.width, classes)),
    **{
        name: Network(lambda s, classes, cell=cell: Reader(cell, s.width, s.depth, classes))
        for name, cell in CELLS.items()
    },
    **{
        name: Network(
            lambda s, classes, unit=unit: Spiking(unit[0], unit[1], s.width, s.depth, classes),
            spikes_for,
        )
        for name, unit in SPIKING.items()
    },
}

# Optimizers: without the learning rate, which comes after them, and with what it is by default.
# RMSprop has the authors' constants.
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, float]] = {
    "sgd": (optax.sgd(1.0), 0.1),
    "momentum": (optax.sgd(1.0, momentum=0.9), 0.01),
    "nesterov": (optax.sgd(1.0, momentum=0.9, nesterov=True), 0.01),
    "rmsprop": (
        optax.rmsprop(1.0, decay=0.9, eps=1e-8, eps_in_sqrt=True, initial_scale=0.0),
        0.001,
    ),
    "adam": (optax.adam(1.0), 0.001),
}


def method_of(cell: Cell, *after: optax.GradientTransformation) -> Method:
    """The variant's optimizer, with what comes `after` the one of the table."""
    setup = cell.setup
    optimizer, _ = OPTIMIZERS[setup.optimizer]
    hidden = [f"Dense_{layer}/kernel" for layer in range(setup.depth)]
    layers = [*hidden, "output/kernel"]
    trained = method(optax.chain(optimizer, *after), cell.variant, cell.rule, layers)
    if setup.init.startswith("pruned") or setup.before.startswith("pruned"):
        return trained._replace(optimizer=optax.chain(trained.optimizer, keep_zeros()))
    return trained


def build(cell: Cell, dataset: str) -> tuple[nn.Module, Method, Prepare]:
    """The cell as `training` takes it. The learning rate is in the state: see `at_rates`."""
    network = NETWORKS[cell.setup.network]
    rate = optax.inject_hyperparams(optax.scale)(step_size=cell.setup.rate)
    model = network.build(cell.setup, SETS[dataset].classes)
    return model, method_of(cell, rate), network.prepare(dataset)


def at_rates(state: Any, rates: Array) -> Any:
    """The state of the optimizer with a learning rate for every lane."""
    return optax.tree.set(state, step_size=rates)


def state_bytes(cell: Cell, params: Any) -> int:
    """Bytes of the state of the optimizer of one network at a constant learning rate."""
    return tree_bytes(jax.eval_shape(method_of(cell).optimizer.init, params))


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
