"""What each operation does to values, by its name: the place for a new primitive."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from grapes_optax._program.constants import hot_axes, is_zero
from grapes_optax._program.equations import Strange, Unfollowed
from grapes_optax._program.flat import Operation, Program
from grapes_optax._program.reader import Joined, Reader
from grapes_optax._program.values import (
    Data,
    Dim,
    Factor,
    OneHot,
    Pre,
    Value,
    Weight,
    broadcast,
    regrouped,
)
from grapes_optax._tree import Leaf

# A rule takes the values that go into an operation, and returns one for each output.


def _unknown(
    reader: Reader, op: Operation, operands: Sequence[Value], reason: str = ""
) -> list[Value]:
    """Data. Leaves are lost where no input takes part, and reported where it joins them."""
    reason = reason or f"goes through {op.name}"
    lost = frozenset(pair for value in operands for pair in reader.consume(value, reason))
    if reader.from_input(op.outputs):
        pairs = zip(op.inputs, operands, strict=True)
        weights = {number for number, value in pairs if reader.holds_weights(number, value)}
        # A number chooses or scales, and leaves the rest what it is.
        data = [n for n in op.inputs if n not in weights and reader.program.shapes[n]]
        if op.name not in MIXING:
            reader.report_lost(lost)
            if weights and data and op.name != "cond":
                reader.products[op.outputs[0]] = frozenset(leaf for leaf, _ in lost)
        # Weights alone may yet make a kernel: a mean plus a deviation times noise.
        alone = [
            value.leaf for value in operands if isinstance(value, Weight) and not value.looked_up
        ]
        together = len(alone) == len(operands) > 1
        lost = frozenset((leaf, reason) for leaf in alone if together or not data)
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
        return list(change(reader, op, view))

    return rule


def _with_dims(view: Any, dims: Iterable[Dim]) -> list[Any]:
    return [replace(view, dims=tuple(dims))]


def _transpose(reader, op, view):
    return _with_dims(view, (view.dims[k] for k in op.params["permutation"]))


def _reshape(reader, op, view):
    if 0 in reader.shape(op):
        raise Unfollowed
    order = op.params["dimensions"]
    return _with_dims(view, regrouped(view.factors(order), reader.shape(op)))


def _squeeze(reader, op, view):
    dropped = op.params["dimensions"]
    return _with_dims(view, (dim for k, dim in enumerate(view.dims) if k not in dropped))


def _broadcast_in_dim(reader, op, view):
    before, after = reader.program.shapes[op.inputs[0]], reader.shape(op)
    dims = list(map(broadcast, after))
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
            raise Unfollowed
        view = reader.part(view, k, start, -(-(end - start) // step))
    return [view]


def _dynamic_slice(reader, op, view):
    for k, size in enumerate(op.params["slice_sizes"]):
        view = reader.part(view, k, None, size)
    return [view]


def _split(reader, op, view):
    sizes = [int(size) for size in op.params["sizes"]]
    starts = itertools.accumulate([0, *sizes[:-1]])
    return [reader.part(view, op.params["axis"], *pair) for pair in zip(starts, sizes, strict=True)]


def _entry_of(reader, view, k, index):
    part = reader.part(view, k, index, 1)
    return replace(part, dims=part.dims[:k] + part.dims[k + 1 :])


def _unstack(reader, op, view):
    return [_entry_of(reader, view, op.params["axis"], i) for i in range(len(op.outputs))]


def _element(reader, op, view):
    return [_entry_of(reader, view, 0, None)]


def _elements(reader, op, view):
    return _with_dims(view, (broadcast(reader.shape(op)[0]), *view.dims))


def _gather(reader, op, view):
    numbers = op.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        raise Unfollowed
    for k, size in enumerate(op.params["slice_sizes"]):
        view = reader.part(view, k, None, size)
    left_out, offset = numbers.collapsed_slice_dims, numbers.offset_dims
    kept = (dim for k, dim in enumerate(view.dims) if k not in left_out)
    shape = enumerate(reader.shape(op))
    return _with_dims(view, [next(kept) if k in offset else broadcast(size) for k, size in shape])


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
    lost = (value.lost for value in operands if isinstance(value, Weight | Data))
    return [Weight(dims=dims, leaf=leaf, lost=frozenset().union(*lost))]


def _contraction(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    contracted, _ = op.params["dimension_numbers"]
    free = [_free(reader, op, i) for i in (0, 1)]

    def may_be_kernel(i):
        value = operands[i]
        return (
            isinstance(value, Weight)
            and value.covers([*contracted[i], *free[i]])
            and value.axes(contracted[i])
            and value.axes(free[i])
        )

    for i in (0, 1):
        hot, weight = operands[i], operands[1 - i]
        if isinstance(hot, OneHot) and isinstance(weight, Weight) and hot.axes(contracted[i]):
            return _look_up(reader, op, 1 - i, weight, hot)
    if len(contracted[0]) == 0 and any(isinstance(value, OneHot) for value in operands):
        return [_outer(reader, op, operands)]
    sides = [i for i in (0, 1) if may_be_kernel(i)]
    if len(sides) == 2:  # What was multiplied by data is rather an activation.
        sides = [i for i in sides if not getattr(operands[i], "product", False)]
    for i in (0, 1):
        pre, other = operands[i], operands[1 - i]
        if isinstance(other, Data) and _is_aggregated(pre, contracted[i]):
            return [replace(pre, dims=tuple(_dims_of_product(reader, op, {i: pre})))]
    if len(sides) != 1:
        both = all(isinstance(value, Weight) for value in operands)
        reason = "multiplied by another parameter" if both else "without fan-in or without nodes"
        return _unknown(reader, op, operands, reason)
    (side,) = sides
    weight: Any = operands[side]
    reader.consume(operands[1 - side])
    dims = _dims_of_product(reader, op, {side: weight})
    fan_in, nodes = weight.axes(contracted[side]), weight.axes(free[side])
    return reader.multiply(op, side, fan_in, nodes, weight, dims)


def _is_aggregated(value: Value, dims: Iterable[int]) -> bool:
    """Whether a sum over these axes, of neighbours in a graph or of a set, keeps the nodes."""
    return isinstance(value, Pre) and value.state == "sum" and not value.axes(dims)


def _free(reader: Reader, op: Operation, i: int) -> list[int]:
    contracted, batch = op.params["dimension_numbers"]
    rank = len(reader.program.shapes[op.inputs[i]])
    return [k for k in range(rank) if k not in (*contracted[i], *batch[i])]


def _dims_of_product(reader: Reader, op: Operation, views: Mapping[int, Any]) -> list[Dim]:
    """The axes of a contraction: those in common, and the free ones of each operand."""
    _, batch = op.params["dimension_numbers"]
    side = next(iter(views))
    dims = [views[side].dims[k] for k in batch[side]]
    for i in (0, 1):
        shape = reader.program.shapes[op.inputs[i]]
        dims += [
            views[i].dims[k] if i in views else broadcast(shape[k]) for k in _free(reader, op, i)
        ]
    return dims


def _look_up(reader: Reader, op: Operation, side: int, weight: Weight, hot: OneHot) -> list[Value]:
    """The entries that a one-hot array selects, as indices would."""
    contracted, _ = op.params["dimension_numbers"]
    pairs = list(zip(contracted[side], contracted[1 - side], strict=True))
    rest = [k for k, of_hot in pairs if not hot.axes([of_hot])]
    chosen = [weight.dims[k] for k, of_hot in pairs if hot.axes([of_hot])]
    if any(len(dim) != 1 or dim[0].size != reader.extent(dim[0].axis) for dim in chosen):
        raise Unfollowed
    entries = tuple((dim[0].axis, None) for dim in chosen)
    dims = _dims_of_product(reader, op, {side: weight})
    found = replace(weight, indexed=(*weight.indexed, *entries), looked_up=True)
    if not rest:
        return [replace(found, dims=tuple(dims))]
    if not hot.scaled:  # A sum of rows of several tables.
        reader.consume(found)
        return [Data()]
    # An activation in the place of one expert among others.
    free = _free(reader, op, side)
    if not (found.covers([*rest, *free]) and found.axes(rest) and found.axes(free)):
        raise Unfollowed
    fan_in, nodes = found.axes(rest), found.axes(free)
    return reader.multiply(op, side, fan_in, nodes, found, dims)


def _outer(reader: Reader, op: Operation, operands: Sequence[Value]) -> Value:
    """A product without a sum is one-hot along the axes of its factors."""
    if any(isinstance(value, Weight) for value in operands):
        raise Unfollowed
    (i, hot), *more = [(i, v) for i, v in enumerate(operands) if isinstance(v, OneHot)]
    scaled = hot.scaled or not more
    return replace(hot, dims=tuple(_dims_of_product(reader, op, {i: hot})), scaled=scaled)


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
    dims = list(map(broadcast, reader.shape(op)))
    dims[numbers.out_spec[1]] = kernel.dims[out]
    return reader.multiply(op, 1, kernel.axes(others), nodes, kernel, dims)


def _sum_over(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    (value,) = operands
    axes = op.params["axes"]
    if isinstance(value, Pre) and _is_aggregated(value, axes):
        return _with_dims(value, (dim for k, dim in enumerate(value.dims) if k not in axes))
    if isinstance(value, Weight) and value.product:
        long = {axis for axis in value.axes() if reader.extent(axis) > 1}
        summed = long & value.axes(op.params["axes"])
        if summed and summed != long:
            reader.summed[op.outputs[0]] = value.leaf
        elif summed and value.linear and math.prod(reader.shape(op)) > 1:
            # A vector, or a row that was looked up, is the kernel of a single node.
            reader.products[op.outputs[0]] = frozenset({value.leaf})
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
    return replace(value, dims=tuple(d if n == m else d + broadcast(m) for d, n, m in rows))


def _elementwise(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    shapes = [reader.program.shapes[number] for number in op.inputs]
    operands = [
        Data(gate=True)
        if isinstance(value, Pre) and value.state == "squashed"
        else _spread(value, shape, reader.shape(op))
        for value, shape in zip(operands, shapes, strict=True)
    ]
    hot = _one_hot(reader, op, operands)
    if hot:
        return [hot]
    operands = [value.data if isinstance(value, OneHot) else value for value in operands]
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


def _one_hot(reader: Reader, op: Operation, operands: Sequence[Value]) -> OneHot | None:
    """What is zero but for one entry along some axes, and what stays so."""
    program, shape = reader.program, reader.shape(op)
    hot = [value for value in operands if isinstance(value, OneHot)]
    others = [value for value in operands if not isinstance(value, OneHot)]
    if op.name == "eq" and not hot:
        axes = hot_axes(program, *op.inputs)
        dims = [(reader.new_axis(n),) if k in axes else broadcast(n) for k, n in enumerate(shape)]
        return OneHot(dims=tuple(dims)) if axes else None
    if not hot or not all(isinstance(value, Data) for value in others):
        return None
    steady = all(_is_uniform(value) or getattr(value, "gate", False) for value in others)
    scaled = any(value.scaled for value in hot) or not steady
    if op.name == "select_n" and len(operands) == 3:
        # The first says which is taken; the other of the two has to be zero.
        if isinstance(operands[0], OneHot):
            keeps = is_zero(program, op.inputs[1])
        else:
            zeros = [is_zero(program, number) for number in op.inputs[1:]]
            keeps = len(hot) == 1 and any(
                zero and isinstance(value, OneHot)
                for zero, value in zip(zeros, reversed(operands[1:]), strict=True)
            )
    else:
        keeps = op.name in ("mul", "and") or (op.name == "div" and operands[0] is hot[0])
    if not keeps or any(value.shape != shape for value in hot):
        return None
    # A product is one-hot along the axes of both.
    dims = [
        next((dim for dim in row if any(f.axis for f in dim)), row[0])
        for row in zip(*(value.dims for value in hot), strict=True)
    ]
    return replace(hot[0], dims=tuple(dims), scaled=scaled)


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
        if op.name not in ("mul", "div", "select_n"):
            return None
        return replace(weight, product=True, linear=op.name == "mul" and not weight.product)
    lost = [reader.consume(value) if isinstance(value, Data) else () for _, value in others]
    rest = (pair for pair in itertools.chain(weight.lost, *lost) if pair[0] != weight.leaf)
    linear = weight.linear and len(weights) == 1 and op.name in ("mul", "div", "neg")
    return replace(weight, linear=linear, lost=frozenset(rest))


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
    if isinstance(other, Pre) and other is not pre:
        reader.note_gate(other)
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
        reader.note_gate(pres[0])
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


def read(program: Program, leaves: Sequence[Leaf]) -> Reader:
    """Follows the leaves through a program, and notes what it does with them."""
    reader = Reader(program, leaves)
    values: dict[int, Value] = {}
    for leaf, number in enumerate(program.parameters):
        if jnp.issubdtype(jnp.result_type(leaves[leaf].array), jnp.inexact):
            dims = tuple((Factor((leaf, k), n),) for k, n in enumerate(reader.shapes[leaf]))
            values[number] = Weight(dims=dims, leaf=leaf)
            if not program.consumers[number]:
                reader.report_lost([(leaf, "not used")])
    for op in program.operations:
        operands = [_operand(program, number, values.get(number, Data())) for number in op.inputs]
        values |= zip(op.outputs, _results(reader, op, operands), strict=True)
    return reader


def _results(reader: Reader, op: Operation, operands: Sequence[Value]) -> list[Value]:
    """What the rule of an operation says of its results, as far as it can follow them."""
    try:
        if op.unfollowed:
            raise Unfollowed(op.unfollowed)
        results = RULES.get(op.name, _unknown)(reader, op, operands)
        if not all(map(reader.has_shape, op.outputs, results)):
            raise Strange(op.name, "results of another shape")
        return results
    except Unfollowed as reason:
        caught: Unfollowed = reason
    except Exception as error:  # A coming release may write the equation in any way.
        caught = Strange(op.name, repr(error))
    if isinstance(caught, Strange):  # Something may have been noted already.
        weights = [value.leaf for value in operands if isinstance(value, Weight)]
        reader.report_lost((leaf, str(caught)) for leaf in weights)
    return _unknown(reader, op, operands, str(caught))


def _operand(program: Program, number: int, value: Value) -> Value:
    if isinstance(value, Pre) and program.is_shared(number):
        return replace(value, shared=True)
    if isinstance(value, Data) and math.prod(program.shapes[number]) == 1:
        return replace(value, uniform=True)
    return value
