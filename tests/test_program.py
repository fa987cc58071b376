"""What the traced program says about its parameters, against what was written down by hand."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

from grapes_optax import (
    DimensionNumbers,
    infer_dimension_numbers,
    modulate_error,
    scale_by_grapes,
    summary,
)

KEY = jax.random.key(0)


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TOKENS = array(2, 3, dtype=jnp.int32)


class Layer(NamedTuple):
    """Kernels, path to (fan-in, nodes), that are summed; and their biases, path to nodes."""

    kernels: Mapping[str, tuple[Any, Any]]
    biases: Mapping[str, Any] = {}
    gates: int = 1


class Case(NamedTuple):
    """A program, and the layers that it has."""

    make: Callable[[], tuple[Callable, Any, Sequence[Any]]]
    layers: Sequence[Layer]
    options: Mapping[str, Any] = {}
    unsettled: str | None = None  # pattern that the warning matches


def one(kernel="kernel", fan_in=0, nodes=1, bias: str | None = "bias", along=0, gates=1):
    return Layer({kernel: (fan_in, nodes)}, {bias: along} if bias else {}, gates)


def below(branch: str, *layers: Layer):
    """The same layers at paths in a branch."""
    return [
        Layer(
            {f"{branch}/{path}": axes for path, axes in layer.kernels.items()},
            {f"{branch}/{path}": axes for path, axes in layer.biases.items()},
            layer.gates,
        )
        for layer in layers
    ]


def as_tuple(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


def by_leaf(description):
    leaves = jax.tree_util.tree_leaves_with_path(
        description, is_leaf=lambda x: x is None or isinstance(x, DimensionNumbers)
    )
    paths = (
        keys[:-1] if keys and keys[-1] == jax.tree_util.GetAttrKey("value") else keys
        for keys, _ in leaves
    )
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return {name: value for name, (_, value) in zip(names, leaves, strict=True) if value}


def assert_layers(description, layers):
    found = by_leaf(description)
    expected = {}
    for layer in layers:
        # The label is the path of the kernel that is first in the tree.
        group = next((path or "(root)" for path in found if path in layer.kernels), None)
        for path, (fan_in, nodes) in layer.kernels.items():
            numbers = as_tuple(fan_in), as_tuple(nodes)
            expected[path] = DimensionNumbers(*numbers, group, layer.gates)
        for path, nodes in layer.biases.items():
            expected[path] = DimensionNumbers((), as_tuple(nodes), group)
    assert found == expected


def inferred(case: Case):
    apply_fn, params, inputs = case.make()
    if case.unsettled is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return infer_dimension_numbers(apply_fn, params, *inputs, **case.options)
    with pytest.warns(UserWarning, match=case.unsettled) as record:
        description = infer_dimension_numbers(apply_fn, params, *inputs, **case.options)
    assert len(record) == 1
    return description


# Programs of each framework, without computing anything.


def linen(module, *inputs):
    """Of the parameters and, as the first input, the other collections."""

    def make():
        variables = dict(jax.eval_shape(module.init, KEY, *inputs))
        params = variables.pop("params")

        def apply(params, rest, *inputs):
            return module.apply({"params": params, **rest}, *inputs, mutable=list(rest))

        return apply, params, (variables, *inputs)

    return make


def flax_nnx(build, *inputs, call=lambda module, *inputs: module(*inputs)):
    def make():
        graph, params, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)

        def apply(params, rest, *inputs):
            return call(nnx.merge(graph, params, rest), *inputs)

        return apply, params, (rest, *inputs)

    return make


def haiku(function, *inputs):
    def make():
        network = hk.transform(function)
        params = jax.eval_shape(network.init, KEY, *inputs)
        return lambda params, *inputs: network.apply(params, None, *inputs), params, inputs

    return make


def equinox(build, *inputs, call=lambda module, *inputs: module(*inputs)):
    def make():
        module = eqx.filter_eval_shape(build, KEY)
        params, rest = eqx.partition(module, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        return lambda params, *x: call(eqx.combine(params, rest), *x), params, inputs

    return make


def plain(function, params, *inputs):
    return lambda: (function, params, inputs)


# Rows of the first table: single layers.

X, IMAGE = array(2, 3, 5), array(2, 8, 8, 4)


def spectral(closed):
    module = nn.SpectralNorm(nn.Dense(7))

    def make():
        variables = module.init(KEY, jnp.ones((1, 5)), update_stats=False)
        stats = {"batch_stats": variables["batch_stats"]}

        def apply(params, x, stats=stats):
            return module.apply({"params": params, **stats}, x, update_stats=False)

        return apply, variables["params"], (X,) if closed else (X, stats)

    return make


LINEAR = {
    "linen Dense": Case(linen(nn.Dense(7), X), [one()]),
    "nnx Linear": Case(flax_nnx(lambda rngs: nnx.Linear(5, 7, rngs=rngs), X), [one()]),
    "haiku Linear": Case(haiku(lambda x: hk.Linear(7)(x), X), below("linear", one("w", bias="b"))),
    "equinox Linear": Case(
        equinox(lambda key: eqx.nn.Linear(5, 7, key=key), array(5)), [one("weight", 1, 0)]
    ),
    "linen Dense without bias": Case(linen(nn.Dense(7, use_bias=False), X), [one(bias=None)]),
    "linen Dense of one node": Case(linen(nn.Dense(1), X), [one()]),
    "linen Dense of one input": Case(linen(nn.Dense(7), array(2, 1)), [one()]),
    "linen Dense in bfloat16": Case(linen(nn.Dense(7, dtype=jnp.bfloat16), X), [one()]),
    "linen DenseGeneral to two axes": Case(
        linen(nn.DenseGeneral((3, 4)), X), [one(nodes=(1, 2), along=(0, 1))]
    ),
    "linen DenseGeneral of two axes": Case(
        linen(nn.DenseGeneral(5, axis=(-2, -1)), array(2, 3, 4)), [one(fan_in=(0, 1), nodes=2)]
    ),
    "linen DenseGeneral batch_dims": Case(
        linen(nn.DenseGeneral(7, batch_dims=0), array(2, 3, 5)), [one(fan_in=1, nodes=2, along=1)]
    ),
    "nnx LinearGeneral to two axes": Case(
        flax_nnx(lambda rngs: nnx.LinearGeneral(5, (3, 4), rngs=rngs), X),
        [one(nodes=(1, 2), along=(0, 1))],
    ),
    "nnx LinearGeneral of two axes": Case(
        flax_nnx(
            lambda rngs: nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=rngs), array(2, 3, 4)
        ),
        [one(fan_in=(0, 1), nodes=2)],
    ),
    "linen Einsum": Case(
        linen(nn.Einsum((5, 3, 4), "bti,ihd->bthd"), X), [one(nodes=(1, 2), along=(0, 1))]
    ),
    "nnx Einsum": Case(
        flax_nnx(lambda rngs: nnx.Einsum("bti,ihd->bthd", (5, 3, 4), (3, 4), rngs=rngs), X),
        [one(nodes=(1, 2), along=(0, 1))],
    ),
    "linen Embed": Case(linen(nn.Embed(11, 4), TOKENS), []),
    "nnx Embed": Case(flax_nnx(lambda rngs: nnx.Embed(11, 4, rngs=rngs), TOKENS), []),
    "haiku Embed": Case(haiku(lambda x: hk.Embed(11, 4)(x), TOKENS), []),
    "equinox Embedding": Case(
        equinox(lambda key: eqx.nn.Embedding(11, 4, key=key), array(dtype=jnp.int32)), []
    ),
    "linen Partitioned": Case(
        linen(nn.Dense(7, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x"))), X),
        [one()],
    ),
    "nnx LoRALinear": Case(
        flax_nnx(lambda rngs: nnx.LoRALinear(5, 7, lora_rank=2, rngs=rngs), X),
        [one()],
        {"where": lambda path: "lora" not in path},
    ),
    # To the program these are kernels: one sums its product to that of the kernel.
    "nnx LoRALinear, whole": Case(
        flax_nnx(lambda rngs: nnx.LoRALinear(5, 7, lora_rank=2, rngs=rngs), X),
        [
            Layer({"kernel": (0, 1), "lora/lora_b": (0, 1)}, {"bias": 0}),
            one("lora/lora_a", bias=None),
        ],
    ),
    "linen WeightNorm": Case(linen(nn.WeightNorm(nn.Dense(7)), X), below("layer_instance", one())),
    # What the norm itself multiplies by is a constant here, and no input.
    "linen SpectralNorm": Case(spectral(closed=True), below("layer_instance", one())),
    "linen SpectralNorm of the input": Case(
        spectral(closed=False), [], unsettled=r"layer_instance/kernel \(5, 7\): used in two ways"
    ),
    "equinox WeightNorm": Case(
        equinox(lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(5, 7, key=key)), array(5)),
        below("layer", one("weight", 1, 0)),
    ),
}

ATTENTION = [
    *(
        layer
        for name in ("query", "key", "value")
        for layer in below(name, one(nodes=(1, 2), along=(0, 1)))
    ),
    *below("out", one(fan_in=(0, 1), nodes=2)),
]
ATTENTIONS = {
    "linen": Case(
        linen(nn.MultiHeadDotProductAttention(3, qkv_features=12, out_features=5), X), ATTENTION
    ),
    "linen with normalised queries and keys": Case(
        linen(nn.MultiHeadDotProductAttention(3, qkv_features=12, normalize_qk=True), X), ATTENTION
    ),
    "nnx": Case(
        flax_nnx(lambda rngs: nnx.MultiHeadAttention(3, 5, 12, rngs=rngs, decode=False), X),
        ATTENTION,
    ),
    "haiku": Case(
        haiku(
            lambda x: hk.MultiHeadAttention(2, 4, w_init=hk.initializers.Constant(1))(x, x, x), X
        ),
        [
            layer
            for name in ("query", "key", "value", "linear")
            for layer in below(f"multi_head_attention/{name}", one("w", bias="b"))
        ],
    ),
    "equinox": Case(
        equinox(
            lambda key: eqx.nn.MultiheadAttention(2, 8, key=key),
            array(3, 8),
            call=lambda module, x: module(x, x, x),
        ),
        [one(f"{name}_proj/weight", 1, 0, None) for name in ("query", "key", "value", "output")],
    ),
}

CONV = one(fan_in=(0, 1, 2), nodes=3)
EQUINOX_CONV = one("weight", (1, 2, 3), 0, along=(0, 1, 2))
CONVOLUTIONS = {
    "linen Conv": Case(linen(nn.Conv(8, (3, 3)), IMAGE), [CONV]),
    "linen Conv 1-D": Case(linen(nn.Conv(8, (3,)), X), [one(fan_in=(0, 1), nodes=2)]),
    "linen Conv grouped": Case(linen(nn.Conv(8, (3, 3), feature_group_count=2), IMAGE), [CONV]),
    "linen Conv depthwise": Case(linen(nn.Conv(8, (3, 3), feature_group_count=4), IMAGE), [CONV]),
    "linen Conv circular": Case(linen(nn.Conv(8, (3, 3), padding="CIRCULAR"), IMAGE), [CONV]),
    "linen Conv of one feature": Case(linen(nn.Conv(1, (3, 3)), array(1, 8, 8, 1)), [CONV]),
    "nnx Conv": Case(flax_nnx(lambda rngs: nnx.Conv(4, 8, (3, 3), rngs=rngs), IMAGE), [CONV]),
    "haiku Conv2D": Case(
        haiku(lambda x: hk.Conv2D(8, 3)(x), IMAGE),
        below("conv2_d", one("w", (0, 1, 2), 3, "b")),
    ),
    "haiku DepthwiseConv2D": Case(
        haiku(lambda x: hk.DepthwiseConv2D(2, 3)(x), IMAGE),
        below("depthwise_conv2_d", one("w", (0, 1, 2), 3, "b")),
    ),
    "linen ConvLocal": Case(
        linen(nn.ConvLocal(6, (3,)), array(2, 8, 5)), [one(fan_in=1, nodes=2, along=1)]
    ),
    "linen ConvLocal 2-D": Case(
        linen(nn.ConvLocal(6, (3, 3)), IMAGE), [one(fan_in=2, nodes=3, along=2)]
    ),
    "linen ConvTranspose": Case(linen(nn.ConvTranspose(6, (2, 2)), IMAGE), [CONV]),
    "linen ConvTranspose transpose_kernel": Case(
        linen(nn.ConvTranspose(6, (2, 2), transpose_kernel=True), IMAGE),
        [one(fan_in=(0, 1, 3), nodes=2)],
    ),
    "nnx ConvTranspose": Case(
        flax_nnx(lambda rngs: nnx.ConvTranspose(4, 6, (2, 2), rngs=rngs), IMAGE), [CONV]
    ),
    "haiku Conv2DTranspose": Case(
        haiku(lambda x: hk.Conv2DTranspose(6, 3)(x), IMAGE),
        below("conv2_d_transpose", one("w", (0, 1, 3), 2, "b")),
    ),
    "equinox Conv2d": Case(
        equinox(lambda key: eqx.nn.Conv2d(4, 6, 3, key=key), array(4, 8, 8)), [EQUINOX_CONV]
    ),
    "equinox Conv2d grouped": Case(
        equinox(lambda key: eqx.nn.Conv2d(4, 6, 3, groups=2, key=key), array(4, 8, 8)),
        [EQUINOX_CONV],
    ),
    "equinox Conv2d batched": Case(
        equinox(
            lambda key: eqx.nn.Conv2d(4, 6, 3, key=key),
            array(2, 4, 8, 8),
            call=lambda module, x: jax.vmap(module)(x),
        ),
        [EQUINOX_CONV],
    ),
    "equinox ConvTranspose2d": Case(
        equinox(lambda key: eqx.nn.ConvTranspose2d(4, 6, 3, key=key), array(4, 8, 8)),
        [EQUINOX_CONV],
    ),
}


class Norms(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train)(nn.Conv(8, (3, 3))(x))
        x = nn.GroupNorm(2)(nn.Conv(8, (3, 3))(nn.relu(x)))
        return nn.RMSNorm()(nn.LayerNorm()(nn.relu(nn.Dense(6)(x))))


NORMS = {
    f"linen, train={train}": Case(
        linen(Norms(train), IMAGE),
        [*below("Conv_0", CONV), *below("Conv_1", CONV), *below("Dense_0", one())],
    )
    for train in (True, False)
} | {
    "haiku": Case(
        haiku(lambda x: hk.LayerNorm(-1, True, True)(hk.Linear(4)(x)), X),
        below("linear", one("w", bias="b")),
    ),
    "equinox, over two axes": Case(
        equinox(
            lambda key: [eqx.nn.LayerNorm((3, 5)), eqx.nn.Linear(5, 7, key=key)],
            array(3, 5),
            call=lambda layers, x: jax.vmap(layers[1])(layers[0](x)),
        ),
        [one("1/weight", 1, 0, "1/bias")],
    ),
}

# Stacks of layers in one array.


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(5)(jnp.tanh(nn.Dense(7)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Residual), length=3, **options)(name="scan")(x)[0]


class Mapped(nn.Module):
    layer: nn.Module
    in_axes: int | None = 0

    @nn.compact
    def __call__(self, x):
        mapped = nn.vmap(
            lambda layer, x: layer(x),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=self.in_axes,
            axis_size=3,
        )
        return mapped(self.layer, x)


STACKED = one(fan_in=1, nodes=2, along=1)
STACKED_CONV = one(fan_in=(1, 2, 3), nodes=4, along=1)
ENSEMBLE = one(fan_in=1, nodes=(0, 2), along=(0, 1))


def looped(params, x):
    for i in range(3):
        x = jnp.tanh(x @ params["kernel"][i] + params["bias"][i])
    return x


def fori(params, x):
    def step(i, x):
        return jnp.tanh(x @ params["kernel"][i] + params["bias"][i])

    return lax.fori_loop(0, 3, step, x)


def experts(params, x, which):
    def expert(x, i):
        return jnp.tanh(x @ params["kernel"][i] + params["bias"][i])

    return jax.vmap(expert)(x, which)


def stacked_inside(params, x):
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def step(x, layer):
        return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

    return lax.scan(step, x, layers)[0]


def grouped(params, x):
    options = {"feature_group_count": 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", **options)
    return y + params["bias"]


SQUARE = {"kernel": array(3, 5, 5), "bias": array(3, 5)}
GROUPED = {"kernel": array(3, 3, 3, 2, 6), "bias": array(3, 6)}
STACKS = {
    "nn.scan axis 0": Case(
        linen(Scanned(0), X), below("scan/Dense_0", STACKED) + below("scan/Dense_1", STACKED)
    ),
    "nn.scan axis 1": Case(
        linen(Scanned(1), X),
        below("scan/Dense_0", one(fan_in=0, nodes=2)) + below("scan/Dense_1", one(nodes=2)),
    ),
    "nn.vmap": Case(linen(Mapped(nn.Dense(7)), array(3, 2, 5)), below("layer", STACKED)),
    "nn.vmap of a convolution": Case(
        linen(Mapped(nn.Conv(6, (3, 3))), array(3, 2, 8, 8, 4)), below("layer", STACKED_CONV)
    ),
    "nn.vmap of a grouped convolution": Case(
        linen(Mapped(nn.Conv(6, (3, 3), feature_group_count=2)), array(3, 2, 8, 8, 4)),
        below("layer", STACKED_CONV),
    ),
    "nn.vmap of a depthwise convolution": Case(
        linen(Mapped(nn.Conv(8, (3, 3), feature_group_count=4)), array(3, 2, 8, 8, 4)),
        below("layer", STACKED_CONV),
    ),
    "nested vmap of a grouped convolution": Case(
        plain(
            jax.vmap(jax.vmap(grouped)),
            jax.tree.map(lambda leaf: array(7, *leaf.shape), GROUPED),
            array(7, 3, 2, 8, 8, 4),
        ),
        [one(fan_in=(2, 3, 4), nodes=5, along=2)],
    ),
    "ensemble": Case(linen(Mapped(nn.Dense(7), None), array(2, 5)), below("layer", ENSEMBLE)),
    "ensemble with a hint": Case(
        linen(Mapped(nn.Dense(7), None), array(2, 5)), below("layer", STACKED), {"stack": {"": 0}}
    ),
    "ensemble of convolutions with a hint": Case(
        linen(Mapped(nn.Conv(6, (3, 3)), None), IMAGE),
        below("layer", STACKED_CONV),
        {"stack": {"layer": -5, "layer/bias": (0,)}},
    ),
    "ensemble of grouped convolutions with a hint for the kernel": Case(
        plain(jax.vmap(grouped, (0, None)), GROUPED, IMAGE),
        [STACKED_CONV],
        {"stack": {"kernel": 0}},
    ),
    "nnx.vmap": Case(
        flax_nnx(
            lambda rngs: nnx.vmap(lambda rngs: nnx.Linear(5, 7, rngs=rngs))(rngs.split(3)),
            array(3, 2, 5),
            call=lambda module, x: nnx.vmap(lambda module, x: module(x))(module, x),
        ),
        [STACKED],
    ),
    "filter_vmap": Case(
        equinox(
            lambda key: eqx.filter_vmap(lambda key: eqx.nn.Linear(5, 7, key=key))(
                jax.random.split(key, 3)
            ),
            array(3, 5),
            call=lambda module, x: eqx.filter_vmap(lambda module, x: module(x))(module, x),
        ),
        [one("weight", 2, 1, along=1)],
    ),
    "layer_stack": Case(
        haiku(lambda x: hk.experimental.layer_stack(3)(lambda x: jnp.tanh(hk.Linear(5)(x)))(x), X),
        below("__layer_stack_no_per_layer/linear", one("w", 1, 2, "b", 1)),
    ),
    "indexed in a Python loop": Case(plain(looped, SQUARE, array(2, 5)), [STACKED]),
    "indexed in fori_loop": Case(plain(fori, SQUARE, array(2, 5)), [STACKED]),
    "experts chosen by the input": Case(
        plain(experts, SQUARE, array(2, 5), array(2, dtype=jnp.int32)), [STACKED]
    ),
    "put together in the program": Case(
        plain(stacked_inside, [{"kernel": array(5, 5), "bias": array(5)}] * 3, array(2, 5)),
        [layer for i in range(3) for layer in below(str(i), one())],
    ),
}

# Rows of the second table: recurrent cells, inputs 5 and hidden 7.


def pair(i, h, bias_i=True, bias_h=True, gates=1, fan_in=0, nodes=1):
    biases = {f"{name}/bias": 0 for name, there in ((i, bias_i), (h, bias_h)) if there}
    kernels = {f"{name}/kernel": (fan_in, nodes) for name in (i, h)}
    return Layer(kernels, biases, gates)


LSTM = [pair("ii", "hi", False), pair("if", "hf", False), pair("ig", "hg", False)]
LSTM += [pair("io", "ho", False)]
LINEN_CELLS = {
    "SimpleCell": (nn.SimpleCell(7), [pair("i", "h", True, False)]),
    "LSTMCell": (nn.LSTMCell(7), LSTM),
    "OptimizedLSTMCell": (nn.OptimizedLSTMCell(7), LSTM),
    "GRUCell": (
        nn.GRUCell(7),
        [pair("ir", "hr", True, False), pair("iz", "hz", True, False), pair("in", "hn")],
    ),
    "MGUCell": (nn.MGUCell(7), [pair("if", "hf", True, False), pair("in", "hn")]),
    "ConvLSTMCell": (
        nn.ConvLSTMCell(7, (3, 3)),
        [pair("ih", "hh", gates=4, fan_in=(0, 1, 2), nodes=3)],
    ),
}
NNX_CELLS = {
    "SimpleCell": [pair("dense_i", "dense_h", True, False)],
    "LSTMCell": [
        Layer(
            {f"i{g}_/kernel" if g == "f" else f"i{g}/kernel": (0, 1), f"h{g}/kernel": (0, 1)},
            {f"h{g}/bias": 0},
        )
        for g in "ifgo"
    ],
    "OptimizedLSTMCell": [pair("dense_i", "dense_h", False, gates=4)],
    "GRUCell": [pair("dense_i", "dense_h", True, False, gates=3)],
}
SEQUENCE = array(2, 3, 5)


def cell_call(cell, x):
    carry = cell.initialize_carry(x.shape[:1] + x.shape[2:], nnx.Rngs(0))
    return cell(carry, x[:, 0])


def haiku_cell(make):
    def function(x):
        core = make()
        return hk.dynamic_unroll(core, jnp.swapaxes(x, 0, 1), core.initial_state(2))[0]

    return haiku(function, SEQUENCE)


RECURRENT = {
    **{
        f"linen {name}": Case(
            linen(nn.RNN(cell), array(2, 3, 8, 8, 5) if "Conv" in name else SEQUENCE),
            below("cell", *layers),
        )
        for name, (cell, layers) in LINEN_CELLS.items()
    },
    **{
        f"nnx {name}": Case(
            flax_nnx(
                functools.partial(
                    lambda name, rngs: nnx.RNN(getattr(nnx, name)(5, 7, rngs=rngs)), name
                ),
                SEQUENCE,
            ),
            below("cell", *layers),
        )
        for name, layers in NNX_CELLS.items()
    },
    "equinox LSTMCell": Case(
        equinox(lambda key: eqx.nn.LSTMCell(5, 7, key=key), array(5), (array(7), array(7))),
        [Layer({"weight_ih": (1, 0), "weight_hh": (1, 0)}, {"bias": 0}, 4)],
    ),
    "equinox GRUCell": Case(
        equinox(lambda key: eqx.nn.GRUCell(5, 7, key=key), array(5), array(7)),
        [Layer({"weight_ih": (1, 0), "weight_hh": (1, 0)}, {"bias": 0, "bias_n": 0}, 3)],
    ),
    "haiku LSTM": Case(haiku_cell(lambda: hk.LSTM(7)), below("lstm/linear", one("w", bias="b"))),
    "haiku LSTM with a hint": Case(
        haiku_cell(lambda: hk.LSTM(7)),
        below("lstm/linear", one("w", bias="b", gates=4)),
        {"gates": {"lstm/linear/w": 4}},
    ),
    "haiku GRU": Case(
        haiku_cell(lambda: hk.GRU(7)),
        below("gru", Layer({"w_i": (0, 1), "w_h": (0, 1)}, {"b": 0}, 3)),
    ),
    "haiku VanillaRNN": Case(
        haiku_cell(lambda: hk.VanillaRNN(7)),
        below(
            "vanilla_rnn",
            Layer({"linear/w": (0, 1), "linear_1/w": (0, 1)}, {"linear/b": 0, "linear_1/b": 0}),
        ),
    ),
    "haiku Conv1DLSTM": Case(
        haiku(
            lambda x: (core := hk.Conv1DLSTM((8,), 4, 3))(x, core.initial_state(2))[0],
            array(2, 8, 5),
        ),
        below(
            "conv1_dlstm",
            Layer(
                {"input_to_hidden/w": ((0, 1), 2), "hidden_to_hidden/w": ((0, 1), 2)},
                {"input_to_hidden/b": 0, "hidden_to_hidden/b": 0},
                4,
            ),
        ),
    ),
}

# Cells written in plain JAX.


def sum_of(p, x, h):
    return x @ p["w"] + h @ p["u"] + p["b"]


def split_after(p, x, h):
    i, f, g, o = jnp.split(sum_of(p, x, h), 4, -1)
    return jax.nn.sigmoid(i) * jnp.tanh(g) + jax.nn.sigmoid(f) * jnp.tanh(o)


def split_before(p, x, h):
    parts = zip(jnp.split(x @ p["w"] + p["b"], 4, -1), jnp.split(h @ p["u"], 4, -1), strict=True)
    i, f, g, o = (a + b for a, b in parts)
    return i * g + f * o


def sliced(p, x, h):
    z = sum_of(p, x, h)
    return z[:, :7] * z[:, 7:14] + z[:, 14:21] * z[:, 21:]


def sliced_dynamically(p, x, h):
    z = sum_of(p, x, h)
    return sum(jnp.tanh(lax.dynamic_slice_in_dim(z, 7 * i, 7, 1)) for i in range(4))


def reshaped(p, x, h):
    i, f, g, o = jnp.unstack(sum_of(p, x, h).reshape(-1, 4, 7), axis=1)
    return i * g + f * o


def reshaped_before(p, x, h):
    z = (x @ p["w"]).reshape(-1, 4, 7) + (h @ p["u"]).reshape(-1, 4, 7) + p["b"].reshape(4, 7)
    return z[:, 0] * z[:, 1] + z[:, 2] * z[:, 3]


def gates_have_an_axis(p, x, h):
    z = jnp.einsum("bi,ign->bgn", x, p["w"]) + jnp.einsum("bi,ign->bgn", h, p["u"]) + p["b"]
    return z[:, 0] * z[:, 1] + z[:, 2] * z[:, 3]


def crossed(p, x, h):
    (a, b), (c, d) = jnp.split(x @ p["w"], 2, -1), jnp.split(h @ p["u"], 2, -1)
    return jnp.tanh(a + d) * jnp.tanh(b + c)


def interleaved(p, x, h):
    z = sum_of(p, x, h).reshape(-1, 7, 4)
    return z[..., 0] * z[..., 1] + z[..., 2] * z[..., 3]


def uneven(p, x, h):
    a, b = jnp.split(sum_of(p, x, h), [10], -1)
    return jnp.tanh(a).sum() + jnp.tanh(b).sum()


def gated_candidate(p, x, h):
    return jnp.tanh(x @ p["w"] + p["b"] + jax.nn.sigmoid(h) * (h @ p["u"]))


def dropped_out(p, x, h, key):
    keep = jax.random.bernoulli(key, 0.9, h.shape)
    return jnp.tanh(x @ p["w"] + p["b"] + jnp.where(keep, (h @ p["u"]) / 0.9, 0.0))


def scanned(p, xs):
    h = jnp.zeros((2, 7))
    return lax.scan(lambda h, x: ((h := jnp.tanh(sum_of(p, x, h))), h), h, xs)[1]


def projected_outside(p, xs):
    def step(h, z):
        h = jnp.tanh(z + h @ p["u"] + p["b"])
        return h, h

    return lax.scan(step, jnp.zeros((2, 7)), xs @ p["w"])[1]


def unrolled(p, xs):
    z, h = xs @ p["w"] + p["b"], jnp.zeros((2, 7))
    for t in range(3):
        h = jnp.tanh(z[t] + h @ p["u"])
    return h


def with_context(p, xs, context):
    """The context is projected once, and added in every step."""
    z = context @ p["w"]

    def step(h, x):
        return jnp.tanh(z + h @ p["u"] + p["b"] + x), None

    return lax.scan(step, jnp.zeros((2, 7)), xs)[0]


def learned_decay(p, xs):
    def step(s, x):
        s = jax.nn.relu(x @ p["w"] + p["decay"] * s)
        return s, s

    return lax.scan(step, jnp.zeros((2, 7)), xs)[1]


def spiking(p, xs):
    def step(carry, x):
        s, y = carry
        s = jax.nn.relu(x @ p["w"] + y @ p["u"] + 0.8 * s * (1 - y))
        y = jax.nn.sigmoid(s + p["b"])
        return (s, y), y

    return lax.scan(step, (jnp.zeros((2, 7)),) * 2, xs)[1]


def weights_carried(p, x):
    def step(i, carry):
        p, h = carry
        return p, jnp.tanh(sum_of(p, x, h))

    return lax.fori_loop(0, 3, step, (p, jnp.zeros((2, 7))))[1]


def weights_carried_through_remat(p, x):
    def step(carry, _):
        return jax.checkpoint(lambda p, h: (p, jnp.tanh(sum_of(p, x, h))))(*carry), None

    return lax.scan(step, (p, jnp.zeros((2, 7))), None, length=3)[0][1]


def fixed_point(p, x):
    z = x @ p["w"] + p["b"]

    def step(carry):
        p, h, _ = carry
        new = jnp.tanh(h @ p["u"] + z)
        return p, new, jnp.abs(new - h).max()

    carry = p, jnp.zeros((2, 7)), jnp.inf
    return lax.while_loop(lambda carry: carry[2] > 1e-3, step, carry)[1]


def gates_put_together(p, x, h):
    z = x @ jnp.concatenate([p["w1"], p["w2"]], 1) + h @ jnp.concatenate([p["u1"], p["u2"]], 1)
    first, last = jnp.split(z, 2, 1)
    return jnp.tanh(first) * jnp.tanh(last + p["b"])


def concatenated(p, x, h):
    return jnp.concatenate([x, h], -1) @ jnp.concatenate([p["w"], p["u"]]) + p["b"]


def mixed_context(p, query, keys):
    scores = jnp.tanh((query @ p["w"])[:, None] + keys @ p["u"] + p["b"])
    return jnp.einsum("bt,btk->bk", jax.nn.softmax(scores.sum(-1)), keys)


CELL = {"b": array(7), "u": array(7, 7), "w": array(5, 7)}
FUSED = {"b": array(28), "u": array(7, 28), "w": array(5, 28)}
AXIS = {"b": array(4, 7), "u": array(7, 4, 7), "w": array(5, 4, 7)}
STEP, STEPS = (array(2, 5), array(2, 7)), array(3, 2, 5)
SUM = Layer({"w": (0, 1), "u": (0, 1)}, {"b": 0})
GATES = SUM._replace(gates=4)
UNEVEN = r"u \(7, 28\): its nodes are cut, but not into equal gates; w \(5, 28\): its"
CELLS = {
    "sum": Case(plain(sum_of, CELL, *STEP), [SUM]),
    "split after the sum": Case(plain(split_after, FUSED, *STEP), [GATES]),
    "split before the sum": Case(plain(split_before, FUSED, *STEP), [GATES]),
    "sliced": Case(plain(sliced, FUSED, *STEP), [GATES]),
    "reshaped": Case(plain(reshaped, FUSED, *STEP), [GATES]),
    "reshaped before the sum": Case(plain(reshaped_before, FUSED, *STEP), [GATES]),
    # The axis of the gates is the last in the order of the nodes.
    "an axis of gates": Case(
        plain(gates_have_an_axis, AXIS, *STEP),
        [Layer({"w": (0, (2, 1)), "u": (0, (2, 1))}, {"b": (1, 0)}, 4)],
    ),
    "gates that are not one after the other": Case(
        plain(interleaved, FUSED, *STEP), [], unsettled=UNEVEN
    ),
    "gates of different sizes": Case(plain(uneven, FUSED, *STEP), [], unsettled=UNEVEN),
    "gates in another order": Case(
        plain(crossed, {"w": array(5, 14), "u": array(7, 14)}, *STEP),
        [],
        unsettled="u .*: summed with other nodes of another kernel; w",
    ),
    "gates at places that are computed": Case(
        plain(sliced_dynamically, FUSED, *STEP), [], unsettled=UNEVEN
    ),
    "a hint wins": Case(plain(split_after, FUSED, *STEP), [SUM], {"gates": {"": 1}}),
    "a hint settles": Case(plain(interleaved, FUSED, *STEP), [SUM], {"gates": {"w": 1}}),
    "gated candidate": Case(plain(gated_candidate, CELL, *STEP), [SUM]),
    "dropout of one summand": Case(plain(dropped_out, CELL, *STEP, KEY), [SUM]),
    "scan": Case(plain(scanned, CELL, STEPS), [SUM]),
    "input projected outside": Case(plain(projected_outside, CELL, STEPS), [SUM]),
    "unrolled": Case(plain(unrolled, CELL, STEPS), [SUM]),
    "context projected outside": Case(
        plain(with_context, CELL, array(3, 2, 7), array(2, 5)), [SUM]
    ),
    "spiking neural unit": Case(plain(spiking, CELL, STEPS), [SUM._replace(biases={})]),
    "a learned decay": Case(
        plain(learned_decay, {"w": array(5, 7), "decay": array(7)}, STEPS), [one("w", bias=None)]
    ),
    "weights in the carry": Case(plain(weights_carried, CELL, array(2, 5)), [SUM]),
    "weights in the carry, through remat": Case(
        plain(weights_carried_through_remat, CELL, array(2, 5)), [SUM]
    ),
    "weights in the carry of while_loop": Case(plain(fixed_point, CELL, array(2, 5)), [SUM]),
    "kernels put together along the fan-in": Case(plain(concatenated, CELL, *STEP), [SUM]),
    "kernels put together along the nodes": Case(
        plain(
            gates_put_together,
            {
                "w1": array(5, 7),
                "w2": array(5, 7),
                "u1": array(7, 7),
                "u2": array(7, 7),
                "b": array(7),
            },
            *STEP,
        ),
        [Layer({"w1": (0, 1), "u1": (0, 1)}), Layer({"w2": (0, 1), "u2": (0, 1)}, {"b": 0})],
    ),
    "sum that broadcasts": Case(plain(mixed_context, CELL, array(2, 5), array(2, 4, 7)), [SUM]),
}

# Whole models.


class ResNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for features in 8, 16:
            y = nn.relu(norm()(nn.Conv(features, (3, 3))(x)))
            y = norm()(nn.Conv(features, (3, 3))(y))
            if x.shape != y.shape:
                x = nn.Conv(features, (1, 1), name="projection")(x)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


RESNET = [
    *below("Conv_0", CONV._replace(biases={})),
    *(layer for i in (1, 2, 3, 4) for layer in below(f"Conv_{i}", CONV)),
    *below("projection", CONV),
    *below("Dense_0", one()),
]


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1, deterministic=True)(nn.Dense(8, name="down")(y)), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens) + self.param("positions", nn.initializers.ones, (1, 3, 8))
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(nn.remat(Encoder), length=3, **options)(name="layers")(x, None)
        return nn.Dense(11)(nn.LayerNorm()(x))


def stacked(*layers: Layer):
    """The same layers, with a stack on the first axis."""

    def shifted(axes):
        return tuple(axis + 1 for axis in as_tuple(axes))

    return [
        Layer(
            {path: (shifted(i), shifted(j)) for path, (i, j) in layer.kernels.items()},
            {path: shifted(axes) for path, axes in layer.biases.items()},
        )
        for layer in layers
    ]


class Parallel(nn.Module):
    """The blocks of PaLM: attention and MLP side by side."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            y = nn.LayerNorm()(x)
            up = nn.gelu(nn.Dense(16, name=f"up{i}")(y))
            attention = nn.MultiHeadDotProductAttention(2, name=f"attention{i}")(y)
            x = x + attention + nn.Dense(8, name=f"down{i}")(up)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x))


class Bidirectional(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward, backward = (nn.RNN(nn.LSTMCell(7, name=name)) for name in ("left", "right"))
        return nn.Dense(2)(nn.Bidirectional(forward, backward)(x))


class Separable(nn.Module):
    """ConvNeXt: depthwise, inverted bottleneck, a scale for each channel, residual."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(nn.Conv(4, (7, 7), feature_group_count=4)(x))
        y = nn.Dense(4)(nn.gelu(nn.Dense(16)(y)))
        return x + y * self.param("scale", nn.initializers.ones, (4,))


class Inception(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(8, (1, 1))(x) + nn.Conv(8, (3, 3))(x) + nn.Conv(8, (5, 5))(x))
        return y + nn.Conv(8, (1, 1), name="residual")(x)


def haiku_net(image, tokens):
    x = jax.nn.relu(hk.Conv2D(8, 3, name="conv")(image)).mean((1, 2))
    return hk.nets.MLP([6, 3], name="mlp")(x + hk.Embed(11, 8)(tokens))


def equinox_net(key):
    return {
        "conv": eqx.nn.Conv1d(4, 6, 3, key=key),
        "mlp": eqx.nn.MLP(6, 2, 7, 1, activation=jnp.tanh, key=key),
        "norm": eqx.nn.LayerNorm(6),
    }


def equinox_call(net, x):
    return net["mlp"](net["norm"](jax.nn.relu(net["conv"](x)).mean(-1)))


def mixer(p, x):
    tokens = jnp.swapaxes(x, 1, 2)
    tokens = jax.nn.gelu(tokens @ p["w"] + p["b"]) @ p["v"] + p["c"]
    return x + jnp.swapaxes(tokens, 1, 2)


def graph_net(p, x, senders, receivers):
    messages = jax.nn.relu(x[senders] @ p["edge"][:5] + x[receivers] @ p["edge"][5:] + p["b"])
    return jax.ops.segment_sum(messages, receivers, 4) @ p["out"]


def adaptive_norm(p, x, condition):
    scale, shift = jnp.split(condition @ p["w"] + p["b"], 2, -1)
    return (x - x.mean(-1, keepdims=True)) * (1 + scale) + shift


def siamese(p, x, y):
    left, right = (jnp.tanh(z @ p["w"] + p["b"]) @ p["v"] for z in (x, y))
    return left - right


def chosen_branch(p, x):
    return lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ p["w"] + p["b"]), lambda: x @ p["v"])


def changed_weights(p, x, mask):
    w = (p["w"] - p["w"].mean(0)) / p["w"].std(0) * mask
    v = jnp.exp(p["v"]) + lax.stop_gradient(jnp.sign(p["v"]) - p["v"])
    return jnp.tanh(0.1 * (x @ w) + p["b"]) @ v


def styled(p, x, style):
    """The input scales the kernel, which is then normalised, for each example (StyleGAN2)."""

    def one(x, scale):
        w = p["w"] * scale[:, None]
        w = w * lax.rsqrt(jnp.square(w).sum((0, 1)))
        return lax.conv_general_dilated(
            x[None], w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )[0]

    return jax.vmap(one)(x, style @ p["a"] + p["c"]) + p["b"]


def perceiver(p, x):
    q = jnp.broadcast_to(p["latents"], (2, 3, 5)) @ p["q"]
    scores = jnp.einsum("bnd,btd->bnt", q, x @ p["k"])
    return jax.nn.softmax(scores) @ x


def sum_of_embeddings(p, xs, tokens):
    def step(h, inputs):
        x, token = inputs
        return jnp.tanh(x @ p["w"] + p["embedding"][token] + h @ p["u"]), None

    return lax.scan(step, jnp.zeros(7), (xs, tokens))[0]


def injected(p, x):
    """The same kernel reads the input for all layers of a stack."""

    def step(h, layer):
        return jnp.tanh(h @ layer["w"] + x @ p["v"] + layer["b"]), None

    return lax.scan(step, x, p["layers"])[0]


def positions_in_a_scan(p, xs):
    return lax.scan(lambda _, row: (None, row[0] @ p["w"] + row[1]), None, (xs, p["positions"]))[1]


MODELS = {
    **{
        f"ResNet, train={train}": Case(linen(ResNet(train), IMAGE), RESNET)
        for train in (True, False)
    },
    "Transformer": Case(
        linen(Transformer(), TOKENS),
        [
            *below("layers/attention", *stacked(*ATTENTION)),
            *below("layers/up", STACKED),
            *below("layers/down", STACKED),
            *below("Dense_0", one()),
        ],
    ),
    # Both branches are summed before anything else reads them: one pre-activation.
    "PaLM": Case(
        linen(Parallel(), array(2, 3, 8)),
        [
            *(
                layer
                for i in (0, 1)
                for layer in [
                    *below(f"attention{i}", *ATTENTION[:-1]),
                    *below(f"up{i}", one()),
                    Layer(
                        {
                            f"attention{i}/out/kernel": ((0, 1), 2),
                            f"down{i}/kernel": (0, 1),
                        },
                        {f"attention{i}/out/bias": 0, f"down{i}/bias": 0},
                    ),
                ]
            ),
            *below("head", one()),
        ],
    ),
    "bidirectional LSTM": Case(
        linen(Bidirectional(), SEQUENCE),
        [*below("left", *LSTM), *below("right", *LSTM), *below("Dense_0", one())],
    ),
    "separable": Case(
        linen(Separable(), IMAGE),
        [*below("Conv_0", CONV), *below("Dense_0", one()), *below("Dense_1", one())],
    ),
    "Inception": Case(
        linen(Inception(), IMAGE),
        [
            Layer(
                {f"Conv_{i}/kernel": ((0, 1, 2), 3) for i in range(3)},
                {f"Conv_{i}/bias": 0 for i in range(3)},
            ),
            *below("residual", CONV),
        ],
    ),
    "haiku": Case(
        haiku(haiku_net, IMAGE, array(2, dtype=jnp.int32)),
        [
            *below("conv", one("w", (0, 1, 2), 3, "b")),
            *below("mlp/~/linear_0", one("w", bias="b")),
            *below("mlp/~/linear_1", one("w", bias="b")),
        ],
    ),
    "equinox": Case(
        equinox(equinox_net, array(4, 8), call=equinox_call),
        [
            *below("conv", one("weight", (1, 2), 0, along=(0, 1))),
            *below("mlp/layers/0", one("weight", 1, 0)),
            *below("mlp/layers/1", one("weight", 1, 0)),
        ],
    ),
    "nnx.scan over layers": Case(
        flax_nnx(
            lambda rngs: nnx.vmap(lambda rngs: nnx.Linear(5, 5, rngs=rngs))(rngs.split(3)),
            X,
            call=lambda layers, x: nnx.scan(
                lambda x, layer: x + jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )(x, layers),
        ),
        [STACKED],
    ),
    "einsum": Case(
        plain(
            lambda p, x: jnp.einsum("bi,hij->bhj", x, p["w"]) + p["b"],
            {"w": array(3, 5, 7), "b": array(3, 7)},
            array(2, 5),
        ),
        [one("w", 1, (0, 2), "b", (0, 1))],
    ),
    "mixer": Case(
        plain(
            mixer,
            {"w": array(3, 7), "b": array(7), "v": array(7, 3), "c": array(3)},
            array(2, 3, 5),
        ),
        [one("w", bias="b"), one("v", bias="c")],
    ),
    "graph": Case(
        plain(
            graph_net,
            {"edge": array(10, 7), "b": array(7), "out": array(7, 3)},
            array(4, 5),
            *[array(6, dtype=jnp.int32)] * 2,
        ),
        [one("edge", bias="b"), one("out", bias=None)],
    ),
    "adaptive norm": Case(
        plain(adaptive_norm, {"w": array(3, 10), "b": array(10)}, array(2, 5), array(2, 3)),
        [one("w", bias="b")],
    ),
    "siamese": Case(
        plain(siamese, {"w": array(5, 7), "b": array(7), "v": array(7, 3)}, *[array(2, 5)] * 2),
        [one("w", bias="b"), one("v", bias=None)],
    ),
    "cond": Case(
        plain(chosen_branch, {"w": array(5, 7), "b": array(7), "v": array(5, 7)}, array(2, 5)),
        [one("w", bias="b"), one("v", bias=None)],
    ),
    "changed weights": Case(
        plain(
            changed_weights,
            {"w": array(5, 7), "b": array(7), "v": array(7, 3)},
            array(2, 5),
            array(5, 7),
        ),
        [one("w", bias="b"), one("v", bias=None)],
    ),
    "style": Case(
        plain(
            styled,
            {"a": array(3, 4), "b": array(6), "c": array(4), "w": array(3, 4, 6)},
            array(2, 8, 4),
            array(2, 3),
        ),
        [one("a", bias="c"), one("w", (0, 1), 2, "b")],
    ),
    "perceiver": Case(
        plain(
            perceiver, {"latents": array(3, 5), "q": array(5, 7), "k": array(5, 7)}, array(2, 4, 5)
        ),
        [one("q", bias=None), one("k", bias=None)],
    ),
    "tokens added to a pre-activation": Case(
        plain(
            sum_of_embeddings,
            {"w": array(5, 7), "u": array(7, 7), "embedding": array(11, 7)},
            array(3, 5),
            array(3, dtype=jnp.int32),
        ),
        [Layer({"w": (0, 1), "u": (0, 1)})],
    ),
    "positions added to a pre-activation": Case(
        plain(positions_in_a_scan, {"w": array(5, 7), "positions": array(3, 7)}, array(3, 2, 5)),
        [one("w", bias=None)],
    ),
    "no input": Case(
        plain(
            lambda p: jnp.tanh(jnp.arange(5.0) @ p["w"] + p["b"]) @ p["v"],
            {"w": array(5, 7), "b": array(7), "v": array(7, 3)},
        ),
        [one("w", bias="b"), one("v", bias=None)],
    ),
    "a value for all nodes": Case(
        plain(
            lambda p, x: (x @ p["value"]) + (x @ p["w"] + p["offset"]) + p["b"],
            {"value": array(5, 1), "w": array(5, 7), "offset": array(), "b": array(7)},
            array(2, 5),
        ),
        [one("value", bias=None), one("w", bias="b")],
    ),
    "rows and columns": Case(
        plain(
            lambda p, x: (x @ p["w"])[:, None] + (x @ p["v"])[:, :, None] + p["b"],
            {"w": array(5, 7), "v": array(5, 3), "b": array(7)},
            array(2, 5),
        ),
        [one("w", bias=None), one("v", bias=None)],
    ),
    "a negative": Case(
        plain(
            lambda p, x: 1 / jnp.maximum(p["b"] - x @ p["w"], 1 / (x @ p["v"])),
            {"w": array(5, 7), "v": array(5, 7), "b": array(7)},
            array(2, 5),
        ),
        [one("w", bias=None), one("v", bias=None)],
    ),
    "slopes of a nonlinearity": Case(
        plain(
            lambda p, x: jnp.minimum(
                jnp.where((z := x @ p["w"]) > 0, z, p["slope"] * z), x @ p["v"] + p["b"]
            ),
            {"w": array(5, 7), "v": array(5, 7), "b": array(7), "slope": array(7)},
            array(2, 5),
        ),
        [one("w", bias=None), one("v", bias="b")],
    ),
    "the larger of two": Case(
        plain(
            lambda p, x: jnp.minimum(x @ p["w"], x @ p["v"]) + p["b"],
            {"w": array(5, 7), "v": array(5, 7), "b": array(7)},
            array(2, 5),
        ),
        [one("w", bias=None), one("v", bias=None)],
    ),
    "a penalty": Case(
        plain(
            lambda p, x: (x @ p["w"], jnp.concatenate([p["w"], p["v"]]).sum(), x @ p["v"]),
            {"w": array(5, 7), "v": array(5, 7)},
            array(2, 5),
        ),
        [one("w", bias=None), one("v", bias=None)],
    ),
    "half of the first axis of nodes": Case(
        plain(
            lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 12)[:, :6] + p["b"],
            {"w": array(5, 3, 4), "b": array(6)},
            array(2, 5),
        ),
        [one("w", 0, (1, 2), None)],
    ),
    "every second node": Case(
        plain(
            lambda p, x: (-(x @ p["w"]) + p["b"])[:, ::2] + p["c"],
            {"w": array(5, 7), "b": array(7), "c": array(4)},
            array(2, 5),
        ),
        [one("w", bias="b")],
    ),
    "injected into a stack": Case(
        plain(
            injected,
            {"layers": {"w": array(3, 5, 5), "b": array(3, 5)}, "v": array(5, 5)},
            array(2, 5),
        ),
        [one("layers/w", 1, 2, "layers/b", 1), one("v", bias=None)],
    ),
    "added after a gate": Case(
        plain(
            lambda p, x: (x @ p["w"]) * jax.nn.sigmoid(x) + p["b"],
            {"w": array(5, 5), "b": array(5)},
            array(2, 5),
        ),
        [one("w", bias=None)],
    ),
    "a scale of two axes": Case(
        plain(
            lambda p, x: (x * p["scale"]) @ p["w"],
            {"w": array(5, 7), "scale": array(3, 5)},
            array(3, 5),
        ),
        [one("w", bias=None)],
    ),
    "LoRA, merged": Case(
        plain(
            lambda p, x: x @ (p["w"] + p["low"] @ p["rank"]) + p["b"],
            {"w": array(5, 7), "b": array(7), "low": array(5, 2), "rank": array(2, 7)},
            array(2, 5),
        ),
        [one("w", bias="b")],
        unsettled=r"low \(5, 2\): multiplied by another parameter; rank",
    ),
    "an empty batch": Case(
        plain(
            lambda p, x: (x @ p["w"]).reshape(0, 7, 1) + p["b"],
            {"w": array(5, 7), "b": array(1)},
            array(0, 5),
        ),
        [one("w", bias=None)],
    ),
    "tables mapped over": Case(
        plain(
            jax.vmap(lambda table, token: table[token]),
            array(3, 11, 4),
            array(3, 2, dtype=jnp.int32),
        ),
        [],
    ),
    "a bare array": Case(plain(lambda w, x: x @ w, array(5, 7), array(2, 5)), [one("", bias=None)]),
}

CASES: dict[str, Case] = {
    f"{name}: {row}": case
    for name, table in {
        "linear": LINEAR,
        "attention": ATTENTIONS,
        "convolution": CONVOLUTIONS,
        "norm": NORMS,
        "stack": STACKS,
        "recurrent": RECURRENT,
        "cell": CELLS,
        "model": MODELS,
    }.items()
    for row, case in table.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    assert_layers(inferred(CASES[name]), CASES[name].layers)


# However the program is wrapped.


def with_custom_jvp(function):
    wrapped = jax.custom_jvp(function)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return wrapped


def with_custom_vjp(function):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *args: jax.vjp(function, *args), lambda pullback, g: pullback(g))
    return wrapped


@pytest.mark.parametrize(
    "wrap",
    [
        jax.jit,
        jax.checkpoint,
        with_custom_jvp,
        with_custom_vjp,
        lambda f: lambda p, x, h: jax.vmap(f, (None, 0, 0))(p, x, h),
        lambda f: lambda p, x, h: lax.map(lambda row: f(p, *row), (x, h)),
        lambda f: lambda p, x, h: lax.cond(x.sum() > 0, f, f, p, x, h),
        lambda f: lambda p, x, h: f(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x, h),
        lambda f: lambda p, x, h: {"y": f(p, x, h), "name": "flag", "none": None},
        lambda f: lambda p, x, h: jax.linearize(lambda x: f(p, x, h), x)[0],
    ],
)
def test_wrapped(wrap):
    function = jax.jit(lambda p, x, h: jnp.tanh(split_before(p, x, h)))
    assert_layers(infer_dimension_numbers(wrap(function), FUSED, *STEP), [GATES])


def test_arrays_and_shapes_alike():
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), (FUSED, *STEP))
    assert_layers(infer_dimension_numbers(split_after, *arrays), [GATES])


def test_flags_are_handed_on():
    def apply(params, x, train, mode="sum"):
        assert train is True
        return getattr(x @ params["w"], mode)()

    params = {"w": array(5, 7)}
    description = infer_dimension_numbers(apply, params, array(2, 5), True, "mean")
    assert_layers(description, [one("w", bias=None)])


def test_feeds_the_transformation_and_the_table():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), FUSED)
    description = infer_dimension_numbers(split_after, params, *STEP)
    table = [line.split() for line in summary(params, description).splitlines()]
    assert [row[0] for row in table[1:]] == ["b", "u", "w"]
    assert all(row[-3:] == ["2.000", "2.000", "2.000"] for row in table[1:])
    updates, _ = scale_by_grapes(description).update(params, optax.EmptyState(), params)
    np.testing.assert_allclose(updates["b"], 2.0)


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        (lambda path: path != "w", [Layer({"u": (0, 1)}, {"b": 0}, 4)]),
        (lambda path: path != "b", [GATES._replace(biases={})]),
        (lambda path: path == "b", []),
        (lambda path: False, []),
    ],
)
def test_where(where, layers):
    assert_layers(infer_dimension_numbers(split_after, FUSED, *STEP, where=where), layers)


# Who else reads a summand decides whether layers are joined.

TWO = {"w": array(5, 5), "v": array(5, 5), "b": array(5)}
ALONE = [one("w", bias=None), one("v", bias="b")]
JOINED = [Layer({"w": (0, 1), "v": (0, 1)}, {"b": 0})]


def stream(p, x, again=lambda y: y, read=jnp.tanh):
    y = x @ p["w"]
    return again(y) + (read(y) @ p["v"] + p["b"])


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (stream, ALONE),
        (functools.partial(stream, again=jax.jit(lambda y: y * 2)), ALONE),
        (functools.partial(stream, read=jax.jit(jnp.sin)), ALONE),
        (lambda p, x: lax.scan(lambda c, _: (stream(p, x), None), x, None, 2)[0], ALONE),
        # What no result depends on reads nothing.
        (functools.partial(stream, read=lambda y: (jnp.sin(y), jnp.ones((2, 5)))[1]), JOINED),
        (lambda p, x: (y := x @ p["w"]) + x @ p["v"] + p["b"] + jax.jit(lambda _: 1.0)(y), JOINED),
        (lambda p, x: x @ p["w"] - (x @ p["v"] + p["b"]), JOINED),
        (lambda p, x: x @ p["w"] + (x + (x @ p["v"] + p["b"])), JOINED),
        (lambda p, x: x + jnp.tanh(x @ p["w"]) + (x @ p["v"] + p["b"]), ALONE),
        # Two gates, or one whose gate is not bounded: two layers.
        (lambda p, x: (x @ p["w"]) * jnp.tanh(x) + (x @ p["v"] + p["b"]) * jnp.tanh(x), ALONE),
        (lambda p, x: (x @ p["w"]) * x + (x @ p["v"] + p["b"]), ALONE),
        (lambda p, x: jax.nn.silu(x @ p["w"]) + (x @ p["v"] + p["b"]), ALONE),
        # One result is a returned value as well.
        (lambda p, x: ((y := x @ p["w"]) + (x @ p["v"] + p["b"]), y), ALONE),
    ],
)
def test_consumers(function, layers):
    assert_layers(infer_dimension_numbers(function, TWO, array(2, 5)), layers)


# What the program does not settle.

TREE = {"w": array(5, 7), "v": array(5, 7)}
UNSETTLED = {
    "used in two ways": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        {"w": array(5, 7)},
        r"w \(5, 7\): used in two ways",
    ),
    "tied": (
        lambda p, x: p["w"][jnp.argmax(x, -1)] @ p["w"].T,
        {"w": array(5, 7)},
        r"w \(5, 7\): used in two ways",
    ),
    "low rank": (
        lambda p, x: x @ (p["a"] @ p["b"]),
        {"a": array(5, 2), "b": array(2, 7)},
        r"a \(5, 2\): multiplied by another parameter; b \(2, 7\): multiplied by",
    ),
    "combined": (lambda p, x: x @ (p["w"] * p["v"]), TREE, r"v \(5, 7\): goes through mul; w"),
    "noisy": (
        lambda p, x: x @ (p["w"] + jnp.exp(p["v"]) * jnp.outer(x[0], jnp.arange(7.0))),
        TREE,
        r"v \(5, 7\): goes through add; w \(5, 7\): goes through add",
    ),
    "fft": (lambda p, x: x @ jnp.fft.fft(p["w"]).real, {"w": array(5, 7)}, "goes through fft"),
    "cumsum": (lambda p, x: x @ jnp.cumsum(p["w"], 0), {"w": array(5, 7)}, "through cumsum"),
    "sort": (lambda p, x: x @ jnp.sort(p["w"], 0), {"w": array(5, 7)}, "through sort"),
    "chosen by cond": (
        lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["v"]),
        TREE,
        "v .*: goes through cond; w .*: goes through cond",
    ),
    "by hand": (
        lambda p, x: (x[:, :, None] * p["w"]).sum(1),
        {"w": array(5, 7)},
        "multiplied and summed by hand",
    ),
    "no nodes": (lambda p, x: jnp.vdot(x, p["w"]), {"w": array(2, 5)}, "without fan-in or"),
    "reshape that mixes axes": (
        lambda p, x: x @ p["w"].reshape(5, 6),
        {"w": array(6, 5)},
        r"w \(6, 5\): goes through reshape",
    ),
    "packed along the fan-in": (
        lambda p, x: jnp.tanh(x @ p["w"][:5]) @ p["w"][5:],
        {"w": array(12, 7)},
        "its fan-in belongs to several layers",
    ),
    "other nodes": (
        lambda p, x: jnp.tanh((x @ p["w"])[:, :7] + x @ p["v"]) @ (x @ p["w"])[:, 7:].T,
        {"w": array(5, 14), "v": array(5, 7)},
        "v .*: summed with other nodes of another kernel; w .*: summed with other nodes",
    ),
    "shared differently": (
        lambda p, x: jnp.tanh(x @ p["w"] + x @ p["v"]) + jnp.tanh(x @ p["w"] + x @ p["u"]),
        TREE | {"u": array(5, 7)},
        "u .*: summed with different kernels in different places; v .*; w",
    ),
    "summed with what is used in two ways": (
        lambda p, x: jnp.tanh(x @ p["w"] + x @ p["v"]) @ p["w"].T,
        TREE,
        "v .*: summed with w; w .*: used in two ways",
    ),
    "not used": (
        lambda p, x: x @ jnp.ones((5, 2)),
        {"w": array(5, 7), "b": array(7)},
        r"b \(7,\): not used; w \(5, 7\): not used",
    ),
    "an axis split": (
        lambda p, x: jnp.einsum("bi,hij->bhj", x, p["w"].reshape(2, 5, 3)),
        {"w": array(10, 3)},
        "an axis is fan-in and something else as well",
    ),
    "put together anew": (
        lambda p, x: x @ jnp.concatenate([p["w"][:, 3:], p["w"][:, :3]], 1),
        {"w": array(5, 7)},
        "taken apart and put together anew",
    ),
    "summed with kernels put together": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1) + x @ p["u"],
        TREE | {"u": array(5, 14)},
        "u .*: summed with other nodes of another kernel; v .*; w",
    ),
    "nodes in other axes": (
        lambda p, x: (
            jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 12)
            + jnp.einsum("bi,ihd->bhd", x, p["v"]).reshape(2, 12)
        ),
        {"w": array(5, 3, 4), "v": array(5, 4, 3)},
        "v .*: summed with other nodes of another kernel; w",
    ),
    "stacks in different orders": (
        lambda p, x: (
            jnp.einsum("xybi,xyij->xybj", jnp.broadcast_to(x, (2, 3, 2, 5)), p["w"])
            + jnp.einsum("xybi,yxij->xybj", jnp.broadcast_to(x, (2, 3, 2, 5)), p["v"])
        ),
        {"w": array(2, 3, 5, 7), "v": array(3, 2, 5, 7)},
        "v .*: summed with kernels whose axes do not correspond; w",
    ),
    "stack and nodes": (
        lambda p, x: x[0] @ p["w"] + jnp.einsum("ei,eio->eo", x, p["v"])[:, 0],
        {"w": array(5, 2), "v": array(2, 5, 1)},
        "v .*: no axis of nodes; w .*: no axis of nodes",
    ),
    "broadcast to the inputs": (
        lambda p, x: lax.conv(x[None], jnp.broadcast_to(p["w"], (6, 2, 3)), (1,), "SAME"),
        {"w": array(6, 1, 3)},
        "changed before a convolution",
    ),
}


@pytest.mark.parametrize("name", UNSETTLED)
def test_unsettled(name):
    function, params, message = UNSETTLED[name]
    pattern = "GRAPES leaves alone what the program does not settle: .*" + message
    with pytest.warns(UserWarning, match=pattern) as record:
        description = infer_dimension_numbers(function, params, array(2, 5))
    assert len(record) == 1
    assert record[0].filename == __file__
    assert not by_leaf(description)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excluded = infer_dimension_numbers(function, params, array(2, 5), where=lambda path: False)
    assert not by_leaf(excluded)


UNSETTLED_BIASES = {
    "of one half of the nodes": (
        lambda p, x: jnp.tanh((z := x @ p["w"])[:, :7] + p["b"]) * z[:, 7:],
        {"w": array(5, 14), "b": array(7)},
        r"b \(7,\): added to a part of the nodes",
    ),
    "of two layers": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["b"]),
        {"w": array(5, 7), "v": array(7, 7), "b": array(7)},
        r"b \(7,\): added in several places",
    ),
    "of all layers of a stack": (
        lambda p, x: jnp.einsum("lbi,lij->lbj", x, p["w"]) + p["b"],
        {"w": array(2, 5, 7), "b": array(7)},
        r"b \(7,\): added to nodes that are not its own",
    ),
    "of all layers of a scan": (
        lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w + p["b"]), None), x, p["w"])[0],
        {"w": array(3, 5, 5), "b": array(5)},
        r"b \(5,\): added to nodes that are not its own",
    ),
    "in other axes": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 12) + p["b"].reshape(12),
        {"w": array(5, 3, 4), "b": array(4, 3)},
        r"b \(4, 3\): added to nodes that are not its own",
    ),
    "of several kernels": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1) + p["b"],
        {"w": array(5, 7), "v": array(5, 7), "b": array(14)},
        r"b \(14,\): added to several kernels at once",
    ),
    "of another entry": (
        lambda p, x: x @ p["w"][0] + p["b"][1],
        {"w": array(3, 5, 7), "b": array(3, 7)},
        r"b \(3, 7\): added to nodes that are not its own",
    ),
    "of a part that is not one gate": (
        lambda p, x: jnp.tanh((z := x @ p["w"])[:, :9]).sum() * jnp.tanh(z[:, 9:] + p["b"]),
        {"w": array(5, 14), "b": array(5)},
        r"b \(5,\): added to a part of the nodes",
    ),
    "in another order": (
        lambda p, x: x @ p["w"][:, ::-1] + p["b"],
        {"w": array(5, 7), "b": array(7)},
        r"b \(7,\): added to nodes that are not its own",
    ),
}


@pytest.mark.parametrize("name", UNSETTLED_BIASES)
def test_unsettled_biases(name):
    function, params, message = UNSETTLED_BIASES[name]
    x = array(2, 4, 5) if "of a stack" in name else array(2, 5)
    with pytest.warns(UserWarning, match=message):
        found = by_leaf(infer_dimension_numbers(function, params, x))
    assert found.keys() == params.keys() - {"b"}


def test_warning_does_not_list_all():
    params = [array(5, 7) for _ in range(20)]
    with pytest.warns(UserWarning, match=r"7 \(5, 7\): not used; [.]{3}[.] Describe") as record:
        infer_dimension_numbers(lambda p, x: x, params, array(2, 5))
    assert "9 (5, 7)" not in str(record[0].message)


@pytest.mark.parametrize("params", [{}, (), None, {"count": array(dtype=jnp.int32)}])
def test_nothing_to_describe(params):
    assert not by_leaf(infer_dimension_numbers(lambda p, x: x, params, array(2, 5)))


# Hints that do not fit.

NET = {"hidden": {"kernel": array(2, 5, 7), "bias": array(2, 7)}, "norm": {"scale": array(7)}}


def net(p, x):
    y = jnp.einsum("bi,eij->bej", x, p["hidden"]["kernel"]) + p["hidden"]["bias"]
    return (y - y.mean()) * p["norm"]["scale"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": {"hiden/kernel": 2}}, "gates names 'hiden/kernel', .* mean 'hidden/kernel'"),
        ({"stack": {"hidden/bia": 0}}, "stack names 'hidden/bia', .* mean 'hidden/bias'"),
        ({"gates": {"hid": 2}}, "gates names 'hid', where params have no leaf"),
        ({"gates": {"norm": 2}}, "gates names 'norm', where the program settles no layer"),
        ({"stack": {"norm/scale": 0}}, "stack names 'norm/scale', where the program settles"),
        ({"gates": {"hidden/kernel": 2}}, "gates do not divide 7 nodes: hidden/kernel: 2"),
        ({"gates": {"": 0}}, "gates do not divide 7 nodes: hidden/kernel: 0"),
        ({"gates": {"": 1.0}}, "gates do not divide"),
        ({"stack": {"hidden/kernel": 1}}, "stack names axis 1, fan-in: hidden/kernel: 1"),
        ({"stack": {"hidden/kernel": 3}}, "axis 3, out of range for 3 axes: hidden/kernel: 3"),
        ({"stack": {"hidden": -3}}, "axis -3, out of range for 2 axes: hidden/bias: -3"),
        ({"stack": {"hidden": 0, "hidden/bias": 1}}, "do not correspond: .*: 1, .*: 0"),
        ({"stack": {"hidden/kernel": (0, 2)}}, "stack names all axes of nodes"),
    ],
)
def test_hints_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        infer_dimension_numbers(net, NET, array(3, 5), **options)


def test_hints_for_branches_and_leaves():
    one_of_two = infer_dimension_numbers(
        net, NET, array(3, 5), stack={"": 0}, gates={"": 1, "hidden/kernel": 7}
    )
    assert_layers(one_of_two, below("hidden", one(fan_in=1, nodes=2, along=1, gates=7)))


def test_kernels_of_one_layer_with_different_hints():
    with pytest.raises(ValueError, match="gates do not divide 28 nodes: u: 2, w: 4"):
        infer_dimension_numbers(split_after, FUSED, *STEP, gates={"u": 2, "w": 4})


def test_arrays_only():
    params = {"w": array(5, 7), "activation": jnp.tanh}
    with pytest.raises(TypeError, match=r"tanh.* at activation: .*eqx.partition"):
        infer_dimension_numbers(lambda p, x: x @ p["w"], params, array(2, 5))


def test_feeds_the_modulation_of_an_error():
    with jax.numpy_rank_promotion("raise"):
        keys = jax.random.split(KEY, 3)
        shapes = {"w": (5, 12), "u": (3, 12), "b": (12,)}
        params = {
            name: jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

        def gates(params, x, h):
            z = x @ params["w"] + h @ params["u"] + params["b"]
            return jnp.split(z, 4)

        described = infer_dimension_numbers(gates, params, array(5), array(3))
        kernels = [params[name] for name in "wu"]
        numbers = [described[name] for name in "wu"]
        cotangent = jax.grad(
            lambda z: modulate_error(z, *kernels, weight_dimension_numbers=numbers).sum()
        )(jnp.zeros(12))
        ones = jax.tree.map(jnp.ones_like, params)
        local, _ = scale_by_grapes(described).update(ones, optax.EmptyState(), params)
        np.testing.assert_allclose(cotangent, local["b"], rtol=1e-6)
        for gate in np.split(np.asarray(cotangent), 4):
            assert gate.max() == 2  # a maximum of its own
