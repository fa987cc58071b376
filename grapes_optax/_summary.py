"""What is modulated, and by how much: a table to read, and a tree to log and to plot."""

import math

import jax
import numpy as np
import optax

from grapes_optax._importance import Control, Normalization, Options, WeightDimNumOrFn
from grapes_optax._layers import Layer, Member, resolve_layers
from grapes_optax._mesh import whole_shape
from grapes_optax._tree import path_names, path_string, tree_leaves

_TEXT = "path", "shape", "role", "group"
_NUMBERS = "fan-in", "nodes", "stack", "gates", "min", "mean", "max"


def _statistics(layer: Layer, options: Options) -> list[str]:
    if any(isinstance(kernel.array, jax.ShapeDtypeStruct) for kernel in layer.kernels):
        return ["", "", ""]
    factor = np.asarray(layer.factor(options))
    return [f"{f(factor):.3f}" if factor.size else "" for f in (np.min, np.mean, np.max)]


def _sizes(member: Member) -> list[str]:
    shape = whole_shape(np.shape(member.array), member.axes.parts)
    return [
        str(math.prod(shape[axis] for axis in axes)) if axes else "" for axes in member.axes[:3]
    ]


def factors(
    params: optax.Params,
    weight_dimension_numbers: WeightDimNumOrFn = None,
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> optax.Params:
    r"""The factors of the nodes of each leaf, as :func:`scale_by_grapes` uses them.

    .. math::
      f_j = \mathrm{clip}(g \, s_j / \mathrm{normalizer}(s), \, \mathrm{low}, \, \mathrm{high})

    Cheap enough to be logged in every epoch; works under ``jax.jit``.

    Args:
      params: the parameters.
      weight_dimension_numbers: as in :func:`scale_by_grapes`, like the other options.
      gain: as in :func:`scale_by_grapes`.
      bounds: as in :func:`scale_by_grapes`.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`scale_by_grapes`.

    Returns:
      A tree of the structure of `params` that holds for each modulated leaf, kernel or
      bias, the factors of its nodes, without unit and of shape (stack axes..., node
      axes...), and ``None`` for what is left alone.

    Raises:
      ValueError: as :func:`scale_by_grapes` and its ``update``.
      TypeError: as the ``update`` of :func:`scale_by_grapes`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import factors
      >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]]),
      ...                       "bias": jnp.zeros(3)},
      ...           "LayerNorm_0": {"scale": jnp.ones(3)}}
      >>> print(factors(params)["Dense_0"]["kernel"])
      [1.5 2.  1. ]
      >>> factors(params)["LayerNorm_0"]
      {'scale': None}

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    found = {
        member.path: factor
        for layer in resolve_layers(params, weight_dimension_numbers).layers
        for member, factor in layer.factors(options)
    }
    return jax.tree_util.tree_map_with_path(lambda keys, _: found.get(path_names(keys)), params)


def summary(
    params: optax.Params,
    weight_dimension_numbers: WeightDimNumOrFn = None,
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
      A table with one row a leaf: path, shape, role (kernel or bias; or left alone, and
      where it is known why: not settled, output), group (leaves of one group are one
      layer), fan-in, nodes, stacked layers, gates, and minimum, mean and maximum of the
      factors of the layer's nodes.

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

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    cells = {}
    layers, reasons = resolve_layers(params, weight_dimension_numbers)
    for layer in layers:
        statistics = _statistics(layer, options)
        for members, role in (layer.kernels, "kernel"), (layer.biases, "bias"):
            for member in members:
                gates = str(layer.gates)
                cells[member.path] = [role, str(layer.group), *_sizes(member), gates, *statistics]
    table = []
    for path, array, _ in tree_leaves(params):
        alone = [reasons.get(path, "left alone"), *("" for _ in ("group", *_NUMBERS))]
        table.append([path_string(path), str(np.shape(array)), *cells.get(path, alone)])
    return _aligned([[*_TEXT, *_NUMBERS], *table])


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    adjust = [str.ljust] * len(_TEXT) + [str.rjust] * len(_NUMBERS)
    return "\n".join(
        "  ".join(f(cell, n) for f, cell, n in zip(adjust, row, widths, strict=True)).rstrip()
        for row in table
    )
