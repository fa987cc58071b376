"""Which layers are output layers: those that no layer reads on the way to the results.

The error of an output layer comes from the results, that is from the loss, and through no weight
of another layer; nor through its own, as that of a recurrent layer does in the steps before the
last. So a layer is an output layer if its pre-activation reaches a result without passing through
a product with a kernel, and reaches no such product at all. What stands between it and the result
does not matter: a nonlinearity, a softmax, a loss, a reduction, a concatenation.

A hidden layer whose activations are returned as well, the carry of a recurrent cell and the
statistics of a batch are not outputs by this rule, since a later layer reads the same values.
"""

from typing import NamedTuple

from grapes_optax._program.flat import reached
from grapes_optax._program.reader import Reader

# No error comes back through these, nor through integers and booleans, unless the program gives
# them a derivative: what reads their results reads no layer.
WITHOUT_ERROR = frozenset({"ceil", "floor", "round", "sign", "stop_gradient"})


class Outputs(NamedTuple):
    """The leaves whose products are read by no layer, and those read by a layer and returned."""

    final: frozenset[int]
    read_again: frozenset[int]


def outputs(reader: Reader) -> Outputs:
    """Follows every product with a kernel to the next ones, and to the results."""
    program = reader.program
    by_hand = {n: frozenset({k}) for n, k in reader.summed.items() if k not in reader.uses}
    products = reader.products | by_hand
    others = [op for op in program.operations if op.outputs[0] not in products]
    of_error = {number for op in others if op.custom for number in op.outputs}
    onward = program.edges(others)
    with_error = program.edges(op for op in others if op.custom or op.name not in WITHOUT_ERROR)
    with_error = {
        number: [n for n in after if n in of_error or n not in program.without_error]
        for number, after in with_error.items()
    }
    read = {
        number for op in program.operations if op.outputs[0] in products for number in op.inputs
    }
    returned: set[int] = set()
    hidden: set[int] = set()
    for number, leaves in products.items():
        leaves = reader.members(leaves)
        if not reached([number], onward).isdisjoint(program.results):
            returned |= leaves
        if not reached([number], with_error).isdisjoint(read):
            hidden |= leaves
    return Outputs(frozenset(returned - hidden), frozenset(returned & hidden))
