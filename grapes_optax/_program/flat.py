"""The program as one flat list of operations: calls and bodies of loops are written out."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.extend import core

# Operations that take a part of a value.
PARTS = frozenset({"dynamic_slice", "slice", "split", "unstack"})


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
