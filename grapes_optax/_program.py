"""Fan-in, nodes, stacks, groups and gates, read from the program that uses the parameters.

An abstract interpretation of the jaxpr. A value is data, or the weights of a leaf, or a
pre-activation; the axes of the latter two are followed through all that moves them. What
the program leaves open is reported and left alone: nothing is guessed.
"""

import difflib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from grapes_optax._importance import DimensionNumbers
from grapes_optax._layers import resolve_layers
from grapes_optax._names import _warn
from grapes_optax._tree import Leaf, path_names, path_string

# The program as one list of operations: calls and the bodies of loops are written out.


@dataclass
class Operation:
    """One operation; values have numbers."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: Mapping[str, Any]


class Program:
    """The operations that the results need. A loop runs once, and `carry` closes it."""

    def __init__(self, closed: core.ClosedJaxpr, parameters: int):
        self.shapes: list[tuple[int, ...]] = []
        self.operations: list[Operation] = []
        arguments = [self._number(var) for var in closed.jaxpr.invars]
        self.parameters = arguments[:parameters]
        results = self.inline(closed, arguments)

        before = {number: op.inputs for op in self.operations for number in op.outputs}
        needed = _reached(results, before)
        self.operations = [op for op in self.operations if not needed.isdisjoint(op.outputs)]
        self.consumers: dict[int, list[Operation]] = defaultdict(list)
        for op in [*self.operations, Operation("return", results, [], {})]:
            for number in op.inputs:
                self.consumers[number].append(op)
        after = {n: [m for op in ops for m in op.outputs] for n, ops in self.consumers.items()}
        self.from_input = _reached(arguments[parameters:], after)

    def _number(self, atom: Any) -> int:
        self.shapes.append(tuple(getattr(atom.aval, "shape", ())))
        return len(self.shapes) - 1

    def emit(
        self, name: str, inputs: list[int], outputs: Iterable[Any], params: Any = ()
    ) -> Operation:
        numbers = [self._number(atom) for atom in outputs]
        self.operations.append(Operation(name, inputs, numbers, dict(params)))
        return self.operations[-1]

    def inline(self, jaxpr: Any, arguments: Iterable[int]) -> list[int]:
        """Writes out a jaxpr, open or closed; returns the numbers of its results."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))
        numbers |= {var: self._number(var) for var in jaxpr.constvars}

        def number(atom):
            return self._number(atom) if isinstance(atom, core.Literal) else numbers[atom]

        for eqn in jaxpr.eqns:
            write_out = INLINED.get(eqn.primitive.name, _as_it_is)
            results = write_out(self, eqn, [number(atom) for atom in eqn.invars])
            numbers |= zip(eqn.outvars, results, strict=True)
        return [number(atom) for atom in jaxpr.outvars]

    def loop(
        self, body: Any, constants: list[int], carried: list[int], elements: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """Writes out the body of a loop; returns what it enters and leaves with, and the rest."""
        variables = getattr(body, "jaxpr", body).invars[len(constants) :]
        pairs = zip(carried, variables, strict=False)
        carries = [self.emit("carry", [number], (var, var)) for number, var in pairs]
        entering = [op.outputs[0] for op in carries]
        results = self.inline(body, constants + entering + elements)
        leaving = []
        for op, result in zip(carries, results, strict=False):
            if result == op.outputs[0]:
                op.name = "copy"  # Weights that the loop only hands on.
                leaving += op.inputs
            else:
                op.inputs.append(result)
                leaving.append(op.outputs[1])
        return entering, leaving, results[len(carried) :]

    def is_shared(self, number: int) -> bool:
        """Whether several operations consume a value, unless each takes a part of it."""
        consumers = self.consumers[number]
        parts = {str(op.params) for op in consumers if op.name in PARTS}
        return len(consumers) > 1 and len(parts) < len(consumers)


def _reached(start: Iterable[int], edges: Mapping[int, Iterable[int]]) -> set[int]:
    reached, waiting = set(), list(start)
    while waiting:
        number = waiting.pop()
        if number not in reached:
            reached.add(number)
            waiting += edges.get(number, ())
    return reached


def _as_it_is(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    return program.emit(eqn.primitive.name, inputs, eqn.outvars, eqn.params).outputs


def _call(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return program.inline(next(eqn.params[name] for name in names if name in eqn.params), inputs)


def _scan(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    body, carried = eqn.params["jaxpr"], eqn.params["num_consts"]
    scanned = carried + eqn.params["num_carry"]
    pairs = zip(inputs[scanned:], body.jaxpr.invars[scanned:], strict=True)
    elements = [program.emit("element", [n], [var]).outputs[0] for n, var in pairs]
    _, leaving, results = program.loop(body, inputs[:carried], inputs[carried:scanned], elements)
    pairs = zip(results, eqn.outvars[len(leaving) :], strict=True)
    return leaving + [program.emit("elements", [n], [var]).outputs[0] for n, var in pairs]


def _while(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    first = eqn.params["cond_nconsts"]
    carried = first + eqn.params["body_nconsts"]
    body = eqn.params["body_jaxpr"]
    entering, leaving, _ = program.loop(body, inputs[first:carried], inputs[carried:], [])
    program.inline(eqn.params["cond_jaxpr"], inputs[:first] + entering)
    return leaving


def _cond(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    branches = [program.inline(branch, inputs[1:]) for branch in eqn.params["branches"]]
    return [
        results[0]
        if len(set(results)) == 1
        else program.emit("cond", [inputs[0], *results], [var]).outputs[0]
        for var, *results in zip(eqn.outvars, *branches, strict=True)
    ]


CALLS = """
    call checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    jit pjit remat remat2
"""
INLINED: dict[str, Callable[[Program, Any, list[int]], list[int]]] = {
    **dict.fromkeys(CALLS.split(), _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}


# What a value is.

Axis = tuple[int, int]  # number of a leaf, and of one of its axes


class Factor(NamedTuple):
    """An axis of a leaf, or a part of one, within an axis of a value.

    Its entry i is the entry start + i of the leaf's, counted in units of `stride`.
    """

    axis: Axis | None  # None: data
    size: int
    start: int | None = 0  # None: known only while the program runs
    stride: int = 1


Dim = tuple[Factor, ...]  # of one axis of a value, from major to minor
Lost = frozenset[tuple[int, str]]  # leaves, and what made their axes unrecognisable


@dataclass(frozen=True)
class Data:
    """A value that is none of the others."""

    uniform: bool = False  # all entries are equal
    gate: bool = False  # bounded: it may multiply a pre-activation as a gate or a mask
    lost: Lost = frozenset()


@dataclass(frozen=True, kw_only=True)
class View:
    """A value whose axes are followed."""

    dims: tuple[Dim, ...]
    indexed: tuple[tuple[Axis, int | None], ...] = ()  # axes of which it holds one entry

    def factors(self, dims: Iterable[int] | None = None) -> Iterator[Factor]:
        return itertools.chain(*(self.dims if dims is None else (self.dims[k] for k in dims)))

    def axes(self, dims: Iterable[int] | None = None) -> frozenset[Axis]:
        return frozenset(f.axis for f in self.factors(dims) if f.axis)

    def covers(self, dims: Iterable[int] | None = None) -> bool:
        """Whether nothing is broadcast along these axes."""
        return all(f.axis or f.size == 1 for f in self.factors(dims))

    def with_dim(self, k: int, *dim: Factor) -> Any:
        return replace(self, dims=(*self.dims[:k], dim, *self.dims[k + 1 :]))


@dataclass(frozen=True, kw_only=True)
class Weight(View):
    """The weights of one leaf, whatever was done to their values."""

    leaf: int
    looked_up: bool = False  # the input says which entry of an axis it holds
    product: bool = False  # multiplied by data: a masked kernel, or the scale of a norm
    lost: Lost = frozenset()  # other leaves that went in


@dataclass(frozen=True, kw_only=True)
class Pre(View):
    """A pre-activation: a sum over the fan-in of one kernel or more."""

    kernels: frozenset[int]
    state: str = "sum"  # or "gated", or "squashed" by a bounded nonlinearity
    shared: bool = False  # something else consumes it too, as in a residual stream


Value = Data | Weight | Pre


def _data(size: int) -> Dim:
    return () if size == 1 else (Factor(None, size),)


def _divided(factor: Factor, size: int) -> tuple[Factor, Factor] | None:
    """A major factor of some size, and the minor one; None if they do not exist."""
    minor, start = factor.size // size, factor.start
    if factor.size % size or (start or 0) % minor:
        return None
    start = None if start is None else start // minor
    major = factor._replace(size=size, start=start, stride=factor.stride * minor)
    return major, factor._replace(size=minor, start=0)


def _regrouped(factors: Iterable[Factor], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The factors dealt out to the axes of a new shape."""
    queue: list[Factor] = []
    for factor in factors:
        if factor.axis is None and queue and queue[-1].axis is None:
            factor = Factor(None, queue.pop().size * factor.size)
        queue.append(factor)
    dims: list[Dim] = []
    for size in shape:
        dims.append(())
        while queue and (size > 1 or (not dims[-1] and queue[0].size == 1)):
            if size % queue[0].size:
                parts = _divided(queue[0], size)
                if parts is None:
                    return None
                queue[:1] = parts
            dims[-1] += (queue[0],)
            size //= queue.pop(0).size
    if dims:
        dims[-1] += tuple(queue)
    return tuple(dims)


def _aligned(a: View, b: View) -> list[tuple[Factor, Factor]]:
    """Pairs of factors that lie on each other in two values of one shape."""
    pairs = []
    for dims in zip(a.dims, b.dims, strict=True):
        left, right = ([factor for factor in dim if factor.size > 1] for dim in dims)
        while left and right:
            size = min(left[0].size, right[0].size)
            parts = _divided(left[0], size), _divided(right[0], size)
            if None not in parts:
                left[:1], right[:1] = ([f for f in part or () if f.size > 1] for part in parts)
            pairs.append((left.pop(0), right.pop(0)))
    return pairs


# What the program does with the leaves.


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
        self.looked_up: set[int] = set()
        self.summed: set[int] = set()  # after a multiplication entry by entry
        self.in_pieces: set[int] = set()  # kernels of which a part of the fan-in is used
        self.rejoined: set[int] = set()  # those whose parts are summed
        self.sums: set[frozenset[int]] = set()
        self.biases: set[Bias] = set()
        # Where axes are cut, before or (True) after the nonlinearity; None: not into pieces,
        # or only the running program knows.
        self.ends: dict[Any, set[int | None]] = defaultdict(set)
        self.reasons: dict[int, str] = {}
        self._parents: dict[Axis, Axis] = {}
        self._read()

    def _read(self) -> None:
        values: dict[int, Value] = {}
        for leaf, number in enumerate(self.program.parameters):
            if jnp.issubdtype(jnp.result_type(self.leaves[leaf].array), jnp.inexact):
                dims = tuple((Factor((leaf, k), n),) for k, n in enumerate(self.shapes[leaf]))
                values[number] = Weight(dims=dims, leaf=leaf)
                if not self.program.consumers[number]:
                    self.report([leaf], "not used")
        for op in self.program.operations:
            operands = [self._operand(number, values.get(number, Data())) for number in op.inputs]
            values |= zip(op.outputs, RULES.get(op.name, _unknown)(self, op, operands), strict=True)

    def _operand(self, number: int, value: Value) -> Value:
        if isinstance(value, Pre) and self.program.is_shared(number):
            return replace(value, shared=True)
        if isinstance(value, Data) and math.prod(self.program.shapes[number]) == 1:
            return replace(value, uniform=True)
        return value

    def from_input(self, numbers: Iterable[int]) -> bool:
        return not self.program.from_input.isdisjoint(numbers)

    def shape(self, op: Operation) -> tuple[int, ...]:
        return self.program.shapes[op.outputs[0]]

    def extent(self, axis: Any) -> int:
        return self.shapes[axis[0]][axis[1]]

    def same(self, axis: Any) -> Axis:
        """What stands for all axes that run along the same nodes, or the same stack."""
        while axis in self._parents:
            axis = self._parents[axis]
        return axis

    def unite(self, axes: Iterable[Any]) -> None:
        found = list(map(self.same, axes))
        self._parents |= {axis: found[0] for axis in found if axis != found[0]}

    def report(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            parts = self.joined[leaf].parts if leaf in self.joined else ()
            self.report((part.leaf for part in parts if part), reason)
            self.reasons.setdefault(leaf, reason)

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

    # Parts of an axis.

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
        """One entry of a factor, which itself stays; None if not understood."""
        entry = None if index is None or factor.start is None else factor.start + index
        for k, dim in enumerate(view.dims):
            for i, minor in enumerate(dim):
                if minor.axis == factor.axis and minor.size * minor.stride == factor.stride:
                    # An entry of a major factor is a slice of the axis.
                    start = None if entry is None else entry * minor.size
                    return view.with_dim(k, *dim[:i], minor._replace(start=start), *dim[i + 1 :])
        if factor.size < self.extent(factor.axis):
            return None
        return replace(view, indexed=(*view.indexed, (factor.axis, entry)))

    def part(self, view: Any, k: int, start: int | None, size: int) -> Any:
        """A slice of an axis; None if not understood."""
        factors = [factor for factor in view.dims[k] if factor.size > 1]
        if view is None or size == math.prod(factor.size for factor in factors):
            return view
        if all(factor.axis is None for factor in factors):
            return view.with_dim(k, *_data(size))
        first, *rest = factors
        inner = math.prod(factor.size for factor in rest)
        if size % inner or (start or 0) % inner or first.axis is None:
            return None
        start, size = None if start is None else start // inner, size // inner
        self._cut(view, first, start, size)
        if size == 1:
            view = self._entry(view, first, start)
            return view and view.with_dim(k, *[f for f in view.dims[k] if f.size > 1][1:])
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
        pairs, entries = _aligned(a, b), self._entries(a, b)
        if a.state == b.state == "gated":
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
        pairs, entries = _aligned(pre, weight), self._entries(pre, weight)
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


# What the operations do to values. A rule takes and returns values, one for each output.


def _unknown(
    reader: Reader, op: Operation, operands: Sequence[Value], reason: str = ""
) -> list[Value]:
    """Data. Leaves are lost where no input takes part, and reported where it joins them."""
    reason = reason or f"goes through {op.name}"
    lost = frozenset(pair for value in operands for pair in reader.consume(value, reason))
    if reader.from_input(op.outputs):
        if op.name not in MIXING:
            reader.report_lost(lost)
        # Weights alone may yet make a kernel: a mean plus a deviation times noise.
        weights = [value.leaf for value in operands if isinstance(value, Weight)]
        together = len(weights) == len(operands) > 1
        lost = frozenset((leaf, reason) for leaf in weights if together)
    return [Data(lost=lost)] * len(op.outputs)


def _identity(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    return list(operands) if len(operands) == len(op.outputs) else [operands[0]] * len(op.outputs)


def _moved(change: Callable[[Reader, Operation, Any], Sequence[Any]]) -> Callable[..., list]:
    """The rule of an operation that moves or selects the entries of its first operand."""

    def rule(reader, op, operands):
        view = operands[0]
        if isinstance(view, Data):
            return [view] * len(op.outputs)
        if isinstance(view, Weight) and reader.from_input(op.inputs[1:]):
            view = replace(view, looked_up=True)
        results = change(reader, op, view)
        return _unknown(reader, op, [view]) if None in results else list(results)

    return rule


def _with_dims(view: Any, dims: Iterable[Dim] | None) -> list[Any]:
    return [None if view is None or dims is None else replace(view, dims=tuple(dims))]


def _transpose(reader, op, view):
    return _with_dims(view, (view.dims[k] for k in op.params["permutation"]))


def _reshape(reader, op, view):
    if 0 in reader.shape(op):
        return [None]
    return _with_dims(view, _regrouped(view.factors(op.params["dimensions"]), reader.shape(op)))


def _squeeze(reader, op, view):
    dropped = op.params["dimensions"]
    return _with_dims(view, (dim for k, dim in enumerate(view.dims) if k not in dropped))


def _broadcast_in_dim(reader, op, view):
    before, after = reader.program.shapes[op.inputs[0]], reader.shape(op)
    dims = list(map(_data, after))
    for k, place in enumerate(op.params["broadcast_dimensions"]):
        dims[place] = view.dims[k] if before[k] == after[place] else dims[place]
    return _with_dims(view, dims)


def _reverse(reader, op, view):
    for k in op.params["dimensions"]:
        view = view.with_dim(k, *(factor._replace(start=None) for factor in view.dims[k]))
    return [view]


def _slice(reader, op, view):
    strides = op.params["strides"] or itertools.repeat(1)
    starts, ends = op.params["start_indices"], op.params["limit_indices"]
    for k, (start, end, step) in enumerate(zip(starts, ends, strides, strict=False)):
        if step > 1 and view.axes([k]):
            return [None]
        view = view and reader.part(view, k, start, -(-(end - start) // step))
    return [view]


def _dynamic_slice(reader, op, view):
    for k, size in enumerate(op.params["slice_sizes"]):
        view = view and reader.part(view, k, None, size)
    return [view]


def _split(reader, op, view):
    sizes = [int(size) for size in op.params["sizes"]]
    starts = itertools.accumulate([0, *sizes[:-1]])
    return [reader.part(view, op.params["axis"], *pair) for pair in zip(starts, sizes, strict=True)]


def _entry_of(reader, view, k, index):
    part = reader.part(view, k, index, 1)
    return part and replace(part, dims=part.dims[:k] + part.dims[k + 1 :])


def _unstack(reader, op, view):
    return [_entry_of(reader, view, op.params["axis"], i) for i in range(len(op.outputs))]


def _element(reader, op, view):
    return [_entry_of(reader, view, 0, None)]


def _elements(reader, op, view):
    return _with_dims(view, (_data(reader.shape(op)[0]), *view.dims))


def _gather(reader, op, view):
    numbers = op.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        return [None]
    for k, size in enumerate(op.params["slice_sizes"]):
        view = view and reader.part(view, k, None, size)
    left_out, offset = numbers.collapsed_slice_dims, numbers.offset_dims
    kept = iter([dim for k, dim in enumerate(view.dims) if k not in left_out] if view else ())
    shape = enumerate(reader.shape(op))
    return _with_dims(view, (next(kept) if k in offset else _data(size) for k, size in shape))


def _concatenate(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    weights = [value if isinstance(value, Weight) else None for value in operands]
    if reader.from_input(op.inputs) or not any(weights):
        return _unknown(reader, op, operands)
    if op.name == "stack":
        axis, sizes = op.params["axis"], (1,) * len(operands)
        weights = [w and replace(w, dims=(*w.dims[:axis], (), *w.dims[axis:])) for w in weights]
    else:
        axis = op.params["dimension"]
        sizes = tuple(reader.program.shapes[number][axis] for number in op.inputs)
    joined = Joined(axis, sizes, tuple(weights))
    leaf = next((leaf for leaf, known in reader.joined.items() if known == joined), None)
    if leaf is None:
        leaf = len(reader.shapes)
        reader.joined[leaf] = joined
        reader.shapes.append(reader.shape(op))
    dims = tuple((Factor((leaf, k), size),) for k, size in enumerate(reader.shape(op)))
    lost = frozenset(pair for weight in weights if weight for pair in weight.lost)
    return [Weight(dims=dims, leaf=leaf, lost=lost)]


def _contraction(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    contracted, batch = op.params["dimension_numbers"]
    shapes = [reader.program.shapes[number] for number in op.inputs]
    free = [
        [k for k in range(len(shapes[i])) if k not in (*contracted[i], *batch[i])] for i in (0, 1)
    ]

    def may_be_kernel(i):
        value = operands[i]
        return (
            isinstance(value, Weight)
            and value.covers([*contracted[i], *free[i]])
            and value.axes(contracted[i])
            and value.axes(free[i])
        )

    sides = [i for i in (0, 1) if may_be_kernel(i)]
    if len(sides) == 2:  # What was multiplied by data is rather an activation.
        sides = [i for i in sides if not getattr(operands[i], "product", False)]
    if len(sides) != 1:
        both = all(isinstance(value, Weight) for value in operands)
        reason = "multiplied by another parameter" if both else "without fan-in or without nodes"
        return _unknown(reader, op, operands, reason)
    (side,) = sides
    weight: Any = operands[side]
    reader.consume(operands[1 - side])
    dims = [weight.dims[k] for k in batch[side]]
    for i in (0, 1):
        dims += [weight.dims[k] if i == side else _data(shapes[i][k]) for k in free[i]]
    fan_in, nodes = weight.axes(contracted[side]), weight.axes(free[side])
    return reader.multiply(op, side, fan_in, nodes, weight, dims)


def _convolution(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    image, kernel = operands
    numbers = op.params["dimension_numbers"]
    out, *others = numbers.rhs_spec
    if not isinstance(kernel, Weight):
        return _unknown(reader, op, operands)
    groups = max(op.params["feature_group_count"], op.params["batch_group_count"])
    rest = list(kernel.dims[out])
    # vmap of a convolution merges the mapped axis into the features, as their groups.
    while len(rest) > 1 and groups > 1 and groups % rest[0].size == 0:
        if rest[0].axis and rest[0].size < reader.extent(rest[0].axis):
            break
        groups //= rest.pop(0).size
    nodes = frozenset(factor.axis for factor in rest)
    if None in nodes or not kernel.covers(others):
        reader.report_lost([(kernel.leaf, "changed before a convolution")])
        return _unknown(reader, op, operands)
    reader.consume(image)
    dims = list(map(_data, reader.shape(op)))
    dims[numbers.out_spec[1]] = kernel.dims[out]
    return reader.multiply(op, 1, kernel.axes(others), nodes, kernel, dims)


def _sum_over(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    (value,) = operands
    if isinstance(value, Weight) and value.product:
        long = {axis for axis in value.axes() if reader.extent(axis) > 1}
        summed = long & value.axes(op.params["axes"])
        if summed and summed != long:
            reader.summed.add(value.leaf)
    return _unknown(reader, op, operands)


# Operations that act entry by entry.


def _is_uniform(value: Value) -> bool:
    if isinstance(value, Weight):
        return all(factor.size == 1 for factor in value.factors())
    return isinstance(value, Data) and value.uniform


def _spread(value: Value, before: Sequence[int], after: Sequence[int]) -> Value:
    """Axes of size 1, or none at all, as they broadcast against other operands."""
    if isinstance(value, Data) or before == after:
        return value
    rows = zip(value.dims or [()] * len(after), before or [1] * len(after), after, strict=True)
    return replace(value, dims=tuple(d if n == m else d + _data(m) for d, n, m in rows))


def _elementwise(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    shapes = [reader.program.shapes[number] for number in op.inputs]
    operands = [
        Data(gate=True)
        if isinstance(value, Pre) and value.state == "squashed"
        else _spread(value, shape, reader.shape(op))
        for value, shape in zip(operands, shapes, strict=True)
    ]
    kinds = {type(value) for value in operands}
    rule = ON_PRE.get(op.name) if Pre in kinds else _on_weights if Weight in kinds else None
    result = rule and rule(reader, op, operands)
    if result:
        return [result]
    (data,) = _unknown(reader, op, operands)
    gates = [isinstance(value, Data) and value.gate for value in operands]
    steady = list(map(_is_uniform, operands))
    bounded = any(gates) and all(map(any, zip(gates, steady, strict=True)))
    return [replace(data, uniform=all(steady), gate=bounded or op.name in BOUNDED.split())]


def _on_weights(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    """Weights stay those of their leaf where nothing adds an axis to them."""
    weights = [value for value in operands if isinstance(value, Weight) and value.dims]
    if len({(weight.leaf, weight.dims) for weight in weights}) > 1:
        weights = [weight for weight in weights if weight.covers()]
    if len({(weight.leaf, weight.dims, weight.indexed) for weight in weights}) != 1:
        return None
    weight = weights[0]
    others = [
        (number, value)
        for number, value in zip(op.inputs, operands, strict=True)
        if not (isinstance(value, Weight) and value.leaf == weight.leaf)
    ]
    if reader.from_input(number for number, value in others if not _is_uniform(value)):
        return replace(weight, product=True) if op.name in ("mul", "div", "select_n") else None
    lost = [reader.consume(value) if isinstance(value, Data) else () for _, value in others]
    rest = (pair for pair in itertools.chain(weight.lost, *lost) if pair[0] != weight.leaf)
    return replace(weight, lost=frozenset(rest))


def _add(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    pres = [value for value in operands if isinstance(value, Pre)]
    alone = [pre for pre in pres if not pre.shared]
    if len(alone) == 2:
        return reader.join(*alone)
    if len(pres) == 2:  # A residual stream and a branch are two layers.
        return alone[0] if alone else None
    for value in operands:
        if isinstance(value, Weight):
            reader.consume(value)
            # What is subtracted is rather the mean of a norm.
            if alone and alone[0].state == "sum" and not value.product and op.name != "sub":
                reader.add_parameter(alone[0], value)
    return pres[0]


def _multiply(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    side = 0 if isinstance(operands[0], Pre) else 1
    pre, other = operands[side], operands[1 - side]
    if op.name == "div" and side == 1:
        return None
    if _is_uniform(other) and not reader.from_input([op.inputs[1 - side]]):
        return pre
    if isinstance(other, Data):
        return replace(pre, state="gated") if other.gate else None
    # The scale of a norm, or a kernel that the input changes: no pre-activation any more.
    data = [Data() if isinstance(value, Pre) else value for value in operands]
    return _on_weights(reader, op, data)


def _choose(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    pres = [value for value in operands if isinstance(value, Pre)]
    if len(pres) == 1 and not any(isinstance(value, Weight) for value in operands):
        return replace(pres[0], state="gated")
    return None


def _squash(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    pres = [value for value in operands if isinstance(value, Pre)]
    if len(pres) == 1 and all(value is pres[0] or _is_uniform(value) for value in operands):
        return replace(pres[0], state="squashed")
    return None


def _negate(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value | None:
    return operands[0]


ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj cos
    cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le
    lgamma log log1p logistic lt max min mul ne neg nextafter not or pow real rem round rsqrt
    select_n sign sin sinh sqrt square sub tan tanh xor
"""
IDENTITIES = """
    convert_element_type copy copy_p device_put layout_constraint mesh_cast name
    optimization_barrier pcast pvary reduce_precision reshard sharding_constraint stop_gradient
"""
OTHERS = """
    carry concatenate dynamic_slice dynamic_update_slice element elements gather reduce_sum
    scatter scatter-add slice split stack unstack
"""
BOUNDED = """
    and clamp eq erf ge gt le logistic lt min ne not or tanh xor
"""
MIXING = frozenset((ELEMENTWISE + OTHERS).split())  # that make a leaf part of an activation
PARTS = frozenset({"dynamic_slice", "slice", "split", "unstack"})
ON_PRE: dict[str, Callable[[Reader, Operation, Sequence[Value]], Value | None]] = {
    **dict.fromkeys(BOUNDED.split(), _squash),
    **dict.fromkeys(("add", "add_any", "sub"), _add),
    **dict.fromkeys(("mul", "div"), _multiply),
    "neg": _negate,
    "select_n": _choose,
}
MOVES: dict[str, Callable[[Reader, Operation, Any], Sequence[Any]]] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "dynamic_slice": _dynamic_slice,
    "element": _element,
    "elements": _elements,
    "gather": _gather,
    "reshape": _reshape,
    "rev": _reverse,
    "slice": _slice,
    "split": _split,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "unstack": _unstack,
}
RULES: dict[str, Callable[[Reader, Operation, Sequence[Value]], list[Value]]] = {
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(IDENTITIES.split(), _identity),
    **{name: _moved(change) for name, change in MOVES.items()},
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "dot_general": _contraction,
    "reduce_sum": _sum_over,
    "stack": _concatenate,
}


# From what was noted to layers.

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
    reader.report(reader.summed - reader.uses.keys(), "multiplied and summed by hand")


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


def _described(
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


def _branches(leaf: Leaf) -> list[str]:
    """The path of a leaf, and those of the branches that hold it, from the closest on."""
    return ["/".join(leaf.path[:n]) for n in range(len(leaf.path), -1, -1)]


def _hints(name: str, given: Mapping[str, Any], leaves: Sequence[Leaf]) -> dict[int, Any]:
    """What the user says of each leaf, or else of the closest branch."""
    known = sorted({path for leaf in leaves for path in _branches(leaf)})
    for path in given.keys() - set(known):
        near = difflib.get_close_matches(path, known, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} names {path!r}, where params have no leaf.{meant}")
    closest = [[path for path in _branches(leaf) if path in given] for leaf in leaves]
    return {leaf: given[paths[0]] for leaf, paths in enumerate(closest) if paths}


def _traced(apply_fn: Callable[..., Any], params: optax.Params, inputs: Any, count: int) -> Program:
    leaves, structure = jax.tree.flatten(inputs)
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def results(params, arrays):
        arrays = iter(arrays)  # What is no array stays as it is: the function may branch on it.
        given = [next(arrays) if i else leaf for i, leaf in zip(is_array, leaves, strict=True)]
        returned = apply_fn(params, *jax.tree.unflatten(structure, given))
        return [leaf for leaf in jax.tree.leaves(returned) if hasattr(leaf, "shape")]

    return Program(
        jax.make_jaxpr(results)(params, list(itertools.compress(leaves, is_array))), count
    )


def infer_dimension_numbers(
    apply_fn: Callable[..., Any],
    params: optax.Params,
    *inputs: Any,
    gates: Mapping[str, int] | None = None,
    stack: Mapping[str, int | Sequence[int]] | None = None,
    where: Callable[[str], bool] | None = None,
) -> Any:
    """Describes the leaves of a parameter tree by what a program does with them.

    The program is traced once, outside of training, and says for any framework and any
    pure function which axes of a kernel are contracted (fan-in), which stay (nodes) and
    which are mapped or scanned over (stack), which kernels are summed into one
    pre-activation, which parameters are added to it (biases), and into how many gates
    the sum of several kernels is cut. Embeddings, norms and what is only added or
    multiplied are left alone, and so is, with a warning, what the program does not
    settle.

    Two things are not in the program: that the nodes of a *single* kernel are the gates
    of a cell (Haiku's LSTM), and that an axis of a kernel is an ensemble mapped over by
    ``jax.vmap`` while the input is not. The user says these with `gates` and `stack`.

    Args:
      apply_fn: the forward pass, a pure function of the parameters and the inputs, such
        as ``model.apply``. (One that takes gradients uses the kernels in two ways.)
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs of the function, the same; other values, flags for instance,
        are handed on as they are.
      gates: number of gates of the kernels at a path, or of all in a branch (its names
        joined by ``/``), instead of that read from the program.
      stack: axis or axes, of each kernel and bias at a path or in a branch, that hold
        independent layers and not nodes.
      where: as in :func:`by_path`.

    Returns:
      A tree of the structure of `params` that holds a :class:`DimensionNumbers` for each
      leaf to modulate and ``None`` for the others, to be passed to
      :func:`scale_by_grapes`. One ``UserWarning`` names the leaves that may be kernels
      and are not settled, with the reason.

    Raises:
      ValueError: if `gates` or `stack` name a path without a kernel, an axis that does
        not exist or is fan-in, or a number of gates that does not divide the nodes.
      TypeError: if a leaf of `params` is not an array (of Equinox: partition the model,
        and combine it in `apply_fn`).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax import infer_dimension_numbers
      >>> def cell(params, x, h):
      ...     z = x @ params["w"] + params["u"] @ h + params["b"]
      ...     return jnp.tanh(z)
      >>> params = {"w": jnp.ones((5, 7)), "u": jnp.ones((7, 7)), "b": jnp.zeros(7)}
      >>> description = infer_dimension_numbers(cell, params, jnp.ones(5), jnp.ones(7))
      >>> description["u"]
      DimensionNumbers(reduction_axis=(1,), output_axis=(0,), group='u', gates=1)
      >>> description["w"]
      DimensionNumbers(reduction_axis=(0,), output_axis=(1,), group='u', gates=1)
      >>> description["b"]
      DimensionNumbers(reduction_axis=(), output_axis=(0,), group='u', gates=1)

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [Leaf(path_names(keys), array, "") for keys, array in flat]
    for leaf in leaves:
        if not hasattr(leaf.array, "shape"):
            raise TypeError(
                f"params hold {leaf.array!r} at {path_string(leaf.path)}: pass arrays alone, and"
                " let apply_fn combine them with the rest (eqx.partition, eqx.combine)."
            )
    gates, stack = gates or {}, stack or {}
    hints = _hints("gates", gates, leaves), _hints("stack", stack, leaves)
    reader = Reader(_traced(apply_fn, params, inputs, len(leaves)), leaves)
    layers = _described(reader, *hints)
    settled = {leaf: numbers for layer in layers for leaf, numbers in layer.items()}
    kernels = [leaf for leaf, numbers in settled.items() if numbers.reduction_axis]
    for name, given, heeded in ("gates", gates, kernels), ("stack", stack, settled):
        paths = {path for leaf in heeded for path in _branches(leaves[leaf])}
        for path in given.keys() - paths:
            raise ValueError(f"{name} names {path!r}, where the program settles no layer.")

    result: list[DimensionNumbers | None] = [None] * len(leaves)
    wanted = [where is None or where(path_string(leaf.path)) for leaf in leaves]
    for layer in layers:
        members = [leaf for leaf in layer if wanted[leaf]]
        first = next((leaf for leaf in members if leaf in kernels), None)
        if first is not None:
            for leaf in members:
                result[leaf] = layer[leaf]._replace(group=path_string(leaves[first].path))
    unsettled = [
        f"{path_string(leaf.path)} {np.shape(leaf.array)}: {reader.reasons[number]}"
        for number, leaf in enumerate(leaves)
        if number in reader.reasons and wanted[number]
    ]
    if unsettled:
        listed = "; ".join(unsettled[:8] + ["..."] * (len(unsettled) > 8))
        _warn(f"GRAPES leaves alone what the program does not settle: {listed}.")
    description = jax.tree.unflatten(structure, result)
    if any(result):
        resolve_layers(params, description)
    return description
