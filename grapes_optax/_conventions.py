"""What the names of Flax, Haiku and Equinox say about their leaves: a table, data only."""

from typing import NamedTuple


class Convention(NamedTuple):
    """One row: how a leaf is laid out that bears this name in such a module.

    Axes count from the front, or from the back where negative. With `reduction` the
    axes that remain are a stack of layers, without it they are fan-in.
    """

    leaf: str
    output: tuple[int, ...] | None  # None: not modulated
    reduction: tuple[int, ...] | None = None
    ndim: int | None = None  # None: any
    module: str = ""  # regular expression, searched in the module's name and in its class
    with_bias: bool | None = None  # None: either


# The first row that fits wins. A row fits a leaf with a bias only where the bias has
# the shape of the row's stack and nodes. Where two rows that need a bias fit alike
# (all sizes equal), shapes do not tell: the leaf is left alone and a warning names it.
CONVENTIONS = (
    # Flax attention, linen and nnx: (inputs, heads, dim) and (heads, dim, outputs).
    Convention("kernel", (1, 2), ndim=3, module="^(query|key|value)$"),
    Convention("kernel", (2,), ndim=3, module="^out$"),
    # Flax Dense by its class name: what precedes (inputs, nodes) is a stack.
    Convention("kernel", (-1,), reduction=(-2,), module=r"^Dense(_\d+)?$"),
    # Without its bias, a DenseGeneral of rank 3 may be anything.
    Convention("kernel", None, ndim=3, module="^(Dense|Linear)General", with_bias=False),
    # Dense, Linear, DenseGeneral to one axis, Conv (grouped and depthwise too).
    Convention("kernel", (-1,)),
    # DenseGeneral (inputs, a, b), or one kernel (inputs, nodes) for each of n positions.
    Convention("kernel", (-2, -1), ndim=3, with_bias=True),
    Convention("kernel", (-1,), reduction=(-2,), with_bias=True),
    # Haiku.
    Convention("w", (-2,), module="conv.*transpose"),
    Convention("w", (-1,)),
    # Equinox, and PyTorch's order in plain trees: nodes first.
    Convention("weight", None, module="(?i)embed|norm"),
    Convention("weight", (0,)),
)

# The leaf beside a kernel that is added to its pre-activation.
BIASES = {"kernel": "bias", "w": "b", "weight": "bias"}


class Cell(NamedTuple):
    """Layers of a recurrent cell: what reads the input, and what reads the carry."""

    pairs: tuple[tuple[str, str], ...]  # names of submodules summed into one pre-activation
    gates: int = 1  # that lie one after the other on the node axis


# Recurrent cells of Flax whose multiplications are submodules, by framework and class.
CELLS = {
    "linen": {
        "SimpleCell": Cell((("i", "h"),)),
        "LSTMCell": Cell((("ii", "hi"), ("if", "hf"), ("ig", "hg"), ("io", "ho"))),
        "GRUCell": Cell((("ir", "hr"), ("iz", "hz"), ("in", "hn"))),
        "MGUCell": Cell((("if", "hf"), ("in", "hn"))),
        "ConvLSTMCell": Cell((("ih", "hh"),), gates=4),
    },
    "nnx": {
        "SimpleCell": Cell((("dense_i", "dense_h"),)),
        "LSTMCell": Cell((("ii", "hi"), ("if_", "hf"), ("ig", "hg"), ("io", "ho"))),
        "OptimizedLSTMCell": Cell((("dense_i", "dense_h"),), gates=4),
        "GRUCell": Cell((("dense_i", "dense_h"),), gates=3),
    },
}
