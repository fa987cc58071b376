"""A layer is a population of nodes: the leaves that make one pre-activation.

Its kernels are summed into the pre-activation and make its importance, its biases are
added to it; all share one factor. This module turns a parameter tree and a description
of its leaves into a list of layers.
"""

import math
from collections.abc import Container, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import optax

from grapes_optax._importance import (
    Axes,
    DimensionNumbers,
    LeftAlone,
    Options,
    expand,
    layer_factor,
    resolve_axes,
)
from grapes_optax._names import bias_axes, bias_of, by_path
from grapes_optax._tree import Leaf, Path, leaves_where, path_names, path_string, tree_leaves


class Member(NamedTuple):
    """One leaf of a layer."""

    path: Path
    array: Any
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its share of the importance: stack axes, then node axes."""
        return self.axes.shape(self.array)


class Layer(NamedTuple):
    """The leaves of one pre-activation; biases are the members without fan-in."""

    group: Hashable
    kernels: tuple[Member, ...]
    biases: tuple[Member, ...]

    @property
    def gates(self) -> int:
        return self.kernels[0].axes.gates

    def factor(self, options: Options) -> jax.Array:
        """Factor of every node: the kernels' importances are summed first."""
        return layer_factor(
            [kernel.array for kernel in self.kernels],
            [kernel.axes for kernel in self.kernels],
            options,
        )

    def factors(self, options: Options) -> Iterator[tuple[Member, jax.Array]]:
        """Every member, and the factor in line with its axes."""
        factor = self.factor(options)
        for member in self.kernels + self.biases:
            one_gate = math.prod(member.shape) < factor.size
            # A bias as long as one gate belongs to the last.
            part = factor[..., -(factor.shape[-1] // self.gates) :] if one_gate else factor
            yield member, expand(part.reshape(member.shape), member.axes)


def is_description(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _given(weight_dimension_numbers: Any, params: optax.Params) -> dict[Path, Any]:
    """The description as the user gave it: by path of a leaf or of a branch."""
    if weight_dimension_numbers is None:
        weight_dimension_numbers = by_path()
    # A module of Equinox is callable, and may yet be a tree of descriptions.
    if callable(weight_dimension_numbers) and jax.tree_util.all_leaves([weight_dimension_numbers]):
        weight_dimension_numbers = weight_dimension_numbers(params)
    flat = jax.tree_util.tree_leaves_with_path(
        weight_dimension_numbers, is_leaf=lambda x: x is None or is_description(x)
    )
    given = {path_names(keys): value for keys, value in flat}
    for path, value in given.items():
        if not (value is None or isinstance(value, LeftAlone) or is_description(value)):
            raise TypeError(
                f"weight_dimension_numbers holds {value!r} at {path_string(path)}: expected"
                " DimensionNumbers (or another object with reduction_axis and output_axis), or"
                " None or LeftAlone for what is not modulated."
            )
    return given


def _is_hole(x: Any) -> bool:
    """Whether a transformation or a framework has taken the leaves away here."""
    return x is None or isinstance(x, optax.MaskedNode)


def _described(given: dict[Path, Any], leaves: dict[Path, Leaf], params: Any) -> dict[Path, Any]:
    """The description that covers each leaf; leaves that are not modulated drop out."""
    covered = {}
    for path in leaves:
        prefixes = (path[:n] for n in range(len(path), -1, -1))
        prefix = next((prefix for prefix in prefixes if prefix in given), None)
        if prefix is None:
            raise ValueError(
                "weight_dimension_numbers does not fit the parameters: it says nothing of"
                f" {path_string(path)}. None stands for a leaf or branch that is not modulated."
            )
        covered[path] = prefix
    holes = leaves_where(params, _is_hole)
    for path in given.keys() - set(covered.values()) - {()}:
        masked = any(hole[: len(path)] == path[: len(hole)] for hole in holes)
        if is_description(given[path]) and not masked:
            raise ValueError(
                "weight_dimension_numbers does not fit the parameters: it describes"
                f" {path_string(path)}, where they have no leaf."
            )
    described = {path: given[prefix] for path, prefix in covered.items()}
    return {path: value for path, value in described.items() if is_description(value)}


def _with_groups(
    described: dict[Path, Any], leaves: dict[Path, Leaf], alone: Container[Path] = ()
) -> dict[Path, DimensionNumbers]:
    """Gives every leaf a group: that of its own, or for a bias that of its kernel.

    What stands in `alone` was described by itself; elsewhere a leaf that cannot be a
    kernel (a norm in a branch that one description covers) drops out.
    """

    def group(path):
        return getattr(described[path], "group", None)

    grouped = {}
    for path, value in described.items():
        bias = bias_of(leaves[path], leaves)
        if group(path) is None and bias and bias.path in described and group(bias.path) is None:
            axes = bias_axes(bias, leaves[path], _resolve(leaves[path], value))
            if axes:
                label = path_string(path)
                grouped[bias.path] = DimensionNumbers((), axes.output, label)
    for path, value in described.items():
        if path not in grouped and (path in alone or leaves[path].may_be_kernel):
            label = path_string(path) if group(path) is None else group(path)
            gates = getattr(value, "gates", 1)
            grouped[path] = DimensionNumbers(value.reduction_axis, value.output_axis, label, gates)
    return grouped


def _resolve(leaf: Leaf, description: Any) -> Axes:
    try:
        axes = resolve_axes(description, leaf.ndim)
        axes.shape(leaf.array)  # the gates divide it
        return axes
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"weight_dimension_numbers of {path_string(leaf.path)}: {error}"
        ) from error


def resolve_layers(params: optax.Params, weight_dimension_numbers: Any) -> list[Layer]:
    """Layers of a parameter tree under a description; checks all, computes nothing."""
    return resolve(params, weight_dimension_numbers)[0]


def resolve(
    params: optax.Params, weight_dimension_numbers: Any
) -> tuple[list[Layer], dict[Path, LeftAlone]]:
    """The layers, and what the description says of leaves or branches that it leaves alone."""
    given = _given(weight_dimension_numbers, params)
    alone = {path: value for path, value in given.items() if isinstance(value, LeftAlone)}
    leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
    grouped = _with_groups(_described(given, leaves, params), leaves, given)

    groups: dict[Hashable, list[Member]] = {}
    for path, value in grouped.items():
        member = Member(path, leaves[path].array, _resolve(leaves[path], value))
        groups.setdefault(value.group, []).append(member)

    # A bias whose kernel is masked, or in another partition, has no importance.
    elsewhere = {
        getattr(value, "group", None)
        for path, value in given.items()
        if path not in leaves and is_description(value) and value.reduction_axis != ()
    }
    layers = []
    for label, members in groups.items():
        kernels = tuple(member for member in members if member.axes.reduction)
        biases = tuple(member for member in members if not member.axes.reduction)
        if kernels:
            layers.append(Layer(label, kernels, biases))
            _check(layers[-1])
        elif label not in elsewhere:
            raise ValueError(
                f"weight_dimension_numbers of {path_string(members[0].path)} leave no fan-in: name"
                " a reduction_axis to sum over, or (for a bias) the group of a kernel."
            )
    return layers, alone


def _check(layer: Layer) -> None:
    first, *others = layer.kernels + layer.biases
    gates = {path_string(kernel.path): kernel.axes.gates for kernel in layer.kernels}
    if len(set(gates.values())) > 1:
        raise ValueError(f"Kernels of one group must have the same number of gates, got {gates}.")
    *outer, last = first.shape
    allowed = [first.shape, (*outer, last // layer.gates)]
    for member in others:
        fits = allowed if member in layer.biases else allowed[:1]
        if _without_ones(member.shape) not in map(_without_ones, fits):
            shapes = {path_string(m.path): m.shape for m in (first, *others)}
            raise ValueError(
                f"Leaves of one group must have the same stack and nodes, got {shapes}."
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
