"""Training of all seeds at once: a model, a method and data sets in, arrays out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

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
def correct(model: nn.Module, prepare: Prepare, params: Any, data: Data) -> Array:
    """How many images of the test set every seed gets right, in parts that fit into the memory."""
    count = len(data.test_labels)
    parts = next(n for n in range(-(-count // 1000), count + 1) if count % n == 0)

    def split(x):
        return x.reshape(parts, count // parts, *x.shape[1:])

    def of_part(test):
        key, images, labels = test
        logits: Any = jax.vmap(model.apply, in_axes=(0, None))(params, prepare(key, images))
        return (jnp.argmax(logits, -1) == labels).sum(-1)

    keys = jax.random.split(jax.random.key(1), parts)
    return jax.lax.map(of_part, (keys, split(data.test_images), split(data.test_labels))).sum(0)


def start(
    model: nn.Module, method: Method, keys: Array, example: Array, params: Any = None
) -> State:
    """Draws the weights of all seeds: the first row of keys is for the forward ones.

    Forward weights that are given are taken as they are.
    """
    if params is None:
        params = initial_params(model, keys[0], example)
    state = State(params, jax.vmap(method.optimizer.init)(params))
    if not method.feedback:
        return state
    forward: Any = method.rule(model.apply)

    def draw(key, params):
        return grapes.init_feedback(key, forward, params, example)

    return state._replace(feedback=jax.vmap(draw)(keys[1], params))


def lengths(updates: optax.Updates) -> dict[str, Array]:
    """The Euclidean norm of every kernel's update, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return {name: jnp.linalg.norm(leaf) for name, leaf in named.items() if leaf.ndim > 1}


def epoch_of(
    model: nn.Module, method: Method, *, batch: int, prepare: Prepare = as_it_is
) -> Callable[[State, Array, Data], tuple[State, Array, dict[str, Array]]]:
    """One pass over the training set for all seeds, in one call that stays on the device.

    It takes the state, a key for each seed and the data, and returns the next state, and of every
    seed the mean loss and the mean length of the steps of every kernel.
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
            params = optax.apply_updates(params, updates)
            return (params, optimizer), (value, lengths(updates))

        steps = len(data.train_labels) // batch
        order = jax.random.permutation(key, len(data.train_labels))[: steps * batch]
        keys = jax.random.split(jax.random.fold_in(key, 0), steps)
        chosen = order.reshape(steps, batch), keys
        (params, optimizer), seen = jax.lax.scan(step, (state.params, state.optimizer), chosen)
        losses, norms = jax.tree.map(lambda x: x.mean(0), seen)
        return State(params, optimizer, state.feedback), losses, norms

    return epoch


def seed_keys(seeds: Sequence[int], epochs: int) -> Array:
    """Keys (2 + epochs, seeds): for the weights, the feedback weights, and every epoch.

    They follow from the number of the seed alone: whatever else is trained, and for how long.
    """
    number, seed = jnp.arange(2 + epochs), jnp.array(seeds)
    of_seed = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(jax.random.key)(seed)
    return jax.vmap(of_seed, in_axes=(0, None), out_axes=1)(keys, number)


def train(
    model: nn.Module,
    method: Method,
    data: Data,
    *,
    seeds: int,
    epochs: int,
    batch: int = 32,
    prepare: Prepare = as_it_is,
) -> np.ndarray:
    """Trains all seeds at once; accuracy on the test set, (epochs, seeds).

    Every method sees the same initial weights and the same batches, seed by seed. The model
    gets what `prepare(key, images)` makes of a batch: with another key in every step of the
    training, and with the same keys whenever it is tested.
    """
    keys, accuracies = seed_keys(range(seeds), epochs), []
    state = start(model, method, keys[:2], prepare(keys[0, 0], data.train_images[:1]))
    epoch = epoch_of(model, method, batch=batch, prepare=prepare)
    for key in keys[2:]:
        state, *_ = epoch(state, key, data)
        accuracies.append(correct(model, prepare, state.params, data) / len(data.test_labels))
    return np.stack(accuracies)
