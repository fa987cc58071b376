"""Reads the layers of a model from the names of its leaves, by the tables of conventions."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grapes_optax._conventions import BIASES, CONVENTIONS, PAIRS, VECTORS, Beside, Convention
from grapes_optax._importance import Axes, DimensionNumbers
from grapes_optax._tree import KernelPath, Leaf, Path, holes, path_names, path_string, tree_leaves
from grapes_optax._warn import warn

Leaves = Mapping[Path, Leaf]
Where = Callable[[str], bool]


class Group(NamedTuple):
    """What tells one layer from the others: a kernel of it, or else a label of the user's."""

    kernel: Path
    label: Hashable = None

    def __str__(self) -> str:
        return path_string(self.kernel) if self.label is None else str(self.label)


def label_of(kernels: Sequence[Path], members: Sequence[Path]) -> KernelPath:
    """The label of a layer: the path of its first kernel that is no end of another member's."""
    paths = ["/" + path_string(path) for path in members]
    first = next(
        path
        for path in map(path_string, kernels)
        if sum(other.endswith("/" + path) for other in paths) == 1
    )
    return KernelPath(first)


class Reading(NamedTuple):
    """What was read of a tree: axes and group of the leaves to modulate, and notes on others."""

    leaves: dict[Path, tuple[Axes, Group]]
    notes: list[str]
    reasons: dict[Path, str]  # why a leaf is left alone


def _has_name_of_kernel(leaf: Leaf) -> bool:
    return leaf.may_be_kernel and bool(leaf.path) and leaf.path[-1] in BIASES


# Biases.


def bias_of(kernel: Leaf, leaves: Leaves) -> Leaf | None:
    """The leaf beside a kernel that bears the name of its bias."""
    *holder, own = kernel.path or ("",)
    usual, *others = BIASES.get(own, ("",))
    alone = not any((*holder, name) in leaves for name in BIASES if name != own)
    beside = (leaves.get((*holder, name)) for name in [usual, *(others if alone else ())])
    return next((leaf for leaf in beside if leaf and leaf.is_float), None)


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
        sizes = {axis: kernel.shape[axis] for axis in kept}
        sizes[axes.output[-1]] //= share
        if bias.shape == (*sizes.values(), *(1 for _ in ones)):
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


def _split(path: Path) -> Path:
    return tuple("/".join(path).split("/"))  # Haiku joins the names of modules by slashes


def _partners(names: Path) -> Iterator[tuple[Path, bool]]:
    """Where the other kernel of a cell would lie, and whether this one reads the input."""
    for pair, depth in itertools.product(PAIRS, (1, 2)):  # names of leaves, or of modules
        outer, own, inner = names[:-depth], names[-depth:][:1], names[len(names) - depth + 1 :]
        for name, other in (pair.input, pair.carry), (pair.carry, pair.input):
            if own == (name,) and re.search(pair.parent, "/".join(outer)):
                yield (*outer, other, *inner), name == pair.input


def cells_of(shapes: Mapping[Path, Sequence[int]]) -> dict[Path, Cell]:
    """The cell of every kernel that has one, by its name and its sibling's."""
    known = {_split(path): path for path in shapes}
    cells = {}
    for names, path in known.items():
        for partner, reads_input in _partners(names):
            carry = known.get(partner)
            if reads_input and carry is not None:
                cell = Cell((path, carry), (shapes[path], shapes[carry]))
                cells[path] = cells[carry] = cell
    return cells


def torn(here: str, gone: str) -> ValueError:
    return ValueError(
        f"{here} and {gone} are summed into one pre-activation, whose importance needs both, but"
        f" {gone} is masked or in another partition: keep them together, or describe {here} as a"
        " layer of its own with weight_dimension_numbers=."
    )


# Kernels.


class Layout(NamedTuple):
    """One way to read a kernel."""

    axes: Axes
    group: tuple[Path, ...]  # kernels that share the importance
    is_told: bool  # by more than the name of the leaf


class Names:
    """What names, shapes and biases say about the kernels of a tree."""

    def __init__(self, params: optax.Params):
        self.leaves = {leaf.path: leaf for leaf in tree_leaves(params)}
        self.kernels = [leaf for leaf in self.leaves.values() if _has_name_of_kernel(leaf)]
        self.cells = cells_of({leaf.path: leaf.shape for leaf in self.kernels})
        # Branches all of whose vectors have rank 2: what lies there is a stack of layers.
        ranks: dict[Path, set[int]] = defaultdict(set)
        for path, leaf in self.leaves.items():
            if path and path[-1] in VECTORS:
                for n in range(len(path)):
                    ranks[path[:n]].add(leaf.ndim)
        self.stacks = {branch for branch, found in ranks.items() if min(found) > 1}
        self.biases = {kernel.path: self._bias(kernel) for kernel in self.kernels}
        self.layouts = {kernel.path: self._layouts(kernel) for kernel in self.kernels}
        # Names whose order is another in this tree: a bias fits its kernel, but not our rows.
        self.disproved = {
            kernel.path[-1]
            for kernel in self.kernels
            if (bias := self.biases[kernel.path])
            and set(bias.shape) <= set(kernel.shape)
            and not self.layouts[kernel.path]
        }

    def _bias(self, kernel: Leaf) -> Leaf | None:
        """The bias of a kernel, or of the other one of its cell."""
        cell = self.cells.get(kernel.path)
        owners = [kernel, *(self.leaves[path] for path in (cell.paths if cell else ()))]
        return next((bias for owner in owners if (bias := bias_of(owner, self.leaves))), None)

    def is_none(self, kernel: Leaf) -> bool:
        """Whether the names say that it is no kernel: an embedding, a norm."""
        rows = (row for row in itertools.chain(*CONVENTIONS) if row.output is None)
        return any(self._is_meant(row, kernel) for row in rows)

    def _layouts(self, kernel: Leaf) -> set[Layout]:
        """What the first alternatives of which any fits allow."""
        for rows in CONVENTIONS:
            meant = [row for row in rows if self._is_meant(row, kernel)]
            found = set(filter(None, (self._read(row, kernel) for row in meant)))
            if found or any(row.output == () for row in meant):
                return found
        return set()

    def settled(self, kernel: Leaf) -> Layout | None:
        """The one layout of a kernel that nothing in the tree speaks against."""
        if len(found := self.layouts[kernel.path]) != 1:
            return None
        (layout,), bias = found, self.biases[kernel.path]
        nodes = [kernel.shape[axis] for axis in layout.axes.output]
        is_proved = bias is not None and all(kernel.shape.count(size) == 1 for size in nodes)
        doubtful = kernel.path[-1] in self.disproved and not (layout.is_told or is_proved)
        return None if doubtful else layout

    def _is_meant(self, row: Convention, kernel: Leaf) -> bool:
        names = (*kernel.path[-2:-1], kernel.module)
        return (
            kernel.path[-1] == row.leaf
            and row.ndim in (None, kernel.ndim)
            and any(re.search(row.module, name) for name in names)
            and (row.beside is None or self._has_beside(kernel, row.beside))
        )

    def _has_beside(self, kernel: Leaf, beside: Beside) -> bool:
        other = self.leaves.get((*kernel.path[:-2], beside.module, kernel.path[-1]))
        if other is None or other.ndim != kernel.ndim:
            return False
        sizes = [kernel.shape[axis] for axis in beside.own]
        return sizes == [other.shape[axis] for axis in beside.axes]

    def _read(self, row: Convention, kernel: Leaf) -> Layout | None:
        bias = self.biases[kernel.path]
        named = row.reduction or row.stack or row.beside
        if bias is None and (row.with_bias or (not named and self._may_be_stack(kernel))):
            return None
        try:
            axes = Axes.of(kernel.ndim, row.output or (), row.reduction, row.stack, row.gates)
            axes.shape(kernel.array)
        except ValueError:
            return None  # too few axes, or nodes that the gates do not divide
        cell = self.cells.get(kernel.path)
        gates = cell and cell.gates(axes)
        group = cell.paths if cell and gates else (kernel.path,)
        axes = axes._replace(gates=gates or axes.gates)
        fits = axes.reduction and (bias is None or bias_axes(bias, kernel, axes))
        return Layout(axes, group, row.is_told) if fits else None

    def _may_be_stack(self, kernel: Leaf) -> bool:
        branches = (kernel.path[:n] for n in range(len(kernel.path)))
        return kernel.ndim > 2 and any(branch in self.stacks for branch in branches)


def read_names(params: optax.Params, where: Where | None = None) -> Reading:
    """Describes the leaves of a tree by their names; refuses a `where` that cannot be followed."""
    names = Names(params)
    places = {leaf.path: place for place, leaf in enumerate(names.kernels)}
    kernels = [kernel for kernel in names.kernels if not names.is_none(kernel)]
    wanted = [kernel for kernel in kernels if where is None or where(path_string(kernel.path))]
    if kernels and not wanted:
        raise ValueError(f"`where` selects none of the kernels: there are {listed(kernels)}.")
    layouts = {kernel.path: names.settled(kernel) for kernel in wanted}
    groups = {path: layout and layout.group for path, layout in layouts.items()}
    # A layer is settled where all its kernels are: a part of them has another importance.
    settled = {
        path: layout
        for path, layout in layouts.items()
        if layout and all(groups.get(other, layout.group) == layout.group for other in layout.group)
    }
    missing = {_split(path) for path in holes(params)}

    described: dict[Path, tuple[Axes, Group]] = {}
    for kernel in wanted:
        if layout := settled.get(kernel.path):
            _check_group(kernel, layout, settled, missing)
            group = Group(min(layout.group, key=places.__getitem__))
            described[kernel.path] = layout.axes, group
            bias = bias_of(kernel, names.leaves)
            if bias and (along := bias_axes(bias, kernel, layout.axes)):
                described[bias.path] = along, group

    open_ = [kernel for kernel in wanted if kernel.path not in settled]
    open_ += [
        leaf for leaf in _strangers(names.leaves) if not where or where(path_string(leaf.path))
    ]
    notes = []
    if open_:
        notes.append(f"GRAPES leaves alone what names and biases do not settle: {listed(open_)}.")
    elif not described and any(leaf.may_be_kernel for leaf in names.leaves.values()):
        notes.append(
            f"GRAPES modulates nothing: by_path knows none of {listed(names.leaves.values())}."
        )
    alone = [names.leaves[path] for path in without_kernel(names.leaves, holes(params))]
    reasons = {leaf.path: "not settled" for leaf in open_}
    return Reading(described, [f"{note} {WAY_OUT}" for note in notes] + masked_note(alone), reasons)


WAY_OUT = (
    "grapes_optax.infer_dimension_numbers reads the layers from the program instead, and"
    " weight_dimension_numbers= takes what you say yourself; grapes_optax.summary shows the result."
)


def _check_group(
    kernel: Leaf, layout: Layout, wanted: Container[Path], missing: Container[Path]
) -> None:
    """All kernels of a layer go together, or the importance would be that of another layer."""
    for other in layout.group:
        if other not in wanted:
            raise ValueError(
                f"`where` selects {path_string(kernel.path)} and not {path_string(other)}, which"
                " are summed into one pre-activation: select both or neither, or describe the one"
                " as a layer of its own with weight_dimension_numbers=."
            )
    for partner, _ in _partners(_split(kernel.path)):
        if any(partner[:n] in missing for n in range(len(partner) + 1)):
            raise torn(path_string(kernel.path), path_string(partner))


def _strangers(leaves: Leaves) -> Iterator[Leaf]:
    """Leaves of unknown names with a bias beside them that belongs to no kernel."""
    biases = set(itertools.chain(*BIASES.values()))
    for *holder, name in filter(None, leaves):
        leaf = leaves[(*holder, name)]
        beside = [leaves[path] for other in biases if (path := (*holder, other)) in leaves]
        if (
            leaf.may_be_kernel
            and not any((*holder, known) in leaves for known in BIASES)
            and any(
                0 < bias.ndim < leaf.ndim and set(bias.shape) <= set(leaf.shape) for bias in beside
            )
        ):
            yield leaf


def without_kernel(leaves: Iterable[Path], missing: Container[Path]) -> Iterator[Path]:
    """Paths of biases whose kernels are masked, or in another partition."""
    for *holder, name in filter(None, leaves):
        kernels = (kernel for kernel, biases in BIASES.items() if name in biases)
        if any((*holder, kernel) in missing for kernel in kernels):
            yield (*holder, name)


def masked_note(biases: Sequence[Leaf]) -> list[str]:
    what = "GRAPES leaves alone biases whose kernels are masked or in another partition"
    return [f"{what}: {listed(biases)}. Keep both together."] if biases else []


def listed(leaves: Iterable[Leaf], most: int = 8) -> str:
    shown = [f"{path_string(leaf.path)} {leaf.shape}" for leaf in leaves]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


@dataclass(frozen=True)
class ByPath:
    """The description of a tree by the names on its paths: what :func:`by_path` returns."""

    where: Where | None = None

    def __call__(self, params: optax.Params) -> optax.Params:
        dtype = getattr(params, "dtype", type(params))
        if jax.tree_util.all_leaves([params]) and not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"by_path describes parameters, got {params!r}. Under optax.inject_hyperparams name"
                " it in static_args, or it is called with the step count like a schedule:"
                ' static_args="weight_dimension_numbers".'
            )
        described, notes, _ = read_names(params, self.where)
        check_labels(group.kernel for _, group in described.values())
        for note in notes:
            warn(note)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: (
                numbers_of(*described[path_names(keys)]) if path_names(keys) in described else None
            ),
            params,
        )


def check_labels(kernels: Iterable[Path]) -> None:
    """Refuses a tree in which two kernels are written alike: a description could not tell them."""
    paths: dict[str, Path] = {}
    for kernel in kernels:
        if paths.setdefault(path_string(kernel), kernel) != kernel:
            raise ValueError(
                f"Two kernels have the path {path_string(kernel)}: rename a branch, or describe"
                " them by hand with a group each."
            )


def numbers_of(axes: Axes, group: Group) -> DimensionNumbers:
    gates = axes.gates if axes.reduction else 1
    return DimensionNumbers(
        axes.reduction, axes.output, KernelPath(path_string(group.kernel)), gates
    )


def by_path(where: Where | None = None) -> Callable[[optax.Params], optax.Params]:
    """Describes the leaves of a parameter tree by the names on their paths.

    Kernels are known by the names that Flax (linen and nnx), Haiku and Equinox give
    them, and the bias of a kernel joins its group. The kernels of a recurrent cell that
    are summed into one pre-activation are one group, with the gates of the cell.
    Embeddings, norms, leaves of rank 0 and 1 and leaves without a known name are left
    alone, and so is what names and biases leave open: a kernel of rank 3 without a bias,
    or one whose order the biases of other kernels in the tree disprove. This is the
    default description of :func:`scale_by_grapes`; the output layer, which GRAPES does
    not modulate, is excluded with `where`.

    Args:
      where: predicate on the path of a kernel, its names joined by ``/`` without the
        collection ``params`` of linen; a kernel for which it is false is left alone, and
        so is its bias. ``None`` keeps all.

    Returns:
      A function from parameters to a tree of the same structure that holds a
      :class:`DimensionNumbers` for each leaf to modulate and ``None`` for the others.
      It gives a ``UserWarning`` that names what looks like a kernel and is left alone.

    Raises:
      TypeError: if `where` is not a function; of the function, if it is not called with
        a tree (``optax.inject_hyperparams`` calls it with a step count unless it is named
        in ``static_args``).
      ValueError: of the function, if `where` selects no kernel, or a part of those that
        are summed into one pre-activation, or if a part of those is masked.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import by_path
      >>> layer = lambda i, j: {"kernel": jnp.ones((i, j)), "bias": jnp.zeros(j)}
      >>> params = {"hidden": layer(8, 5), "output": layer(5, 3)}
      >>> description = by_path(where=lambda path: not path.startswith("output"))(params)
      >>> description["hidden"]["kernel"]  # doctest: +ELLIPSIS
      DimensionNumbers(reduction_axis=(0,), output_axis=(1,), group='hidden/kernel', ...)
      >>> description["hidden"]["bias"]  # doctest: +ELLIPSIS
      DimensionNumbers(reduction_axis=(), output_axis=(0,), group='hidden/kernel', ...)
      >>> description["output"]
      {'bias': None, 'kernel': None}

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    return ByPath(checked_where(where))


def checked_where(where: Where | None) -> Where | None:
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of a path, such as lambda path: 'output' not in path; got"
            f" {where!r}."
        )
    return where
