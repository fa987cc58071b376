"""The table to read before training: what is modulated, and by how much."""

import math
from typing import Any

import jax
import numpy as np
import optax

from grapes_optax._importance import Control, Normalization, Options
from grapes_optax._layers import Layer, Member, resolve
from grapes_optax._tree import path_string, tree_leaves

_TEXT = "path", "shape", "role", "group"
_NUMBERS = "fan-in", "nodes", "stack", "gates", "min", "mean", "max"


def _statistics(layer: Layer, options: Options) -> list[str]:
    if any(isinstance(kernel.array, jax.ShapeDtypeStruct) for kernel in layer.kernels):
        return ["", "", ""]
    factor = np.asarray(layer.factor(options))
    return [f"{f(factor):.3f}" if factor.size else "" for f in (np.min, np.mean, np.max)]


def _sizes(member: Member) -> list[str]:
    shape = np.shape(member.array)
    return [
        str(math.prod(shape[axis] for axis in axes)) if axes else "" for axes in member.axes[:3]
    ]


def summary(
    params: optax.Params,
    weight_dimension_numbers: Any = None,
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> str:
    """Tabulates what GRAPES does to each leaf of a parameter tree, and with what factors.

    Args:
      params: the parameters, arrays or (without factors) ``jax.ShapeDtypeStruct``.
      weight_dimension_numbers: as in :func:`scale_by_grapes`, like the other options.
      gain: as in :func:`scale_by_grapes`.
      bounds: as in :func:`scale_by_grapes`.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`scale_by_grapes`.

    Returns:
      A table with one row a leaf: path, shape, role (kernel, bias, left alone, or the
      reason of a :class:`LeftAlone`: output), group
      (leaves of one group are one layer), fan-in, nodes, stacked layers, gates, and
      minimum, mean and maximum of the factors of the layer's nodes.

    Raises:
      ValueError: as :func:`scale_by_grapes` and its ``update``.
      TypeError: as the ``update`` of :func:`scale_by_grapes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import summary
      >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]]),
      ...                       "bias": jnp.zeros(3)},
      ...           "LayerNorm_0": {"scale": jnp.ones(3)}}
      >>> print(summary(params))  # doctest: +ELLIPSIS
      path               shape   role        group           fan-in  nodes ...
      Dense_0/bias       (3,)    bias        Dense_0/kernel              3 ...
      Dense_0/kernel     (2, 3)  kernel      Dense_0/kernel       2      3 ...
      LayerNorm_0/scale  (3,)    left alone
    """
    options = Options(gain, bounds, normalization, control).checked()
    cells = {}
    layers, left_alone = resolve(params, weight_dimension_numbers)
    for layer in layers:
        statistics = _statistics(layer, options)
        for members, role in (layer.kernels, "kernel"), (layer.biases, "bias"):
            for member in members:
                gates = str(layer.gates)
                cells[member.path] = [role, str(layer.group), *_sizes(member), gates, *statistics]

    def alone(path):
        prefixes = (path[:n] for n in range(len(path), -1, -1))
        reasons = (left_alone[prefix].reason for prefix in prefixes if prefix in left_alone)
        return [next(reasons, "left alone"), ""] + [""] * len(_NUMBERS)

    table = [
        [
            path_string(leaf.path),
            str(np.shape(leaf.array)),
            *(cells.get(leaf.path) or alone(leaf.path)),
        ]
        for leaf in tree_leaves(params)
    ]
    return _aligned([[*_TEXT, *_NUMBERS], *table])


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    adjust = [str.ljust] * len(_TEXT) + [str.rjust] * len(_NUMBERS)
    return "\n".join(
        "  ".join(f(cell, n) for f, cell, n in zip(adjust, row, widths, strict=True)).rstrip()
        for row in table
    )
