"""Single layers and stacks of every framework, read from the program."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from programs import (
    ATTENTION,
    CONV,
    IMAGE,
    KEY,
    STACKED,
    STACKED_CONV,
    TOKENS,
    Case,
    Layer,
    X,
    array,
    assert_layers,
    below,
    equinox,
    flax_nnx,
    haiku,
    inferred,
    linen,
    one,
    plain,
)

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

# Rows of the first table: single layers.


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
    # To the program these are kernels: one sums its product to that of the kernel.
    "nnx LoRALinear": Case(
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

GRAPH = {"self": array(5, 7), "other": array(5, 7), "b": array(7)}
SAGE = [Layer({"self": (0, 1), "other": (0, 1)}, {"b": 0})]
AGGREGATIONS = {
    "graph convolution": Case(
        plain(
            lambda p, a, x: jnp.tanh(a @ (x @ p["kernel"]) + p["bias"][None]),
            {"kernel": array(5, 7), "bias": array(7)},
            array(4, 4),
            array(4, 5),
        ),
        [one()],
    ),
    "neighbours, multiplied before": Case(
        plain(
            lambda p, a, x: x @ p["self"] + a @ (x @ p["other"]) + p["b"][None],
            GRAPH,
            array(4, 4),
            array(4, 5),
        ),
        SAGE,
    ),
    "neighbours, multiplied after": Case(
        plain(
            lambda p, a, x: x @ p["self"] + (a @ x) @ p["other"] + p["b"][None],
            GRAPH,
            array(4, 4),
            array(4, 5),
        ),
        SAGE,
    ),
    "set": Case(
        plain(
            lambda p, x: x @ p["self"] + (x @ p["other"]).mean(0, keepdims=True) + p["b"][None],
            GRAPH,
            array(4, 5),
        ),
        SAGE,
    ),
    "activations": Case(
        plain(
            lambda p, a, x: a @ jnp.tanh(x @ p["self"]) + jnp.tanh(x @ p["other"]) + p["b"][None],
            GRAPH,
            array(4, 4),
            array(4, 5),
        ),
        [one("self", bias=None), one("other", bias=None)],
    ),
}

CASES: dict[str, Case] = {
    f"{name}: {row}": case
    for name, table in {
        "linear": LINEAR,
        "attention": ATTENTIONS,
        "convolution": CONVOLUTIONS,
        "norm": NORMS,
        "stack": STACKS,
        "aggregation": AGGREGATIONS,
    }.items()
    for row, case in table.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    assert_layers(inferred(CASES[name]), CASES[name].layers)
