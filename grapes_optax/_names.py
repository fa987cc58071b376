"""Reads the layers of a model from the names of its leaves, by the tables of conventions."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from grapes_optax._conventions import BIASES, CONVENTIONS, PAIRS, Beside, Convention
from grapes_optax._importance import Axes, DimensionNumbers
from grapes_optax._tree import Leaf, Path, path_names, path_string, tree_leaves

Leaves = Mapping[Path, Leaf]


def _has_name_of_kernel(leaf: Leaf) -> bool:
    return leaf.may_be_kernel and bool(leaf.path) and leaf.path[-1] in BIASES


# Biases.


def bias_of(kernel: Leaf, leaves: Leaves) -> Leaf | None:
    name = BIASES.get(kernel.path[-1]) if kernel.path else None
    return leaves.get((*kernel.path[:-1], name)) if name else None


def bias_axes(bias: Leaf, kernel: Leaf, axes: Axes) -> Axes | None:
    """Axes of the bias of a kernel laid out by `axes`; None where it has another shape.

    It has the node axes of its kernel, or of its last gate, with the stack axes where the
    kernel has them, and may have further axes of size 1 (Equinox convolutions).
    """
    kept = list(axes.output)
    for axis in axes.stack:
        kept.insert(axis, axis)  # as nn.scan does: at the end where the bias is too short
    ones = tuple(range(len(kept), bias.ndim))
    for share in 1, axes.gates:
        sizes = {axis: np.shape(kernel.array)[axis] for axis in kept}
        sizes[axes.output[-1]] //= share
        if np.shape(bias.array) == (*sizes.values(), *(1 for _ in ones)):
            place = kept.index
            return Axes((), (*map(place, axes.output), *ones), tuple(map(place, axes.stack)))
    return None


# Recurrent cells.


class Cell(NamedTuple):
    """Kernels that read the input and the carry into one pre-activation."""

    paths: tuple[Path, Path]
    shapes: tuple[Sequence[int], Sequence[int]]

    def gates(self, axes: Axes) -> int | None:
        """Number of gates if both kernels are laid out by `axes`; None if they do not fit."""
        read, carried = self.shapes
        if len(read) != len(carried) or [read[a] for a in axes.kept] != [
            carried[a] for a in axes.kept
        ]:
            return None
        nodes, features = carried[axes.output[-1]], carried[axes.reduction[-1]]
        return nodes // features if nodes and features and nodes % features == 0 else None


def cells_of(shapes: Mapping[Path, Sequence[int]]) -> dict[Path, Cell]:
    """The cell of every kernel that has one, by its name and its sibling's."""
    # Haiku joins the names of modules by slashes.
    known = {tuple("/".join(path).split("/")): path for path in shapes}
    cells = {}
    for names, path in known.items():
        for pair, depth in itertools.product(PAIRS, (1, 2)):  # names of leaves, or of modules
            outer, inner = names[:-depth], names[len(names) - depth + 1 :]
            carry = known.get((*outer, pair.carry, *inner))
            named = names[-depth:][:1] == (pair.input,) and re.search(pair.parent, "/".join(outer))
            if named and carry is not None:
                cell = Cell((path, carry), (shapes[path], shapes[carry]))
                cells[path] = cells[carry] = cell
    return cells


# Kernels.


class _Reading(NamedTuple):
    axes: Axes
    group: tuple[Path, ...]  # kernels that share the importance


def _axes(row: Convention, ndim: int) -> Axes | None:
    """Axes of a kernel as a row says; None where it has not enough of them."""
    named = [*(row.output or ()), *(row.reduction or ()), *row.stack]
    if not all(-ndim <= axis < ndim for axis in named):
        return None
    output, reduction, stack = (
        tuple(axis % ndim for axis in axes or ()) for axes in (row.output, row.reduction, row.stack)
    )
    rest = tuple(axis for axis in range(ndim) if axis not in output + reduction + stack)
    reduction, stack = (reduction, rest) if row.reduction else (rest, stack)
    distinct = len(set(output + reduction + stack)) == len(output + reduction + stack)
    return Axes(reduction, output, stack, row.gates) if reduction and distinct else None


def _has_beside(kernel: Leaf, beside: Beside | None, leaves: Leaves) -> bool:
    if beside is None:
        return True
    other = leaves.get((*kernel.path[:-2], beside.module, kernel.path[-1]))
    if other is None or other.ndim != kernel.ndim:
        return False
    shape, own = np.shape(other.array), np.shape(kernel.array)
    return [own[axis] for axis in beside.own] == [shape[axis] for axis in beside.axes]


def _readings(kernel: Leaf, leaves: Leaves, cell: Cell | None) -> list[_Reading] | None:
    """How names, shapes and biases allow to read a kernel; None for what is no kernel."""
    names = (*kernel.path[-2:-1], kernel.module)
    # Of the two kernels of a cell one may have the bias.
    owners = [kernel, *(leaves[path] for path in (cell.paths if cell else ()))]
    bias = next((bias for owner in owners if (bias := bias_of(owner, leaves))), None)
    settled_by_bias = []
    for row in CONVENTIONS:
        if not (
            kernel.path[-1] == row.leaf
            and row.ndim in (None, kernel.ndim)
            and row.with_bias in (None, bias is not None)
            and any(re.search(row.module, name) for name in names)
            and _has_beside(kernel, row.beside, leaves)
        ):
            continue
        if not row.output:
            return None if row.output is None else []
        axes = _axes(row, kernel.ndim)
        if axes is None or np.shape(kernel.array)[axes.output[-1]] % row.gates:
            continue
        gates = cell and cell.gates(axes)
        reading = _Reading(axes, (kernel.path,))
        if cell and gates:
            reading = _Reading(axes._replace(gates=gates), cell.paths)
        if bias is None or bias_axes(bias, kernel, reading.axes):
            if not row.with_bias:
                return settled_by_bias or [reading]
            settled_by_bias.append(reading)
    return settled_by_bias


def by_path(where: Callable[[str], bool] | None = None) -> Callable[[optax.Params], Any]:
    """Describes the leaves of a parameter tree by the names on their paths.

    Kernels are known by the names that Flax (linen and nnx), Haiku and Equinox give
    them, and the bias of a kernel joins its group. The kernels of a recurrent cell that
    are summed into one pre-activation are one group, with the gates of the cell.
    Embeddings, norms, leaves of rank 0 and 1 and leaves without a known name are left
    alone. This is the default description of :func:`scale_by_grapes`; the output layer,
    which GRAPES does not modulate, is excluded with `where`.

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
        kernels = [leaf for leaf in leaves.values() if _has_name_of_kernel(leaf)]
        places = {leaf.path: place for place, leaf in enumerate(kernels)}
        cells = cells_of({leaf.path: np.shape(leaf.array) for leaf in kernels})
        described: dict[Path, DimensionNumbers] = {}
        unclear, excluded = [], []
        for kernel in kernels:
            readings = _readings(kernel, leaves, cells.get(kernel.path))
            if readings is None:
                continue
            if where and not where(path_string(kernel.path)):
                excluded.append(kernel)
            elif len(readings) != 1:
                unclear.append(kernel)
            else:
                axes, group = readings[0]
                label = path_string(min(group, key=places.__getitem__))
                bias = bias_of(kernel, leaves)
                described[kernel.path] = DimensionNumbers(
                    axes.reduction, axes.output, label, axes.gates
                )
                along = bias and bias_axes(bias, kernel, axes)
                if bias and along and (where is None or where(path_string(bias.path))):
                    described[bias.path] = DimensionNumbers((), along.output, label)
        if unclear:
            warn(f"GRAPES leaves alone what names and biases do not settle: {_listed(unclear)}.")
        elif excluded and not described:
            warn(f"GRAPES modulates nothing: `where` excludes {_listed(excluded)}.")
        elif not described and any(leaf.may_be_kernel for leaf in leaves.values()):
            warn(f"GRAPES modulates nothing: by_path knows none of {_listed(leaves.values())}.")
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: described.get(path_names(keys)), params
        )

    return describe


def _listed(leaves: Iterable[Leaf], most: int = 8) -> str:
    shown = [f"{path_string(leaf.path)} {np.shape(leaf.array)}" for leaf in leaves]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def warn(what: str) -> None:
    warnings.warn(
        f"{what} Describe the fan-in and node axes of the kernels with weight_dimension_numbers=,"
        " and see what is modulated with grapes_optax.summary(params).",
        stacklevel=3,
    )
