"""Training of all seeds at once: a model, a method and data sets in, arrays out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import grapes_optax
from examples.data import Data
from grapes_optax import linen as grapes

Array = jax.Array
Prepare = Callable[[Array, Array], Array]


# What is trained.


class Method(NamedTuple):
    """An optimizer, and what makes a learning rule of a forward function."""

    optimizer: optax.GradientTransformation
    rule: Callable[[Callable], Callable] = lambda forward: forward
    feedback: bool = False  # whether the rule has feedback weights


class State(NamedTuple):
    """What an epoch starts from; the seeds are the first axis of every leaf."""

    params: Any
    optimizer: Any
    feedback: Any = None  # weights of FA and DFA


class Run(NamedTuple):
    """The seeds are the last axis of the accuracy, and the first one of every parameter."""

    accuracy: np.ndarray  # on the test set, (epochs, seeds)
    first: Any  # parameters before training
    last: Any  # parameters after training


def hidden(path: str) -> bool:
    """As in the paper, the output layer is not modulated."""
    return "output" not in path


# Learning rules with feedback weights, as transformations of the forward function.
RULES: dict[str, Any] = {
    "BP": None,
    "FA": grapes.feedback_alignment,
    "DFA": grapes.direct_feedback_alignment,
}
# GRAPES and its controls: the form, and the options of the factor.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "local GRAPES": ("local", {}),
    "local, mean factor": ("local", {"control": "mean"}),
    "local, neighbour's factor": ("local", {"control": "roll"}),
    "local, not clipped": ("local", {"bounds": None}),
    "local, by the mean node": ("local", {"normalization": "mean"}),
    "local, before the optimizer": ("before", {}),
    "propagated GRAPES": ("propagated", {}),
    "propagated, mean factor": ("propagated", {"control": "mean"}),
    "propagated, neighbour's factor": ("propagated", {"control": "roll"}),
    "propagated, not clipped": ("propagated", {"bounds": None}),
    "propagated, by the mean node": ("propagated", {"normalization": "mean"}),
    "propagated, through time": ("propagated", {"through_time": True}),
    "authors' DFA": ("outgoing", {}),
}


def method(
    optimizer: optax.GradientTransformation,
    variant: str = "plain",
    rule: str = "BP",
    layers: Sequence[str] = (),
) -> Method:
    """One of the variants under a learning rule.

    The local form acts on the updates, after the optimizer, where no division by a running
    size of the gradient cancels it, unless the variant says otherwise. The propagated form can
    only act before the optimizer. The authors' form for DFA needs the paths of all kernels.
    """
    align = RULES[rule]
    form, options = VARIANTS[variant]

    def transform(forward):
        forward = forward if align is None else align(forward)
        return grapes.propagated(forward, hidden, **options) if form == "propagated" else forward

    described = grapes_optax.by_path(where=hidden)
    chain = {
        "local": lambda: (optimizer, grapes_optax.scale_by_grapes(described, **options)),
        "before": lambda: (grapes_optax.scale_by_grapes(described, **options), optimizer),
        "outgoing": lambda: (grapes_optax.scale_by_outgoing_importance(layers), optimizer),
    }
    if form in chain:
        optimizer = optax.chain(*chain[form]())
    return Method(optimizer, transform, align is not None)


# Training.


def as_it_is(key: Array, images: Array) -> Array:
    del key
    return images


@partial(jax.jit, static_argnums=0)
def initial_params(model: nn.Module, keys: Array, images: Array) -> Any:
    """One seed after another, for batches of orthogonal matrices can hang on CPUs.

    Their QR factorisations wait for each other's threads (jaxlib 0.10.2).
    """
    return jax.lax.map(lambda key: model.init(key, images), keys)


@partial(jax.jit, static_argnums=(0, 1))
def accuracy(model: nn.Module, prepare: Prepare, params: Any, data: Data) -> Array:
    """Accuracy of every seed on the test set, in parts that fit into the memory."""

    def correct(params, test):
        key, image, label = test
        logits: Any = model.apply(params, prepare(key, image[None]))
        return jnp.argmax(logits) == label

    keys = jax.random.split(jax.random.key(1), len(data.test_labels))
    tests = keys, data.test_images, data.test_labels
    of_seeds = jax.vmap(correct, in_axes=(0, None))
    return jax.lax.map(partial(of_seeds, params), tests, batch_size=1000).mean(0)


def start(model: nn.Module, method: Method, keys: Array, example: Array) -> State:
    """Draws the weights of all seeds: the first row of keys is for the forward ones."""
    params = initial_params(model, keys[0], example)
    state = State(params, jax.vmap(method.optimizer.init)(params))
    if not method.feedback:
        return state
    forward: Any = method.rule(model.apply)

    def draw(key, params):
        return grapes.init_feedback(key, forward, params, example)

    return state._replace(feedback=jax.vmap(draw)(keys[1], params))


def epoch_of(
    model: nn.Module, method: Method, *, batch: int, prepare: Prepare = as_it_is
) -> Callable[[State, Array, Data], tuple[State, Array]]:
    """One pass over the training set for all seeds, in one call that stays on the device.

    It takes the state, a key for each seed and the data, and returns the next state and the
    mean loss of every seed.
    """

    forward = method.rule(model.apply)

    def loss(params, x, y, key, feedback):
        given = {} if feedback is None else {"feedback": feedback}
        logits: Any = forward(params, x, rngs={"dropout": key}, **given)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def epoch(state, key, data):
        def step(carry, chosen):
            params, optimizer = carry
            indices, key = chosen
            x, y = prepare(key, data.train_images[indices]), data.train_labels[indices]
            key = jax.random.fold_in(key, 1)
            value, gradient = jax.value_and_grad(loss)(params, x, y, key, state.feedback)
            updates, optimizer = method.optimizer.update(gradient, optimizer, params)
            return (optax.apply_updates(params, updates), optimizer), value

        steps = len(data.train_labels) // batch
        order = jax.random.permutation(key, len(data.train_labels))[: steps * batch]
        keys = jax.random.split(jax.random.fold_in(key, 0), steps)
        chosen = order.reshape(steps, batch), keys
        (params, optimizer), losses = jax.lax.scan(step, (state.params, state.optimizer), chosen)
        return State(params, optimizer, state.feedback), losses.mean()

    return epoch


def seed_keys(seeds: int, epochs: int) -> Array:
    """Keys (2 + epochs, seeds): for the weights, the feedback weights, and every epoch."""
    return jax.random.split(jax.random.key(0), (2 + epochs, seeds))


def train(
    model: nn.Module,
    method: Method,
    data: Data,
    *,
    seeds: int,
    epochs: int,
    batch: int = 32,
    prepare: Prepare = as_it_is,
    after_epoch: Callable[[], object] = lambda: None,
) -> Run:
    """Trains all seeds at once.

    Every method sees the same initial weights and the same batches, seed by seed. The model
    gets what `prepare(key, images)` makes of a batch: with another key in every step of the
    training, and with the same keys whenever it is tested.
    """
    keys, accuracies = seed_keys(seeds, epochs), []
    state = start(model, method, keys[:2], prepare(keys[0, 0], data.train_images[:1]))
    first, epoch = state.params, epoch_of(model, method, batch=batch, prepare=prepare)
    for key in keys[2:]:
        state, _ = epoch(state, key, data)
        accuracies.append(np.asarray(accuracy(model, prepare, state.params, data)))
        after_epoch()
    return Run(np.stack(accuracies), first, state.params)
