"""A layer is a population of nodes: the leaves that make one pre-activation.

Its kernels are summed into the pre-activation and make its importance, its biases are
added to it; all share one factor. This module turns a parameter tree and a description
of its leaves into a list of layers.
"""

import math
import re
import warnings
from collections.abc import Callable, Container, Hashable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grapes_optax._conventions import BIASES, CONVENTIONS, Convention
from grapes_optax._importance import (
    Axes,
    DimensionNumbers,
    Options,
    expand,
    layer_factor,
    resolve_axes,
)

Path = tuple[str, ...]


class Leaf(NamedTuple):
    """One leaf of the parameters."""

    path: Path
    array: Any
    module: str  # class of the node that holds it: Equinox keeps its modules in the tree

    @property
    def ndim(self) -> int:
        return np.ndim(self.array)

    @property
    def may_be_kernel(self) -> bool:
        return self.ndim >= 2 and jnp.issubdtype(self.array.dtype, jnp.inexact)


class Member(NamedTuple):
    """One leaf of a layer."""

    path: Path
    array: Any
    axes: Axes
    gates: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its share of the importance: stack axes, then node axes."""
        return self.axes.shape(self.array)


class Layer(NamedTuple):
    """The leaves of one pre-activation; biases are the members without fan-in."""

    kernels: tuple[Member, ...]
    biases: tuple[Member, ...]

    @property
    def gates(self) -> int:
        return self.kernels[0].gates

    def factor(self, options: Options) -> jax.Array:
        """Factor of every node: the kernels' importances are summed first."""
        return layer_factor(
            [kernel.array for kernel in self.kernels],
            [kernel.axes for kernel in self.kernels],
            self.gates,
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


# Paths.


def path_names(keys: jax.tree_util.KeyPath) -> Path:
    """Names along a key path, without the wrapper of a Flax variable."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    fields = ("key", "name", "idx")
    return tuple(str(next(getattr(k, f) for f in fields if hasattr(k, f))) for k in keys)


def path_string(path: Path) -> str:
    return "/".join(path) or "(root)"


def tree_leaves(tree: Any) -> Iterator[Leaf]:
    """Leaves of a tree with their paths and the classes of their modules."""

    def walk(node, keys, module):
        for (*key,), child in jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda x: x is not node
        ):
            if not key:
                yield Leaf(path_names(keys), node, module)
            else:
                wrapper = path_names((*keys, *key)) == path_names(keys)
                yield from walk(child, (*keys, *key), module if wrapper else type(node).__name__)

    yield from walk(tree, (), "")


def leaves_where(tree: Any, condition: Callable[[Any], bool]) -> set[Path]:
    """Paths of the nodes, leaves or not, that fulfil a condition."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=condition)
    return {path_names(keys) for keys, node in flat if condition(node)}


def kernel_paths(params: Any) -> list[Path]:
    """Paths of all leaves that bear the name of a kernel and may be one."""
    return [
        leaf.path for leaf in tree_leaves(params) if leaf.may_be_kernel and leaf.path[-1] in BIASES
    ]


# What the names say.


def _bias_of(kernel: Leaf, leaves: dict[Path, Leaf]) -> Leaf | None:
    name = BIASES.get(kernel.path[-1]) if kernel.path else None
    return leaves.get((*kernel.path[:-1], name)) if name else None


def _bias_axes(bias: Leaf, kernel: Leaf, axes: Axes) -> Axes | None:
    """Axes of the bias of a kernel laid out by `axes`; None where it has another shape.

    It has the stack and node axes of its kernel in their order, and may have further
    axes of size 1 (Equinox convolutions).
    """
    kept = sorted(axes.kept)
    ones = tuple(range(len(kept), bias.ndim))
    shape = tuple(np.shape(kernel.array)[axis] for axis in kept) + (1,) * len(ones)
    if np.shape(bias.array) != shape:
        return None
    place = kept.index
    return Axes((), (*map(place, axes.output), *ones), tuple(map(place, axes.stack)))


def _row_axes(row: Convention, ndim: int) -> Axes | None:
    if row.output is None:
        return None
    output = [axis % ndim for axis in row.output]
    rest = tuple(axis for axis in range(ndim) if axis not in output)
    return resolve_axes(DimensionNumbers(row.reduction or rest, output), ndim)


def _axes_by_name(kernel: Leaf, bias: Leaf | None) -> list[Axes]:
    """Axes that the names allow: none, one, or several where shapes do not tell."""
    names = (*kernel.path[-2:-1], kernel.module)
    fitting = []
    for row in CONVENTIONS:
        if (
            kernel.path[-1:] == (row.leaf,)
            and row.ndim in (None, kernel.ndim)
            and row.with_bias in (None, bias is not None)
            and any(re.search(row.module, name) for name in names)
        ):
            axes = _row_axes(row, kernel.ndim)
            if axes is None or bias is None or _bias_axes(bias, kernel, axes):
                fitting.append((axes, row.with_bias))
    if not fitting or fitting[0][0] is None:
        return []
    axes, by_bias = fitting[0]
    return [axes for axes, other in fitting if other] if by_bias else [axes]


def by_path(where: Callable[[str], bool] | None = None) -> Callable[[optax.Params], Any]:
    """Describes the leaves of a parameter tree by the names on their paths.

    Kernels are known by the names that Flax (linen and nnx), Haiku and Equinox give
    them, and the bias of a kernel joins its group. Embeddings, norms, leaves of rank
    0 and 1 and leaves without a known name are left alone. This is the default
    description of :func:`scale_by_grapes`; the output layer, which GRAPES does not
    modulate, is excluded with `where`.

    Args:
      where: predicate on the path of a leaf, its names joined by ``/``; a leaf for
        which it is false is left alone. ``None`` keeps all.

    Returns:
      A function from parameters to a tree of the same structure that holds a
      :class:`DimensionNumbers` for each leaf to modulate and ``None`` for the others.
      It gives one ``UserWarning`` if it describes no leaf of a tree that has one of
      rank 2 or more, or if names and biases leave the axes of a kernel open.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import by_path
      >>> layer = lambda i, j: {"kernel": jnp.ones((i, j)), "bias": jnp.zeros(j)}
      >>> params = {"hidden": layer(8, 5), "output": layer(5, 3)}
      >>> description = by_path(where=lambda path: not path.startswith("output"))(params)
      >>> description["hidden"]["kernel"]
      DimensionNumbers(reduction_axis=(0,), output_axis=(1,), group='hidden/kernel', gates=1)
      >>> description["hidden"]["bias"]
      DimensionNumbers(reduction_axis=(), output_axis=(0,), group='hidden/kernel', gates=1)
      >>> description["output"]
      {'bias': None, 'kernel': None}
    """

    def describe(params: optax.Params) -> Any:
        leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
        wanted = {path: where is None or where(path_string(path)) for path in leaves}
        described, unclear, excluded = {}, [], []
        for kernel in leaves.values():
            bias = _bias_of(kernel, leaves)
            candidates = _axes_by_name(kernel, bias) if kernel.may_be_kernel else []
            if candidates and not wanted[kernel.path]:
                excluded.append(kernel)
            elif len(candidates) > 1:
                unclear.append(kernel)
            elif candidates:
                described[kernel.path] = DimensionNumbers(*candidates[0][:2])
                if bias is not None and wanted[bias.path]:
                    described[bias.path] = described[kernel.path]
        if unclear:
            _warn(f"GRAPES leaves alone what names and biases do not settle: {_listed(unclear)}.")
        elif excluded and not described:
            _warn(f"GRAPES modulates nothing: `where` excludes {_listed(excluded)}.")
        elif not described and any(leaf.may_be_kernel for leaf in leaves.values()):
            _warn(f"GRAPES modulates nothing: by_path knows none of {_listed(leaves.values())}.")
        grouped = _with_groups(described, leaves)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: grouped.get(path_names(keys)), params
        )

    return describe


def _listed(leaves: Iterable[Leaf], most: int = 8) -> str:
    shown = [f"{path_string(leaf.path)} {np.shape(leaf.array)}" for leaf in leaves]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def _warn(what: str) -> None:
    warnings.warn(
        f"{what} Describe the fan-in and node axes of the kernels with dimension_numbers=, and"
        " see what is modulated with grapes_optax.summary(params).",
        stacklevel=3,
    )


# From descriptions to layers.


def is_description(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def _given(dimension_numbers: Any, params: optax.Params) -> dict[Path, Any]:
    """The description as the user gave it: by path of a leaf or of a branch."""
    if dimension_numbers is None:
        dimension_numbers = by_path()
    # A module of Equinox is callable, and may yet be a tree of descriptions.
    if callable(dimension_numbers) and jax.tree_util.all_leaves([dimension_numbers]):
        dimension_numbers = dimension_numbers(params)
    flat = jax.tree_util.tree_leaves_with_path(
        dimension_numbers, is_leaf=lambda x: x is None or is_description(x)
    )
    given = {path_names(keys): value for keys, value in flat}
    for path, value in given.items():
        if value is not None and not is_description(value):
            raise TypeError(
                f"dimension_numbers holds {value!r} at {path_string(path)}: expected"
                " DimensionNumbers (or another object with reduction_axis and output_axis), or"
                " None for what is not modulated."
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
                "dimension_numbers does not fit the parameters: it says nothing of"
                f" {path_string(path)}. None stands for a leaf or branch that is not modulated."
            )
        covered[path] = prefix
    holes = leaves_where(params, _is_hole)
    for path in given.keys() - set(covered.values()) - {()}:
        masked = any(hole[: len(path)] == path[: len(hole)] for hole in holes)
        if given[path] is not None and not masked:
            raise ValueError(
                "dimension_numbers does not fit the parameters: it describes"
                f" {path_string(path)}, where they have no leaf."
            )
    described = {path: given[prefix] for path, prefix in covered.items()}
    return {path: value for path, value in described.items() if value is not None}


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
        bias = _bias_of(leaves[path], leaves)
        if group(path) is None and bias and bias.path in described and group(bias.path) is None:
            axes = _bias_axes(bias, leaves[path], _resolve(leaves[path], value))
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
        return resolve_axes(description, leaf.ndim)
    except (TypeError, ValueError) as error:
        raise type(error)(f"dimension_numbers of {path_string(leaf.path)}: {error}") from error


def resolve_layers(params: optax.Params, dimension_numbers: Any) -> list[Layer]:
    """Layers of a parameter tree under a description; checks all, computes nothing."""
    given = _given(dimension_numbers, params)
    leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
    grouped = _with_groups(_described(given, leaves, params), leaves, given)

    groups: dict[Hashable, list[Member]] = {}
    for path, value in grouped.items():
        axes = _resolve(leaves[path], value)
        member = Member(path, leaves[path].array, axes, value.gates)
        groups.setdefault(value.group, []).append(member)

    # A bias whose kernel is masked, or in another partition, has no importance.
    elsewhere = {
        getattr(value, "group", None)
        for path, value in given.items()
        if path not in leaves and value is not None and value.reduction_axis != ()
    }
    layers = []
    for label, members in groups.items():
        kernels = tuple(member for member in members if member.axes.reduction)
        biases = tuple(member for member in members if not member.axes.reduction)
        if kernels:
            layers.append(Layer(kernels, biases))
            _check(layers[-1])
        elif label not in elsewhere:
            raise ValueError(
                f"dimension_numbers of {path_string(members[0].path)} leave no fan-in: name a"
                " reduction_axis to sum over, or (for a bias) the group of a kernel."
            )
    return layers


def _check(layer: Layer) -> None:
    def listed(members, what):
        return ", ".join(f"{path_string(m.path)}: {getattr(m, what)}" for m in members)

    gates = {kernel.gates for kernel in layer.kernels}
    if len(gates) > 1:
        raise ValueError(
            "Kernels of one group must have the same number of gates, got"
            f" {listed(layer.kernels, 'gates')}."
        )
    first, *others = layer.kernels + layer.biases
    if not isinstance(first.gates, int) or first.gates < 1 or first.shape[-1] % first.gates:
        raise ValueError(
            f"{first.gates} gates do not divide the last node axis of {path_string(first.path)},"
            f" of {first.shape[-1]} nodes."
        )
    *outer, last = first.shape
    allowed = [first.shape, (*outer, last // first.gates)]
    for member in others:
        fits = allowed if member in layer.biases else allowed[:1]
        if _without_ones(member.shape) not in map(_without_ones, fits):
            raise ValueError(
                "Leaves of one group must have the same stack and nodes, got"
                f" {listed((first, *others), 'shape')}."
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
