"""Networks whose nodes differ by construction: what is done to trained weights before a run.

Each change takes dense kernels of trained networks, input to output, and gives those that are
trained on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
Kernels = list[Array]
Change = Callable[[Array, Kernels], Kernels]


def pruned(key: Array, kernels: Kernels) -> Kernels:
    """The smallest 80 % of the weights of every hidden kernel become, and stay, zero."""
    del key

    def prune(kernel):
        size = jnp.abs(kernel)
        return jnp.where(size < jnp.quantile(size, 0.8), 0, kernel)

    return [*map(prune, kernels[:-1]), kernels[-1]]


def half_new(key: Array, kernels: Kernels) -> Kernels:
    """Half of the nodes of every hidden layer are drawn anew, and nothing listens to them yet.

    That is the network widened from half its nodes to all, which computes what it did.
    """
    widened = []
    for number, kernel in enumerate(kernels):
        fan_in, nodes = kernel.shape
        if number:  # the new nodes before it
            kernel = kernel.at[fan_in // 2 :].set(0)
        if number < len(kernels) - 1:
            shape = fan_in, nodes - nodes // 2
            drawn = jax.nn.initializers.he_uniform()(jax.random.fold_in(key, number), shape)
            kernel = kernel.at[:, nodes // 2 :].set(0.1 * drawn)
        widened.append(kernel)
    return widened


def dead(key: Array, kernels: Kernels) -> Kernels:
    """A quarter of the nodes of every hidden layer get weights near zero: they hardly fire."""
    weak = []
    for number, kernel in enumerate(kernels[:-1]):
        chosen = jax.random.uniform(jax.random.fold_in(key, number), kernel.shape[1:]) < 0.25
        weak.append(jnp.where(chosen, 0.01 * kernel, kernel))
    return [*weak, kernels[-1]]


def same(key: Array, kernels: Kernels) -> Kernels:
    """Nothing: what follows is a transfer to other images."""
    del key
    return kernels


# The change, and whether the run goes on with the images that the networks were trained on.
CHANGES: dict[str, tuple[Change, bool]] = {
    "pruned 80 %": (pruned, True),
    "widened": (half_new, True),
    "dead nodes": (dead, True),
    "transferred": (same, False),
}
