"""Notes what a program does with the leaves: products, sums, biases, cuts."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from grapes_optax._program.equations import Unfollowed
from grapes_optax._program.flat import Operation, Program
from grapes_optax._program.values import (
    Axis,
    Data,
    Factor,
    Lost,
    Pre,
    Value,
    View,
    Weight,
    aligned,
    broadcast,
)
from grapes_optax._tree import Leaf


class Joined(NamedTuple):
    """Weights that the program puts together along an axis, followed as one leaf."""

    axis: int
    sizes: tuple[int, ...]
    parts: tuple[Weight | None, ...]


class Use(NamedTuple):
    """The axes of a kernel where it is multiplied."""

    fan_in: frozenset[Axis]
    nodes: frozenset[Axis]
    from_input: bool


class Bias(NamedTuple):
    """A leaf that is added to the pre-activation of some kernels."""

    leaf: int
    kernels: frozenset[int]
    axis: Axis | None = None  # where it is added to a part of the nodes only
    part: Factor | None = None


class Reader:
    """Follows the leaves through a program, and notes what it does with them."""

    def __init__(self, program: Program, leaves: Sequence[Leaf]):
        self.program, self.leaves = program, leaves
        self.shapes = [np.shape(leaf.array) for leaf in leaves]  # and those of joined leaves
        self.joined: dict[int, Joined] = {}
        self.uses: dict[int, set[Use]] = defaultdict(set)
        # Leaves in each product of weights with what comes from the input, by the product.
        self.products: dict[int, frozenset[int]] = {}
        self.looked_up: set[int] = set()
        self.summed: dict[int, int] = {}  # after a multiplication entry by entry, by the sum
        self.in_pieces: set[int] = set()  # kernels of which a part of the fan-in is used
        self.rejoined: set[int] = set()  # those whose parts are summed
        self.sums: set[frozenset[int]] = set()
        self.biases: set[Bias] = set()
        self.added_to: dict[int, set[int]] = defaultdict(set)  # as biases or not: their kernels
        # Where axes are cut, before or (True) after the nonlinearity; None: not into pieces,
        # or only the running program knows.
        self.ends: dict[Any, set[int | None]] = defaultdict(set)
        # Of which a part is a gate: it goes through a bounded nonlinearity, or multiplies another.
        self.gated: set[Axis] = set()
        self.reasons: dict[int, str] = {}
        self._parents: dict[Axis, Axis] = {}

    def from_input(self, numbers: Iterable[int]) -> bool:
        return not self.program.from_input.isdisjoint(numbers)

    def shape(self, op: Operation) -> tuple[int, ...]:
        return self.program.shapes[op.outputs[0]]

    def has_shape(self, number: int, value: Value) -> bool:
        """Whether the axes that are followed are those of the value."""
        shape = self.program.shapes[number]
        return not isinstance(value, View) or value.shape == shape or 0 in shape

    def extent(self, axis: Any) -> int:
        return self.shapes[axis[0]][axis[1]]

    def new_axis(self, size: int) -> Factor:
        """An axis of no leaf."""
        self.shapes.append((size,))
        return Factor((len(self.shapes) - 1, 0), size)

    def same(self, axis: Any) -> Axis:
        """What stands for all axes that run along the same nodes, or the same stack."""
        while axis in self._parents:
            axis = self._parents[axis]
        return axis

    def unite(self, axes: Iterable[Any]) -> None:
        found = list(map(self.same, axes))
        self._parents |= {axis: found[0] for axis in found if axis != found[0]}

    def members(self, leaves: Iterable[int]) -> set[int]:
        """The leaves themselves in place of those that the program put together."""
        found: set[int] = set()
        for leaf in leaves:
            parts = self.joined[leaf].parts if leaf in self.joined else ()
            found |= self.members(part.leaf for part in parts if part) if parts else {leaf}
        return found

    def entries(self, view: Weight) -> set[tuple[int, Any]]:
        """Leaves in weights that the program put together, and which of their entries."""
        if view.leaf not in self.joined:
            return {(view.leaf, view.indexed)}
        return set().union(*(self.entries(part) for part in self.joined[view.leaf].parts if part))

    def report(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            parts = self.joined[leaf].parts if leaf in self.joined else ()
            self.report((part.leaf for part in parts if part), reason)
            self.reasons.setdefault(leaf, reason)

    def unsettled(self) -> dict[int, str]:
        """The leaves that are left alone for a reason."""
        return {leaf: why for leaf, why in self.reasons.items() if leaf < len(self.leaves)}

    def report_lost(self, lost: Iterable[tuple[int, str]]) -> None:
        for leaf, reason in lost:
            if len(self.shapes[leaf]) >= 2:
                self.report([leaf], reason)

    def consume(self, value: Value, reason: str = "") -> Lost:
        """Notes that a value turns into data; returns the leaves that are lost in it."""
        if isinstance(value, Weight):
            if value.looked_up:
                self.looked_up.add(value.leaf)
            known = value.looked_up or value.product
            return value.lost | (frozenset() if known else {(value.leaf, reason)})
        return value.lost if isinstance(value, Data) else frozenset()

    def holds_weights(self, number: int, value: Value) -> bool:
        """Whether a value was made of parameters alone, and is no activation."""
        if isinstance(value, Weight):
            return not value.product
        of_input = number in self.program.from_input
        of_parameters = number in self.program.from_parameters and not of_input
        return isinstance(value, Data) and (bool(value.lost) or of_parameters)

    # Parts of an axis.

    def note_gate(self, pre: Pre) -> None:
        self.gated |= {f.axis for f in pre.factors() if f.axis and f.size < self.extent(f.axis)}
        self.gated |= {axis for axis, _ in pre.indexed}

    def _cut(self, view: View, factor: Factor, start: int | None, size: int) -> None:
        """Notes that a part of an axis goes its own way: a gate, perhaps."""
        late = isinstance(view, Pre) and view.state == "squashed"
        ends = self.ends[factor.axis, late]
        outer = (f for f in view.factors() if f.axis == factor.axis and f.stride > factor.stride)
        if start is None or factor.start is None or any(outer):
            ends.add(None)
        else:
            ends |= {(factor.start + end) * factor.stride for end in (start, start + size)}

    def _entry(self, view: Any, factor: Factor, index: int | None) -> Any:
        """One entry of a factor, which itself stays."""
        entry = None if index is None or factor.start is None else factor.start + index
        for k, dim in enumerate(view.dims):
            for i, minor in enumerate(dim):
                if minor.axis == factor.axis and minor.size * minor.stride == factor.stride:
                    # An entry of a major factor is a slice of the axis.
                    start = None if entry is None else entry * minor.size
                    return view.with_dim(k, *dim[:i], minor._replace(start=start), *dim[i + 1 :])
        if factor.size < self.extent(factor.axis):
            raise Unfollowed
        return replace(view, indexed=(*view.indexed, (factor.axis, entry)))

    def part(self, view: Any, k: int, start: int | None, size: int) -> Any:
        """A slice of an axis."""
        factors = [factor for factor in view.dims[k] if factor.size > 1]
        if size == math.prod(factor.size for factor in factors):
            return view
        if all(factor.axis is None for factor in factors):
            return view.with_dim(k, *broadcast(size))
        first, *rest = factors
        inner = math.prod(factor.size for factor in rest)
        if size % inner or (start or 0) % inner or first.axis is None:
            raise Unfollowed
        start, size = None if start is None else start // inner, size // inner
        self._cut(view, first, start, size)
        if size == 1:
            view = self._entry(view, first, start)
            return view.with_dim(k, *[f for f in view.dims[k] if f.size > 1][1:])
        begin = None if start is None or first.start is None else first.start + start
        return view.with_dim(k, first._replace(size=size, start=begin), *rest)

    # Layers.

    def multiply(
        self, op: Operation, side: int, fan_in: Any, nodes: Any, weight: Weight, dims: Any
    ) -> list[Value]:
        """Notes a multiplication by the kernel on one side of an operation."""
        kernels = frozenset({weight.leaf})
        from_input = self.from_input([op.inputs[1 - side]])
        self.uses[weight.leaf].add(Use(fan_in, nodes, from_input))
        self.sums.add(kernels)
        if fan_in & (nodes | {axis for axis, _ in weight.indexed}):
            self.report(kernels, "an axis is fan-in and something else as well")
        if from_input:
            self.products[op.outputs[0]] = kernels
            self.report_lost(weight.lost)
        for axis in fan_in:
            sizes = (factor.size for factor in weight.factors() if factor.axis == axis)
            if math.prod(sizes) < self.extent(axis):
                self.in_pieces |= kernels
        return [Pre(dims=tuple(dims), indexed=weight.indexed, kernels=kernels)]

    def _fits(self, a: Factor, b: Factor) -> bool:
        """Whether two factors are the same part of axes of one size."""
        if a.axis is None or b.axis is None or a.start is None:
            return False
        return a[1:] == b[1:] and self.extent(a.axis) == self.extent(b.axis)

    def _entries(self, a: View, b: View) -> list[tuple[Axis, Axis]] | None:
        """Pairs of the axes of which two values hold the same entry; None if they do not."""
        if len(a.indexed) != len(b.indexed):
            return None
        pairs = list(zip(a.indexed, b.indexed, strict=True))
        if any((self.extent(x), i) != (self.extent(y), j) for (x, i), (y, j) in pairs):
            return None
        return [(x, y) for (x, _), (y, _) in pairs]

    def join(self, a: Pre, b: Pre) -> Value:
        """The sum of two pre-activations that nothing else consumes."""
        pairs, entries = aligned(a, b), self._entries(a, b)
        if a.state == b.state == "gated":
            return Data()
        if entries is None and len(a.indexed) == len(b.indexed):
            # Several layers of one stack, or of stacks of other sizes.
            self.report(a.kernels | b.kernels, "summed with another entry of a stack")
            return Data()
        if entries is None or any(bool(left.axis) != bool(right.axis) for left, right in pairs):
            # One value for several nodes, or for all layers of a stack, is a layer by itself.
            more = len(a.indexed) - len(b.indexed)
            if more >= 0 and all(left.axis or not right.axis for left, right in pairs):
                return a
            less = more <= 0 and all(right.axis or not left.axis for left, right in pairs)
            return b if less else Data()
        pairs = [pair for pair in pairs if pair[0].axis]
        kernels = a.kernels | b.kernels
        if not all(self._fits(*pair) for pair in pairs):
            if a.kernels != b.kernels:
                self.report(kernels, "summed with other nodes of another kernel")
            return Data()
        for axes in [(left.axis, right.axis) for left, right in pairs] + entries:
            self.unite(axes)
        self.sums.add(kernels)
        self.rejoined |= a.kernels & b.kernels
        return replace(b if a.state == "gated" else a, kernels=kernels)

    def add_parameter(self, pre: Pre, weight: Weight) -> None:
        """A parameter added to a pre-activation: a bias if it has just its nodes and stack."""
        self.added_to[weight.leaf] |= self.members(pre.kernels)
        pairs, entries = aligned(pre, weight), self._entries(pre, weight)
        more = len(weight.indexed) > len(pre.indexed) or not self.shapes[weight.leaf]
        if more or any(right.axis and not left.axis for left, right in pairs):
            return  # It varies with more than the node: the embedding of a position.
        fitting = [pair for pair in pairs if self._fits(*pair)]
        others = [pair for pair in pairs if pair[0].axis and pair not in fitting]
        in_one_piece = len(others) < 2 and all(
            left.start is not None
            and left.stride == 1
            and right.axis
            and right == Factor(right.axis, self.extent(right.axis))
            for left, right in others
        )
        if entries is None or not in_one_piece:
            if not weight.looked_up and any(right.axis for _, right in pairs):
                self.report([weight.leaf], "added to nodes that are not its own")
            return
        for axes in [(left.axis, right.axis) for left, right in fitting] + entries:
            self.unite(axes)
        part, own = others[0] if others else (None, None)
        self.biases.add(Bias(weight.leaf, pre.kernels, own and own.axis, part))
