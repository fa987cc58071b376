"""A layer is a population of nodes: the leaves that make one pre-activation.

Its kernels are summed into the pre-activation and make its importance, its biases are
added to it; all share one factor. This module turns a parameter tree and a description
of its leaves into a list of layers.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from grapes_optax._importance import (
    Axes,
    HasAxes,
    LeftAlone,
    Options,
    WeightDimNumOrFn,
    is_description,
    layer_factor,
    resolve_axes,
)
from grapes_optax._mesh import Parts, parts_of, whole, whole_shape
from grapes_optax._names import (
    ByPath,
    Group,
    Reading,
    bias_axes,
    bias_of,
    masked_note,
    read_names,
    torn,
    without_kernel,
)
from grapes_optax._tree import KernelPath, Leaf, Path, holes, path_names, path_string, tree_leaves
from grapes_optax._warn import warn

Given = HasAxes | LeftAlone | None


class Member(NamedTuple):
    """One leaf of a layer."""

    path: Path
    array: jax.Array
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its share of the importance: stack axes, then node axes."""
        return self.axes.shape(self.array)


class Layer(NamedTuple):
    """The leaves of one pre-activation; biases are the members without fan-in."""

    group: Group
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
        """Every member, and the factor of its nodes in its own shape: stack, then nodes."""
        factor = self.factor(options)
        for member in self.kernels + self.biases:
            one_gate = math.prod(member.shape) < factor.size
            # A bias as long as one gate belongs to the last.
            part = factor[..., -(factor.shape[-1] // self.gates) :] if one_gate else factor
            same = part.shape == member.shape
            yield member, part if same else whole(part).reshape(member.shape)


def _given(numbers: WeightDimNumOrFn, params: optax.Params) -> dict[Path, Given]:
    """The description as the user gave it: by path of a leaf or of a branch."""
    # A module of Equinox is callable, and may yet be a tree of descriptions.
    if callable(numbers) and jax.tree_util.all_leaves([numbers]):
        numbers = numbers(params)
        if numbers is None:
            raise TypeError(
                "weight_dimension_numbers is a function that returned None: it must return a tree"
                " of DimensionNumbers that fits the parameters."
            )
    flat = jax.tree_util.tree_leaves_with_path(
        numbers, is_leaf=lambda x: x is None or is_description(x)
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


def _read_tree(numbers: WeightDimNumOrFn, params: optax.Params) -> Reading:
    """What a tree of descriptions, a prefix of one, or a single one says of each leaf."""
    given = _given(numbers, params)
    leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
    missing = holes(params)
    values = _spread(given, leaves, missing)
    wanted = {path: value for path, value in values.items() if is_description(value)}

    groups = _groups(given)
    described: dict[Path, tuple[Axes, Group]] = {}
    for path, value in wanted.items():
        bias = bias_of(leaves[path], leaves) if _label(value) is None else None
        if bias and bias.path in wanted and _label(wanted[bias.path]) is None:
            along = bias_axes(bias, leaves[path], _resolve(leaves[path], value))
            if along:
                described[bias.path] = along, Group(path)
    for path, value in wanted.items():
        if path not in described and (path in given or leaves[path].may_be_kernel):
            group = groups.get(path) or Group(path if _label(value) is None else (), _label(value))
            described[path] = _resolve(leaves[path], value), group

    # A layer of which a kernel is masked, or in another partition, has no importance.
    gone = {
        groups.get(path, Group((), _label(value))): path_string(hole)
        for path, value in given.items()
        if is_description(value)
        and _label(value) is not None
        and value.reduction_axis != ()
        and (hole := _hole_at(path, missing)) is not None
    }
    alone = [leaves[path] for path in without_kernel(leaves, missing) if path in wanted]
    for path, (axes, group) in list(described.items()):
        if group in gone and axes.reduction:
            raise torn(path_string(path), gone[group])
        if group in gone:
            alone.append(leaves[path])
            del described[path]
    reasons = {path: value.reason for path, value in values.items() if isinstance(value, LeftAlone)}
    return Reading(described, masked_note(alone), reasons)


def _spread(
    given: dict[Path, Given], leaves: Iterable[Path], missing: set[Path]
) -> dict[Path, Given]:
    """What was given for each leaf, or for a branch that holds it; all must fit."""
    covers = {}
    for path in leaves:
        beginnings = (path[:n] for n in range(len(path), -1, -1))
        cover = next((beginning for beginning in beginnings if beginning in given), None)
        if cover is None:
            raise ValueError(
                "weight_dimension_numbers does not fit the parameters: it says nothing of"
                f" {path_string(path)}. None stands for a leaf or branch that is not modulated."
            )
        covers[path] = cover
    for path in given.keys() - set(covers.values()) - {()}:
        if is_description(given[path]) and _hole_at(path, missing) is None:
            raise ValueError(
                "weight_dimension_numbers does not fit the parameters: it describes"
                f" {path_string(path)}, where they have no leaf."
            )
    return {path: given[cover] for path, cover in covers.items()}


def _hole_at(path: Path, missing: set[Path]) -> Path | None:
    """Where leaves are missing that a description of this path covers, or covered."""
    above = (path[:n] for n in range(len(path) + 1) if path[:n] in missing)
    below = (hole for hole in missing if hole[: len(path)] == path)
    return next(itertools.chain(above, below), None)


def _label(value: HasAxes) -> Hashable:
    return getattr(value, "group", None)


def _groups(given: dict[Path, Given]) -> dict[Path, Group]:
    """The layer of each leaf whose label is the path of a kernel, in the branch described."""
    labels = {path: _label(value) for path, value in given.items() if is_description(value)}
    kernels = {"/".join(p): p for p, label in labels.items() if isinstance(label, KernelPath)}
    groups = {}
    for path, label in labels.items():
        for n in range(len(path) - 1, -1, -1):  # the branches that hold it, from the closest on
            kernel = kernels.get("/".join((*path[:n], label))) if isinstance(label, str) else None
            if kernel is not None and labels[kernel] == label:
                groups[path] = Group(kernel)
                break
    return groups


def _resolve(leaf: Leaf, value: HasAxes) -> Axes:
    try:
        hash(_label(value))
        kind = getattr(leaf.array, "dtype", None)
        if kind is None or not jnp.issubdtype(kind, jnp.inexact):
            raise TypeError(
                f"{leaf.array if kind is None else kind} cannot be modulated: no floats."
            )
        return resolve_axes(value, leaf.array)
    except (TypeError, ValueError) as error:
        message = f"weight_dimension_numbers of {path_string(leaf.path)}: {error}"
        raise type(error)(message) from error


class Layers(NamedTuple):
    """The layers of a parameter tree, and why leaves are left alone where that is known."""

    layers: list[Layer]
    reasons: dict[Path, str]


def resolve_layers(
    params: optax.Params, weight_dimension_numbers: WeightDimNumOrFn, *, quiet: bool = False
) -> Layers:
    """Layers of a parameter tree under a description; checks all, computes nothing."""
    leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
    for leaf in leaves.values():
        if isinstance(leaf.array, str):
            raise TypeError(f"params hold {leaf.array!r} at {path_string(leaf.path)}: no array.")
    numbers = ByPath() if weight_dimension_numbers is None else weight_dimension_numbers
    if isinstance(numbers, Sharded):
        return numbers.layers(params, quiet=quiet)
    if isinstance(numbers, ByPath):
        reading = read_names(params, numbers.where)
    else:
        reading = _read_tree(numbers, params)
    for note in () if quiet else reading.notes:
        warn(note)
    groups: dict[Group, list[Member]] = {}
    for path, (axes, group) in reading.leaves.items():
        groups.setdefault(group, []).append(Member(path, leaves[path].array, axes))
    layers = [_layer(group, members) for group, members in groups.items()]
    return Layers(layers, reading.reasons)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A description, and how the leaves lie inside ``jax.shard_map``: see :func:`sharded`."""

    weight_dimension_numbers: WeightDimNumOrFn
    specs: optax.Params

    def layers(self, params: optax.Params, *, quiet: bool = False) -> Layers:
        """The layers of the whole arrays, with the parts of them that are here."""
        leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
        parts = self._parts(leaves)

        def whole(keys: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.ShapeDtypeStruct:
            shape = whole_shape(jnp.shape(leaf), parts[path_names(keys)])
            return jax.ShapeDtypeStruct(shape, jnp.result_type(leaf))

        arrays = jax.tree_util.tree_map_with_path(whole, params)
        layers, reasons = resolve_layers(arrays, self.weight_dimension_numbers, quiet=quiet)
        for path, _, axes in (m for _, kernels, biases in layers for m in kernels + biases):
            if axes.parts is not None:
                raise ValueError(f"sharded: {path_string(path)} has a spec in its description too.")

        def here(members: tuple[Member, ...]) -> tuple[Member, ...]:
            return tuple(
                Member(path, leaves[path].array, axes._replace(parts=parts[path]))
                for path, _, axes in members
            )

        layers = [Layer(group, here(kernels), here(biases)) for group, kernels, biases in layers]
        return Layers(layers, reasons)

    def _parts(self, leaves: dict[Path, Leaf]) -> dict[Path, Parts]:
        flat = jax.tree_util.tree_leaves_with_path(self.specs, is_leaf=lambda x: x is None)
        specs = {path_names(keys): spec for keys, spec in flat}
        parts = {}
        for path, leaf in leaves.items():
            above = (path[:n] for n in range(len(path), -1, -1))
            cover = next((beginning for beginning in above if beginning in specs), None)
            if cover is None:
                raise ValueError(
                    "sharded: the specs do not fit the parameters, they say nothing of"
                    f" {path_string(path)}."
                )
            try:
                parts[path] = parts_of(specs[cover], leaf.ndim)
            except ValueError as error:
                raise ValueError(f"sharded: {path_string(path)}: {error}") from error
        return parts


def sharded(weight_dimension_numbers: WeightDimNumOrFn, specs: optax.Params) -> Sharded:
    """A description of parameters that are parts of arrays, inside ``jax.shard_map``.

    Sums over a divided fan-in, and maxima over divided nodes, are then those of the whole
    layer: at the cost of one reduction of node vectors for each kernel that is divided.
    Names and shapes are read as those of the whole arrays. Outside of ``jax.shard_map``
    (in ``init`` for instance) the description is as it was; ``jax.jit`` needs none of this.

    Args:
      weight_dimension_numbers: as in :func:`scale_by_grapes`.
      specs: the ``in_specs`` of the parameters: a ``jax.sharding.PartitionSpec`` for all, or
        a tree of them that fits the parameters or is a prefix of them.

    Returns:
      A description for every function that takes ``weight_dimension_numbers`` of a tree.

    Raises:
      TypeError: if `specs` holds anything else.
      ValueError: in those functions, if `specs` says nothing of a leaf, has more entries
        than it has axes, or names no axis of the mesh.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> from grapes_optax import scale_by_grapes, sharded
      >>> params = {"kernel": jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]])}
      >>> specs = {"kernel": P("model", None)}  # the fan-in, over devices
      >>> tx = scale_by_grapes(sharded(None, specs))
      >>> def update(grads, params):
      ...     return tx.update(grads, tx.init(params), params)[0]
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> update = jax.shard_map(update, mesh=mesh, in_specs=(specs, specs), out_specs=specs)

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    for spec in jax.tree.leaves(specs, is_leaf=lambda x: x is None):
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"specs must be a jax.sharding.PartitionSpec, or a tree of them; got {spec!r}."
            )
    return Sharded(weight_dimension_numbers, specs)


def _layer(group: Group, members: list[Member]) -> Layer:
    kernels = tuple(member for member in members if member.axes.reduction)
    biases = tuple(member for member in members if not member.axes.reduction)
    if not kernels:
        raise ValueError(
            f"weight_dimension_numbers of {path_string(members[0].path)} leave no fan-in: name a"
            " reduction_axis to sum over, or (for a bias) the group of a kernel."
        )
    gates = {path_string(kernel.path): kernel.axes.gates for kernel in kernels}
    if len(set(gates.values())) > 1:
        raise ValueError(f"Kernels of one group must have the same number of gates, got {gates}.")
    first, *others = kernels + biases
    *outer, last = first.shape
    stacks = {
        path_string(kernel.path): _without_ones(kernel.shape[: len(kernel.axes.stack)])
        for kernel in kernels
    }
    if len(set(stacks.values())) > 1:
        raise ValueError(f"Kernels of one group must have the same stack, got {stacks}.")
    allowed = [first.shape, (*outer, last // first.axes.gates)]
    for member in others:
        fits = allowed if member in biases else allowed[:1]
        if _without_ones(member.shape) not in map(_without_ones, fits):
            shapes = {path_string(m.path): m.shape for m in (first, *others)}
            raise ValueError(
                f"Leaves of one group must have the same stack and nodes, got {shapes}."
            )
    return Layer(group, kernels, biases)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
