"""The program as one flat list of operations: calls and bodies of loops are written out."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax.extend import core

from grapes_optax._program import equations
from grapes_optax._program.equations import Strange, Unfollowed

# Operations that take a part of a value.
PARTS = frozenset({"dynamic_slice", "slice", "split", "unstack"})


@dataclass
class Operation:
    """One operation; values have numbers."""

    name: str
    inputs: list[int]
    outputs: list[int]
    params: Mapping[str, Any] = field(default_factory=dict)
    unfollowed: str = ""  # why nothing can be followed through it
    custom: bool = False  # whether the program gives it a derivative of its own


class Program:
    """The operations that the results need. A loop runs once, and `carry` closes it."""

    def __init__(self, closed: Any, parameters: int):
        self.shapes: list[tuple[int, ...]] = []
        self.without_error: set[int] = set()  # values of integers or booleans
        self.custom = 0  # how many derivatives of the program's own are around
        self.constants: dict[int, Any] = {}  # arrays and numbers that are known
        self.operations: list[Operation] = []
        self.producers: dict[int, Operation] = {}
        arguments = [self._number(var) for var in equations.opened(closed).invars]
        self.parameters, self.arguments = arguments[:parameters], arguments[parameters:]
        self.results = self.inline(closed, arguments)

        before = {number: op.inputs for op in self.operations for number in op.outputs}
        needed = reached(self.results, before)
        self.operations = [op for op in self.operations if not needed.isdisjoint(op.outputs)]
        self.consumers: dict[int, list[Operation]] = defaultdict(list)
        for op in [*self.operations, Operation("return", self.results, [])]:
            for number in op.inputs:
                self.consumers[number].append(op)
        after = self.edges(self.operations)
        self.from_input = reached(self.arguments, after)
        self.from_parameters = reached(self.parameters, after)

    def edges(self, operations: Iterable[Operation]) -> dict[int, list[int]]:
        """The values that are made directly from a value."""
        after = defaultdict(list)
        for op in operations:
            for number in op.inputs:
                after[number] += op.outputs
        return after

    def _number(self, atom: Any) -> int:
        self.shapes.append(equations.shape(atom))
        if not equations.is_float(atom):
            self.without_error.add(len(self.shapes) - 1)
        return len(self.shapes) - 1

    def _constant(self, atom: Any, value: Any) -> int:
        number = self._number(atom)
        self.constants[number] = value
        return number

    def emit(
        self,
        name: str,
        inputs: list[int],
        outputs: Iterable[Any],
        params: Mapping[str, Any] | None = None,
        unfollowed: str = "",
    ) -> Operation:
        numbers = [self._number(atom) for atom in outputs]
        op = Operation(name, inputs, numbers, params or {}, unfollowed, self.custom > 0)
        self.operations.append(op)
        self.producers |= dict.fromkeys(numbers, op)
        return op

    def inline(self, jaxpr: Any, arguments: Iterable[int]) -> list[int]:
        """Writes out a jaxpr, open or closed; returns the numbers of its results."""
        values = getattr(jaxpr, "consts", ())
        jaxpr = equations.opened(jaxpr)
        numbers = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in itertools.zip_longest(jaxpr.constvars, values):
            numbers[var] = self._constant(var, value)

        def number(atom):
            is_literal = isinstance(atom, core.Literal)
            return self._constant(atom, atom.val) if is_literal else numbers[atom]

        for eqn in jaxpr.eqns:
            written = [atom for atom in eqn.invars if equations.is_reference(atom)]
            inputs, outputs = [number(atom) for atom in eqn.invars], [*eqn.outvars, *written]
            name = eqn.primitive.name
            try:
                if written:
                    raise Unfollowed(f"goes through {name}, in an array that is changed in place")
                results = INLINED.get(name, _as_it_is)(self, eqn, inputs)
            except Exception as reason:  # A coming release may write the equation in any way.
                known = isinstance(reason, Unfollowed)
                why = str(reason if known else Strange(name, repr(reason)))
                results = self.emit(name, inputs, outputs, unfollowed=why).outputs
            numbers |= zip(outputs, results, strict=True)
        return [number(atom) for atom in jaxpr.outvars]

    def loop(
        self, body: Any, constants: list[int], carried: list[int], elements: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """Writes out the body of a loop; returns what it enters and leaves with, and the rest."""
        variables = equations.opened(body).invars[len(constants) :]
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


def reached(start: Iterable[int], edges: Mapping[int, Iterable[int]]) -> set[int]:
    """All that edges lead to from some values, these included."""
    found, waiting = set(), list(start)
    while waiting:
        number = waiting.pop()
        if number not in found:
            found.add(number)
            waiting += edges.get(number, ())
    return found


# How equations are written out. What cannot be read off one raises before anything is emitted.


def _as_it_is(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    parameters = equations.parameters(eqn)
    return program.emit(eqn.primitive.name, inputs, eqn.outvars, parameters).outputs


def _call(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    return program.inline(equations.call(eqn), inputs)


def _custom(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    program.custom += 1
    try:
        return _call(program, eqn, inputs)
    finally:
        program.custom -= 1


def _scan(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    body, constants, carried = equations.scan(eqn)
    scanned = constants + carried
    pairs = zip(inputs[scanned:], equations.opened(body).invars[scanned:], strict=True)
    elements = [program.emit("element", [n], [var]).outputs[0] for n, var in pairs]
    _, leaving, results = program.loop(
        body, inputs[:constants], inputs[constants:scanned], elements
    )
    pairs = zip(results, eqn.outvars[carried:], strict=True)
    return leaving + [program.emit("elements", [n], [var]).outputs[0] for n, var in pairs]


def _while(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    condition, first, (body, constants, _) = equations.while_loop(eqn)
    carried = first + constants
    entering, leaving, _ = program.loop(body, inputs[first:carried], inputs[carried:], [])
    program.inline(condition, inputs[:first] + entering)
    return leaving


def _cond(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    branches = [program.inline(branch, inputs[1:]) for branch in equations.branches(eqn)]
    return [
        results[0]
        if len(set(results)) == 1
        else program.emit("cond", [inputs[0], *results], [var]).outputs[0]
        for var, *results in zip(eqn.outvars, *branches, strict=True)
    ]


def _select(program: Program, eqn: Any, inputs: list[int]) -> list[int]:
    """A vmapped cond chooses between a value and the same without its gradient."""
    cases = set()
    for number in inputs[1:]:
        while number in program.producers and program.producers[number].name == "stop_gradient":
            number = program.producers[number].inputs[0]
        cases.add(number)
    if len(cases) == 1:
        return program.emit("copy", list(cases), eqn.outvars).outputs
    return _as_it_is(program, eqn, inputs)


CALLS = """
    call checkpoint closed_call core_call jit pjit remat remat2
"""
CUSTOM = """
    custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
"""
INLINED: dict[str, Callable[[Program, Any, list[int]], list[int]]] = {
    **dict.fromkeys(CALLS.split(), _call),
    **dict.fromkeys(CUSTOM.split(), _custom),
    "cond": _cond,
    "scan": _scan,
    "select_n": _select,
    "while": _while,
}
