"""The table to read before training: what is modulated, and by how much."""

import math
from typing import Any

import jax
import numpy as np
import optax

from grapes_optax._importance import Control, Normalization, Options
from grapes_optax._layers import Layer, Member, resolve_layers
from grapes_optax._tree import path_string, tree_leaves

_COLUMNS = ("path", "shape", "role", "fan-in", "nodes", "stack", "min", "mean", "max")
_TEXT = 3  # so many columns are text, the others numbers


def _statistics(layer: Layer, options: Options) -> list[str]:
    if any(isinstance(kernel.array, jax.ShapeDtypeStruct) for kernel in layer.kernels):
        return ["", "", ""]
    factor = np.asarray(layer.factor(options))
    return [f"{f(factor):.3f}" if factor.size else "" for f in (np.min, np.mean, np.max)]


def _sizes(member: Member) -> list[str]:
    shape = np.shape(member.array)
    return [str(math.prod(shape[axis] for axis in axes)) if axes else "" for axes in member.axes]


def summary(
    params: optax.Params,
    dimension_numbers: Any = None,
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> str:
    """Tabulates what GRAPES does to each leaf of a parameter tree, and with what factors.

    Args:
      params: the parameters, arrays or (without factors) ``jax.ShapeDtypeStruct``.
      dimension_numbers: as in :func:`scale_by_grapes`, like the other options.
      gain: as in :func:`scale_by_grapes`.
      bounds: as in :func:`scale_by_grapes`.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`scale_by_grapes`.

    Returns:
      A table with one row a leaf: path, shape, role (kernel, the bias of which kernel,
      left alone), fan-in, nodes, stacked layers, and minimum, mean and maximum of the
      factors of its nodes.

    Raises:
      ValueError: as :func:`scale_by_grapes` and its ``update``.
      TypeError: as the ``update`` of :func:`scale_by_grapes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import summary
      >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]]),
      ...                       "bias": jnp.zeros(3)},
      ...           "LayerNorm_0": {"scale": jnp.ones(3)}}
      >>> print(summary(params))
      path               shape   role                    fan-in  nodes  stack    min   mean    max
      Dense_0/bias       (3,)    bias of Dense_0/kernel              3         1.000  1.500  2.000
      Dense_0/kernel     (2, 3)  kernel                       2      3         1.000  1.500  2.000
      LayerNorm_0/scale  (3,)    left alone
    """
    options = Options(gain, bounds, normalization, control).checked()
    cells = {}
    for layer in resolve_layers(params, dimension_numbers):
        statistics = _statistics(layer, options)
        owners = " + ".join(path_string(kernel.path) for kernel in layer.kernels)
        for members, role in (layer.kernels, "kernel"), (layer.biases, f"bias of {owners}"):
            for member in members:
                cells[member.path] = [role, *_sizes(member), *statistics]
    alone = ["left alone"] + [""] * (len(_COLUMNS) - _TEXT)
    table = [
        [path_string(leaf.path), str(np.shape(leaf.array)), *cells.get(leaf.path, alone)]
        for leaf in tree_leaves(params)
    ]
    return _aligned([list(_COLUMNS), *table])


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    adjust = [str.ljust] * _TEXT + [str.rjust] * (len(widths) - _TEXT)
    return "\n".join(
        "  ".join(f(cell, n) for f, cell, n in zip(adjust, row, widths, strict=True)).rstrip()
        for row in table
    )
