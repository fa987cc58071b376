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
    output: tuple[int, ...] | None  # None: not modulated; (): the names leave it open
    reduction: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()
    ndim: int | None = None  # None: any that has these axes
    module: str = ""  # regular expression, searched in the module's name and in its class
    with_bias: bool = False  # whether it needs the evidence of a bias
    beside: Beside | None = None
    gates: int = 1

    @property
    def is_told(self) -> bool:
        """Whether more than the name of the leaf speaks for it."""
        return bool(self.module or self.beside)


_DENSE = r"^(Dense|Linear)(_\d+)?$"  # classes of Flax and Equinox
_INPUTS = "^(query|key|value)$"
_TRANSPOSED = "(?i)transpose|deconv|^up"  # whose kernels Flax lays out either way
_CONV = "(?i)^(?!up|.*(transpose|deconv)).*conv"

# Rows of one line are alternatives: the first line of which any row fits decides, and it
# settles the axes where its rows that fit agree. A row fits a leaf with a bias only where
# the bias has the shape of the row's stack and nodes. A leaf that nothing settles is left
# alone, and a warning names it.
CONVENTIONS: tuple[tuple[Convention, ...], ...] = (
    *((Convention(leaf, (), module="(?i)einsum"),) for leaf in ("kernel", "w", "weight")),
    # Flax attention: (inputs, heads, dim) and (heads, dim, outputs), known by each other;
    # scanned along axis 0 or 1.
    (
        Convention("kernel", (1, 2), ndim=3, module=_INPUTS, beside=Beside("out", (1, 2), (0, 1))),
        Convention(
            "kernel",
            (2, 3),
            stack=(0,),
            ndim=4,
            module=_INPUTS,
            beside=Beside("out", (0, 2, 3), (0, 1, 2)),
        ),
        Convention(
            "kernel",
            (2, 3),
            stack=(1,),
            ndim=4,
            module=_INPUTS,
            beside=Beside("out", (1, 2, 3), (1, 0, 2)),
        ),
    ),
    (
        Convention("kernel", (2,), ndim=3, module="^out$", beside=Beside("query", (0, 1), (1, 2))),
        Convention(
            "kernel",
            (3,),
            stack=(0,),
            ndim=4,
            module="^out$",
            beside=Beside("query", (0, 1, 2), (0, 2, 3)),
        ),
        Convention(
            "kernel",
            (3,),
            stack=(1,),
            ndim=4,
            module="^out$",
            beside=Beside("query", (1, 0, 2), (1, 2, 3)),
        ),
    ),
    # Dense, Linear, DenseGeneral to one axis; ConvLocal; Conv (grouped and depthwise too).
    (Convention("kernel", (-1,), ndim=2),),
    (
        Convention("kernel", (-1,), reduction=(-2,), module=_DENSE, with_bias=True),
        Convention("kernel", (-1,), stack=(1,), module=_DENSE, with_bias=True),
    ),
    (Convention("kernel", (-1,), reduction=(-2,), module=r"^ConvLocal(_\d+)?$"),),
    (
        Convention("kernel", (-1,), module=_TRANSPOSED, with_bias=True),
        Convention("kernel", (-2,), module=_TRANSPOSED, with_bias=True),
    ),
    (Convention("kernel", (-1,), ndim=3, module=_CONV),),
    (Convention("kernel", (-1,), ndim=4, module=_CONV),),
    (Convention("kernel", (-1,), with_bias=True),),
    # DenseGeneral to two axes; stacks; ConvTranspose with a transposed kernel.
    (
        Convention("kernel", (-2, -1), with_bias=True),
        Convention("kernel", (-1,), stack=(0,), with_bias=True),
        Convention("kernel", (-1,), stack=(0, 1), with_bias=True),
        Convention("kernel", (-1,), stack=(1,), with_bias=True),
        *(Convention("kernel", (-2,), ndim=ndim, with_bias=True) for ndim in (3, 4, 5)),
    ),
    # Haiku.
    (Convention("w", (-1,), module=r"lstm(_\d+)?/linear$", gates=4),),
    (Convention("w", (-2,), stack=(0,), module="layer_stack.*conv.*transpose"),),
    (Convention("w", (-1,), stack=(0,), module="layer_stack"),),
    (
        Convention(
            "w", (-2,), module=r"^conv[123]_d_transpose(_\d+)?$|/conv[123]_d_transpose(_\d+)?$"
        ),
    ),
    (
        Convention("w", (-1,), module=_TRANSPOSED, with_bias=True),
        Convention("w", (-2,), module=_TRANSPOSED, with_bias=True),
    ),
    (Convention("w", (-1,), reduction=(-2,), module=r"linear(_\d+)?$"),),
    (Convention("w", (-1,), ndim=2),),
    (Convention("w", (-1,), module=_CONV),),
    (Convention("w", (-1,), with_bias=True),),
    (Convention("w", (-1,), stack=(0,), with_bias=True),),
    (Convention("w_i", (-1,), reduction=(-2,)),),
    (Convention("w_h", (-1,), reduction=(-2,)),),
    # Equinox, and PyTorch's order in plain trees: nodes first.
    (Convention("weight", None, module="(?i)embed|norm|^w[tp]e$"),),
    (Convention("weight", (-2,), reduction=(-1,), module="^Linear$"),),
    *(
        (
            Convention(
                "weight",
                (-2 - n,),
                reduction=tuple(range(-1 - n, 0)),
                module=rf"^Conv(Transpose)?{n}d$",
            ),
        )
        for n in (1, 2, 3)
    ),
    (Convention("weight", (0,), ndim=2),),
    (Convention("weight", (0,), module="(?i)conv"),),
    (Convention("weight", (0,), with_bias=True),),
    (Convention("weight", (1,), stack=(0,), with_bias=True),),
    (Convention("weight_ih", (-2,), reduction=(-1,)),),
    (Convention("weight_hh", (-2,), reduction=(-1,)),),
)

# The leaves beside a kernel that may be added to its pre-activation, or to its last gate;
# the usual name first. One of the others belongs to a kernel that has no other beside it.
BIASES: dict[str, tuple[str, ...]] = {
    "kernel": ("bias", "b"),
    "w": ("b", "bias"),
    "weight": ("bias", "b"),
    "weight_ih": ("bias",),
    "weight_hh": ("bias_n",),
    "w_i": ("b", "bias"),
    "w_h": ("b", "bias"),
}

# Leaves of rank 1, unless layers are stacked.
VECTORS = frozenset({"b", "bias", "offset", "scale"})


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
