"""The backward pass of one layer: what the adapters of linen and nnx have in common."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grapes_optax._feedback import aligned, tie
from grapes_optax._importance import Axes, Options, expand, layer_factor
from grapes_optax._modulation import align, scale_tangent

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
HE_UNIFORM: Initializer = jax.nn.initializers.he_uniform()


class Modulation(NamedTuple):
    """Factors for one layer; `own` keeps them from what travels upstream."""

    factor: jax.Array
    axes: Axes
    own: bool


class Feedback(NamedTuple):
    """Feedback weights of one layer, and the rule that makes a backward kernel of them."""

    weights: jax.Array
    rule: str
    key: jax.Array | None


def modulation(kernels: Sequence[jax.Array], axes: Axes, own: bool, options: Options) -> Modulation:
    """Factors of a layer from all kernels, alike in layout, of its pre-activation."""
    return Modulation(layer_factor(kernels, [axes] * len(kernels), options), axes, own)


def call_layer(
    op: Callable[[dict[str, Any], jax.Array], jax.Array],
    params: dict[str, Any],
    x: jax.Array,
    modulated: Modulation | None,
    feedback: Feedback | None,
) -> jax.Array:
    """`op(params, x)` of a bilinear layer, with the backward pass that the rules ask for."""
    if feedback is not None:
        params = tie(params, feedback.weights, feedback.rule)
    if modulated is not None and modulated.own:
        factor, axes, _ = modulated
        factors = {"kernel": expand(factor, axes), "bias": factor}
        params = {name: scale_tangent(leaf, factors[name]) for name, leaf in params.items()}
    z = op(params, x) if feedback is None else aligned(op, params, x, *feedback)
    if modulated is not None and not modulated.own:
        z = scale_tangent(z, align(modulated.factor, len(modulated.axes.output), z))
    return z


def draw_feedback(
    initializer: Initializer, key: jax.Array, shape: tuple[int, ...], axes: Axes, dtype: Any
) -> jax.Array:
    """Feedback weights laid out as a kernel, drawn as a matrix (fan-in, nodes)."""
    order = axes.reduction + axes.kept
    sizes = [shape[axis] for axis in order]
    fan_in = math.prod(shape[axis] for axis in axes.reduction)
    matrix = initializer(key, (fan_in, math.prod(sizes) // fan_in), dtype)
    return jnp.transpose(matrix.reshape(sizes), [order.index(axis) for axis in range(len(shape))])
