"""What the names of Flax, Haiku and Equinox say about their leaves: tables, data only."""

from typing import NamedTuple


class Beside(NamedTuple):
    """Evidence of a sibling module: its `axes` have the sizes of the kernel's `own`."""

    module: str
    own: tuple[int, ...]
    axes: tuple[int, ...]


class Convention(NamedTuple):
    """One row: how a leaf is laid out that bears this name in such a module.

    Axes count from the front, or from the back where negative. Axes that are not named
    are fan-in, or with `reduction` a stack of layers.
    """

    leaf: str
    output: tuple[int, ...] | None  # None: not modulated; (): the names do not settle it
    reduction: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()
    ndim: int | None = None  # None: any that has these axes
    module: str = ""  # regular expression, searched in the module's name and in its class
    with_bias: bool | None = None  # None: either
    beside: Beside | None = None
    gates: int = 1


_DENSE = r"^(Dense|Linear|ConvLocal)(_\d+)?$"  # classes of Flax and Equinox

# The first row that fits wins. A row fits a leaf with a bias only where the bias has
# the shape of the row's stack and nodes. Where several rows that need a bias fit alike
# (sizes that are equal), or none fits, the leaf is left alone and a warning names it.
CONVENTIONS = (
    # Flax attention: (inputs, heads, dim) and (heads, dim, outputs), known by each other.
    Convention(
        "kernel",
        (-2, -1),
        reduction=(-3,),
        module="^(query|key|value)$",
        beside=Beside("out", (-2, -1), (-3, -2)),
    ),
    Convention(
        "kernel",
        (-1,),
        reduction=(-3, -2),
        module="^out$",
        beside=Beside("query", (-3, -2), (-2, -1)),
    ),
    # Flax Dense by its class: what precedes (inputs, nodes) is a stack.
    Convention("kernel", (-1,), reduction=(-2,), module=_DENSE),
    # Conv (grouped and depthwise too), Dense, Linear, DenseGeneral to one axis.
    Convention("kernel", (-1,), ndim=2),
    Convention("kernel", (-1,), module="(?i)conv"),
    # Without a bias these may be anything: a convolution, a stack, two axes of nodes.
    Convention("kernel", (), ndim=3, with_bias=False),
    Convention("kernel", (), module="^((Dense|Linear)General|Einsum)", with_bias=False),
    Convention("kernel", (-1,)),
    # DenseGeneral to two axes; stacks; ConvTranspose with a transposed kernel.
    Convention("kernel", (-2, -1), with_bias=True),
    Convention("kernel", (-1,), stack=(0,), with_bias=True),
    Convention("kernel", (-1,), stack=(0, 1), with_bias=True),
    Convention("kernel", (-1,), stack=(1,), with_bias=True),
    *(Convention("kernel", (-2,), ndim=ndim, with_bias=True) for ndim in (3, 4, 5)),
    # Haiku.
    Convention("w", (-1,), module=r"lstm(_\d+)?/linear$", gates=4),
    Convention("w", (-2,), stack=(0,), module="layer_stack.*conv.*transpose"),
    Convention("w", (-1,), stack=(0,), module="layer_stack"),
    Convention("w", (-2,), module="conv.*transpose"),
    Convention("w", (-1,), reduction=(-2,), module=r"linear(_\d+)?$"),
    Convention("w", (-1,)),
    Convention("w", (-1,), stack=(0,), with_bias=True),
    Convention("w_i", (-1,), reduction=(-2,)),
    Convention("w_h", (-1,), reduction=(-2,)),
    # Equinox, and PyTorch's order in plain trees: nodes first.
    Convention("weight", None, module="(?i)embed|norm"),
    Convention("weight", (-2,), reduction=(-1,), module="^Linear$"),
    *(
        Convention(
            "weight",
            (-2 - n,),
            reduction=tuple(range(-1 - n, 0)),
            module=rf"^Conv(Transpose)?{n}d$",
        )
        for n in (1, 2, 3)
    ),
    Convention("weight", (0,)),
    Convention("weight", (1,), stack=(0,), with_bias=True),
    Convention("weight_ih", (-2,), reduction=(-1,)),
    Convention("weight_hh", (-2,), reduction=(-1,)),
)

# The leaf beside a kernel that is added to its pre-activation, or to its last gate.
BIASES = {
    "kernel": "bias",
    "w": "b",
    "weight": "bias",
    "weight_ih": "bias",
    "weight_hh": "bias_n",
    "w_i": "b",
    "w_h": "b",
}


class Pair(NamedTuple):
    """Kernels of a recurrent cell that are summed into one pre-activation.

    The names are those of submodules or leaves that lie side by side. The carry has as many
    features as a gate has nodes: so many gates lie one after the other on the node axis.
    """

    input: str
    carry: str
    parent: str = ""  # regular expression, searched in the name of what holds both


PAIRS = (
    # linen and nnx.
    Pair("i", "h"),
    Pair("dense_i", "dense_h"),
    Pair("ii", "hi"),
    Pair("if", "hf"),
    Pair("if_", "hf"),
    Pair("ig", "hg"),
    Pair("io", "ho"),
    Pair("ir", "hr"),
    Pair("iz", "hz"),
    Pair("in", "hn"),
    Pair("ih", "hh"),
    # Haiku.
    Pair("w_i", "w_h"),
    Pair("input_to_hidden", "hidden_to_hidden"),
    Pair("linear", "linear_1", parent=r"vanilla_rnn(_\d+)?$"),
    # Equinox.
    Pair("weight_ih", "weight_hh"),
)
