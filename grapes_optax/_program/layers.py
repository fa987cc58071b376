"""From what was noted of the leaves to layers, and to their descriptions."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grapes_optax._importance import DimensionNumbers
from grapes_optax._program.reader import Bias, Joined, Reader, Use
from grapes_optax._program.values import Axis
from grapes_optax._tree import path_string

Layers = dict[frozenset[int], set[Bias]]  # kernels of one pre-activation, and its biases


def _layers(reader: Reader) -> Layers:
    """Layers, each with all kernels that are ever summed into it; conflicts are reported."""
    for leaf, joined in reversed(reader.joined.items()):
        _hand_down(reader, leaf, joined)
    layers: Layers = {k: {b for b in reader.biases if b.kernels == k} for k in reader.sums}
    while packed := [kernels for kernels in layers if max(kernels) in reader.joined]:
        for kernels, biases in _unpacked(reader, packed[0], layers.pop(packed[0])):
            layers.setdefault(kernels, set()).update(biases)
    _check_uses(reader)
    largest: Layers = {k: set() for k in layers if not any(k < other for other in layers)}
    for kernels in largest:
        if any(kernels & other and kernels != other for other in largest):
            reader.report(kernels, "summed with different kernels in different places")
    places: dict[int, set[Any]] = defaultdict(set)
    for kernels, bias in itertools.product(largest, itertools.chain(*layers.values())):
        if bias.kernels <= kernels:
            largest[kernels].add(bias)
            places[bias.leaf].add((kernels, bias.part and bias.part[1:]))
    for leaf, found in places.items():
        if len(found) > 1 or leaf in reader.uses:
            reader.report([leaf], "added in several places")
    return largest


def _hand_down(reader: Reader, leaf: int, joined: Joined) -> None:
    """What was noted of joined leaves holds for each of them."""
    if leaf not in reader.uses and all(bias.leaf != leaf for bias in reader.biases):
        return
    if any((leaf, joined.axis) in use.fan_in | use.nodes for use in reader.uses.get(leaf, ())):
        entries = set().union(*(reader.entries(part) for part in joined.parts if part))
        several = [leaf for leaf, n in Counter(leaf for leaf, _ in entries).items() if n > 1]
        reader.report(several, "taken apart and put together anew")
    for part in filter(None, joined.parts):
        if any(f.axis and f.size < reader.extent(f.axis) for f in part.factors()):
            reader.report([part.leaf], "taken apart and put together anew")
        for fan_in, nodes, from_input in reader.uses.get(leaf, ()):
            fan_in, nodes = (part.axes(k for _, k in axes) for axes in (fan_in, nodes))
            reader.uses[part.leaf].add(Use(fan_in, nodes, from_input))
        for k in set(range(len(part.dims))) - {joined.axis}:
            reader.unite([(leaf, k), *part.axes([k])])


def _unpacked(
    reader: Reader, kernels: frozenset[int], biases: set[Bias]
) -> Iterator[tuple[frozenset[int], set[Bias]]]:
    """The layers of kernels some of which were joined."""
    leaf = max(kernels)
    joined = reader.joined[leaf]
    if any((leaf, joined.axis) in use.fan_in for use in reader.uses[leaf]):
        kernels = kernels - {leaf} | {part.leaf for part in joined.parts if part}
        yield kernels, {bias._replace(kernels=kernels) for bias in biases}
        return
    along = reader.same((leaf, joined.axis))

    def is_alike(other):
        row = reader.joined.get(other)
        return row and row.sizes == joined.sizes and reader.same((other, row.axis)) == along

    if not all(map(is_alike, kernels)):
        reader.report(kernels, "summed with other nodes of another kernel")
        return
    starts = itertools.accumulate([0, *joined.sizes[:-1]])
    for i, place in enumerate(zip(starts, joined.sizes, strict=True)):
        rows = [(reader.joined[k].parts[i], reader.joined[k].axis) for k in kernels]
        fed = frozenset(part.leaf for part, _ in rows if part)
        axes, added = [], set()
        for bias in biases:
            if is_alike(bias.leaf):
                row = reader.joined[bias.leaf]
                rows.append((row.parts[i], row.axis))
                added |= {Bias(part.leaf, fed) for part in [row.parts[i]] if part}
            elif bias.part is None or reader.same(bias.part.axis) != along:
                reader.report([bias.leaf], "added to several kernels at once")
            elif (bias.part.start, bias.part.size) == place:
                added.add(Bias(bias.leaf, fed))
                axes.append(bias.axis)
        reader.unite([*axes, *(axis for part, k in rows if part for axis in part.axes([k]))])
        if fed:
            yield fed, added


def _check_uses(reader: Reader) -> None:
    """Reports the kernels that the program uses in more than one way."""
    for leaf, uses in reader.uses.items():
        # A product without input, in a spectral norm for instance, is no pre-activation.
        reader.uses[leaf] = {use for use in uses if use.from_input} or uses
        if len({use[:2] for use in reader.uses[leaf]}) > 1 or leaf in reader.looked_up:
            reader.report([leaf], "used in two ways")
    reader.report(reader.in_pieces - reader.rejoined, "its fan-in belongs to several layers")
    by_hand = set(reader.summed.values()) - reader.uses.keys()
    reader.report(by_hand, "multiplied and summed by hand")


# From layers to descriptions.


class Group:
    """The leaves of one layer, whose axes are known by what they run along."""

    def __init__(self, reader: Reader, kernels: Iterable[int], biases: Iterable[Bias]):
        self.reader, self.kernels = reader, sorted(kernels)
        self.uses = {leaf: next(iter(reader.uses[leaf])) for leaf in self.kernels}
        self.parts = {bias.axis: bias.part for bias in biases if bias.part}
        members = {*self.kernels, *(b.leaf for b in biases)} - reader.reasons.keys()
        self.kept = {leaf: self._kept(leaf) for leaf in sorted(members)}
        self.stack = {
            along
            for leaf, use in self.uses.items()
            for along, k in self.kept[leaf].items()
            if (leaf, k) not in use.nodes
        }
        self.gates = 1
        self.last: Any = None  # the node axis that holds the gates

    def _kept(self, leaf: int) -> dict[Any, int]:
        """The axes of a leaf that are not fan-in."""
        fan_in = self.uses[leaf].fan_in if leaf in self.uses else ()
        lie_on: dict[Any, Any] = {axis: part.axis for axis, part in self.parts.items()}
        kept = (axis for axis in self._axes(leaf) if axis not in fan_in)
        return {self.reader.same(lie_on.get(axis, axis)): axis[1] for axis in kept}

    def _axes(self, leaf: int) -> list[Axis]:
        return [(leaf, k) for k in range(len(self.reader.shapes[leaf]))]

    def rows(self, values: Mapping[int, Any]) -> str:
        paths = {leaf: path_string(self.reader.leaves[leaf].path) for leaf in values}
        return ", ".join(f"{path}: {values[leaf]}" for leaf, path in paths.items())

    def outputs(self) -> list[Axis]:
        return [along for along in self.kept[self.kernels[0]] if along not in self.stack]

    def long(self, axes: Iterable[Axis]) -> set[Axis]:
        return {axis for axis in axes if self.reader.extent(axis) > 1}

    def take_stack(self, said: Mapping[int, int | Sequence[int]]) -> None:
        """Axes that the user says hold independent layers."""
        found: dict[int, set[Axis]] = {}
        for leaf, value in said.items():
            axes = (value,) if isinstance(value, int | np.integer) else value
            ndim, along = len(self.reader.shapes[leaf]), {k: a for a, k in self.kept[leaf].items()}
            for axis in axes:
                if not -ndim <= axis < ndim or axis % ndim not in along:
                    what = "fan-in" if -ndim <= axis < ndim else f"out of range for {ndim} axes"
                    raise ValueError(
                        f"stack names axis {axis}, {what}: {self.rows({leaf: value})}."
                    )
            found[leaf] = {along[axis % ndim] for axis in axes}
        if any(self.long(a) != self.long(b) for a, b in itertools.pairwise(found.values())):
            raise ValueError(f"stack names axes that do not correspond: {self.rows(said)}.")
        self.stack.update(*found.values())
        if said and not self.outputs():
            raise ValueError(f"stack names all axes of nodes: {self.rows(said)}.")

    def take_gates(self, said: Mapping[int, int]) -> None:
        """The number of gates that the user says, or else that the program cuts out."""
        self.last = self.outputs()[-1]
        counts, nodes = set(said.values()), self.reader.extent(self.last)
        if counts:
            self.gates, *others = counts
            whole = isinstance(self.gates, int | np.integer) and self.gates > 0
            if others or not whole or nodes % self.gates:
                raise ValueError(f"gates do not divide {nodes} nodes: {self.rows(said)}.")
        elif len(self.kernels) > 1:
            cut = {axis: n for axis in self.outputs() if (n := self._equal_parts(axis)) != 1}
            # What is cut for another purpose, a rotary embedding for instance, is one population.
            gated = {self.reader.same(axis) for axis in self.reader.gated}
            gated |= {self.reader.same(axis) for axis, late in self.reader.ends if late}
            cut = {axis: n for axis, n in cut.items() if n is None or axis in gated}
            if len(cut) == 1 and None not in cut.values():
                ((self.last, self.gates),) = ((axis, n or 1) for axis, n in cut.items())
            elif cut:
                self.reader.report(self.kernels, "its nodes are cut, but not into equal gates")

    def _equal_parts(self, along: Axis) -> int | None:
        """Number of parts into which a node axis is cut; None if they are not equal."""
        ends: set[Any] = {0, self.reader.extent(along)}
        # Cuts after the nonlinearity count where those before it leave unequal parts.
        for late in (False, True):
            for (axis, when), found in self.reader.ends.items():
                ends |= found if when == late and self.reader.same(axis) == along else set()
            if None not in ends and len({b - a for a, b in itertools.pairwise(sorted(ends))}) == 1:
                return len(ends) - 1
        return None

    def numbers(self, leaf: int) -> DimensionNumbers | None:
        """The description of a member; None where its axes do not correspond."""
        first, kept = self.kept[self.kernels[0]], self.kept[leaf]
        fan_in = tuple(sorted(k for _, k in self.uses[leaf].fan_in)) if leaf in self.uses else ()
        stack = [kept[along] for along in first if along in self.stack and along in kept]
        for axis, part in self.parts.items():
            # A bias as long as one gate belongs to the last.
            nodes = self.reader.extent(self.last)
            place = self.reader.same(part.axis), part.start, part.size * self.gates
            if axis in self._axes(leaf) and place != (self.last, nodes - part.size, nodes):
                return None
        distinct = len(fan_in) + len(kept) == len(self.reader.shapes[leaf])
        if not distinct or stack != sorted(stack) or self.long(first) != self.long(kept):
            return None
        order = [along for along in self.outputs() if along != self.last] + [self.last]
        output = [kept[along] for along in order if along in kept]
        output += [k for along, k in kept.items() if along not in {*first, *self.stack}]
        return DimensionNumbers(fan_in, tuple(output), gates=self.gates if fan_in else 1)


def described(
    reader: Reader, gates: Mapping[int, int], stack: Mapping[int, int | Sequence[int]]
) -> list[dict[int, DimensionNumbers]]:
    """The members of each layer, described; what is not settled is reported."""
    layers = []
    for kernels, biases in _layers(reader).items():
        lost = sorted(kernels & reader.reasons.keys())
        if lost:
            paths = " and ".join(path_string(reader.leaves[leaf].path) for leaf in lost)
            reader.report(kernels, f"summed with {paths}")
            continue
        group = Group(reader, kernels, biases)
        group.take_stack({leaf: stack[leaf] for leaf in group.kept if leaf in stack})
        if any(group.kept[kernel].keys() <= group.stack for kernel in kernels):
            reader.report(kernels, "no axis of nodes")
            continue
        group.take_gates({leaf: gates[leaf] for leaf in group.kernels if leaf in gates})
        numbers = {leaf: group.numbers(leaf) for leaf in group.kept}
        failed = {leaf for leaf, found in numbers.items() if found is None}
        if failed & kernels:
            reader.report(kernels, "summed with kernels whose axes do not correspond")
        reader.report(failed, "added to a part of the nodes")
        if not kernels & reader.reasons.keys():
            layers.append({leaf: found for leaf, found in numbers.items() if found})
    return layers
