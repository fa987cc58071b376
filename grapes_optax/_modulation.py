"""The propagated form: an identity whose derivative is multiplied by the factors."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grapes_optax._importance import (
    Control,
    HasAxes,
    Normalization,
    Options,
    fan_in_axes,
    here,
    is_description,
    kernel_array,
    layer_factor,
    scale,
)


@jax.custom_jvp
def scale_tangent(x: jax.Array, factor: jax.Array) -> jax.Array:
    """`x` itself; its tangent and its cotangent are multiplied by `factor`."""
    del factor
    return x


@scale_tangent.defjvp
def _(primals, tangents):
    x, factor = primals
    return scale_tangent(x, factor), scale(tangents[0], factor)


def align(
    factor: jax.Array, node_ndim: int, z: jax.Array, leading: bool | None = None
) -> jax.Array:
    """Puts a factor of shape stack + nodes in line with a pre-activation.

    Nodes are its last axes; a stack stands before them (positions) or leads (batch). Where sizes
    are equal, the shapes leave that open: `leading` says it.
    """
    stack, nodes = factor.shape[: factor.ndim - node_ndim], factor.shape[factor.ndim - node_ndim :]
    if factor.size == 1 and not z.ndim:  # one node, without an axis of its own
        return factor.reshape(())
    lines = {
        False: factor.shape,
        True: stack + (1,) * (z.ndim - factor.ndim) + nodes,
    }
    fit = {
        False: z.shape[z.ndim - factor.ndim :] == factor.shape,
        True: z.shape[: len(stack)] + z.shape[z.ndim - node_ndim :] == factor.shape,
    }
    fitting = {lines[place] for place in fit if fit[place] and leading in (None, place)}
    if not fitting:
        raise ValueError(
            f"The nodes of the kernel do not match the pre-activation: stack {stack} and nodes"
            f" {nodes} against the shape {z.shape}, whose last axes should be the nodes."
        )
    if len(fitting) > 1 and stack:
        raise ValueError(
            f"z of shape {z.shape} may hold the stack {stack} in front or before its nodes, since"
            " the sizes are equal: call modulate_error of one layer, under jax.vmap over the stack."
        )
    shape = min(fitting, key=len)
    return factor.reshape((1,) * (z.ndim - len(shape)) + shape)


def modulate_error(
    z: jax.Array,
    *kernels: jax.typing.ArrayLike,
    weight_dimension_numbers: HasAxes | Sequence[HasAxes] | None = None,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> jax.Array:
    r"""Multiplies the error at a pre-activation by the factors of its nodes.

    .. math::
      z \mapsto z, \qquad \delta_j \leftarrow f_j \, \delta_j

    The propagated form of GRAPES: the layer's own gradients and everything upstream
    see the modulated error. The value is `z` itself, bit for bit; forward mode and
    higher derivatives work.

    Choose one form for a layer: with :func:`scale_by_grapes` as well, its factor acts twice.

    Args:
      z: pre-activation; its last axes are the nodes.
      *kernels: all kernels that are summed into `z`, an input and a recurrent kernel
        for instance; their importances add up.
      weight_dimension_numbers: a :class:`DimensionNumbers` for all kernels, or a sequence with
        one for each; ``None`` is the convention of Flax, nodes on the last axis. The
        pre-activation of a fused cell has gates, ``DimensionNumbers(gates=4)``.
      gain: as in :func:`importance_factor`, like the other options.
      bounds: as in :func:`importance_factor`.
      normalization: as in :func:`importance_factor`.
      control: as in :func:`importance_factor`.

    Returns:
      `z`, of the same shape and type.

    Raises:
      ValueError: if there is no kernel, its nodes do not match `z` or those of the
        other kernels, the gates do not divide them, or as :func:`importance_factor`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax import modulate_error
      >>> kernel = jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]])
      >>> x = jnp.ones(2)
      >>> gradient = jax.grad(lambda x: modulate_error(x @ kernel, kernel).sum())
      >>> print(gradient(x), kernel @ jnp.array([1.5, 2.0, 1.0]))  # the factors
      [-2.5  8. ] [-2.5  8. ]

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    if not kernels:
        raise ValueError("modulate_error needs the kernels that are summed into z.")
    if not isinstance(z, np.ndarray | jax.Array):
        raise TypeError(f"z must be an array, got {z!r}.")
    if not jnp.issubdtype(z.dtype, jnp.inexact):
        raise TypeError(f"z must be an array of floats, got {z.dtype}: it has no error.")
    arrays = [kernel_array(kernel) for kernel in kernels]
    # A description is a sequence too: it is told by its attributes.
    several = isinstance(weight_dimension_numbers, list | tuple) and not is_description(
        weight_dimension_numbers
    )
    numbers: Any = weight_dimension_numbers if several else [weight_dimension_numbers] * len(arrays)
    if len(numbers) != len(arrays):
        raise ValueError(f"{len(arrays)} kernels have {len(numbers)} weight_dimension_numbers.")
    axes = [fan_in_axes(*pair) for pair in zip(arrays, numbers, strict=True)]
    shapes = [a.shape(array) for array, a in zip(arrays, axes, strict=True)]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"Kernels summed into one z must have the same nodes, got {shapes}.")
    gates = [a.gates for a in axes]
    if any(count != gates[0] for count in gates):
        raise ValueError(f"Kernels summed into one z must have the same gates, got {gates}.")
    factor = here(layer_factor(arrays, axes, options), axes[0])
    return scale_tangent(z, align(factor, len(axes[0].output), z))
