"""Whole models, read from the program."""

import functools

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
    LSTM,
    SEQUENCE,
    STACKED,
    TOKENS,
    Case,
    Layer,
    X,
    array,
    as_tuple,
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
    # The entries of an axis of two are rolled: it is fan-in, and no stack.
    "rolled": Case(
        plain(
            lambda p, x: x @ jnp.roll(p["w"], 1, 0) + x @ p["v"],
            {"w": array(2, 7), "v": array(2, 7)},
            array(3, 2),
        ),
        [],
        unsettled=r"v .*: summed with w; w \(2, 7\): taken apart and put together anew",
    ),
    "taken apart and stacked again": Case(
        plain(
            lambda p, x: lax.scan(
                lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["w"][i] for i in range(3)])
            )[0],
            {"w": array(3, 5, 5)},
            array(2, 5),
        ),
        [one("w", 1, 2, None)],
    ),
    "lost in a part": Case(
        plain(
            lambda p, x: x @ jnp.concatenate([p["w"][:1], jnp.sort(p["w"][1:], 1)]),
            {"w": array(2, 7)},
            array(3, 2),
        ),
        [],
        unsettled=r"w \(2, 7\): goes through sort",
    ),
    "cond of each row": Case(
        plain(
            jax.vmap(chosen_branch, (None, 0)),
            {"w": array(5, 7), "b": array(7), "v": array(5, 7)},
            array(2, 5),
        ),
        [one("w", bias="b"), one("v", bias=None)],
    ),
    "a bare array": Case(plain(lambda w, x: x @ w, array(5, 7), array(2, 5)), [one("", bias=None)]),
}

CASES: dict[str, Case] = {
    f"{name}: {row}": case
    for name, table in {
        "model": MODELS,
    }.items()
    for row, case in table.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    assert_layers(inferred(CASES[name]), CASES[name].layers)
