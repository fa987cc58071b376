"""Which layers are output layers, and what is said where none or all of them are."""

import functools
import re
import warnings
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
from programs import IMAGE, KEY, TOKENS, X, array, equinox, flax_nnx, haiku, linen, plain

from grapes_optax import (
    DimensionNumbers,
    LeftAlone,
    infer_dimension_numbers,
    scale_by_grapes,
    summary,
)

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


class Case(NamedTuple):
    """A program, the kernels of its output layers, and its hidden ones."""

    program: Any
    output: set[str]
    hidden: set[str]
    said: str | None = None  # pattern of the only warning


def is_leaf(x):
    return x is None or isinstance(x, DimensionNumbers | LeftAlone)


def by_path(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = (jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in flat)
    return {
        name.removesuffix("/value"): value for name, (_, value) in zip(names, flat, strict=True)
    }


def described(case, **options):
    apply_fn, params, inputs = case.program()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = infer_dimension_numbers(apply_fn, params, *inputs, **options)
    assert all(warning.filename == __file__ for warning in said)
    return by_path(found), [str(warning.message) for warning in said]


def net(*names, **shapes):
    """Parameters with square kernels, but for those whose shape is given."""
    return {name: array(5, 5) for name in names} | {k: array(*v) for k, v in shapes.items()}


def hidden(p, x):
    return jnp.tanh(x @ p["a"])


def logits(p, x):
    return hidden(p, x) @ p["z"]


def simple(behind, *inputs):
    """A hidden layer, an output layer, and what stands behind it."""
    program = plain(
        lambda p, x, *rest: behind(logits(p, x), *rest), net("a", "z"), array(2, 5), *inputs
    )
    return Case(program, {"z"}, {"a"})


def cross_entropy(z, labels):
    one_hot = jax.nn.one_hot(labels, 5)
    return -(jax.nn.log_softmax(z) * one_hot).sum(-1).mean()


LABELS = array(2, dtype=jnp.int32)
BEHIND = {
    "nothing": simple(lambda z: z),
    "softmax": simple(jax.nn.softmax),
    "log-softmax": simple(jax.nn.log_softmax),
    "sigmoid": simple(jax.nn.sigmoid),
    "relu": simple(jax.nn.relu),
    "gelu": simple(jax.nn.gelu),
    "scale": simple(lambda z: 0.1 * z),
    "cast": simple(lambda z: z.astype(jnp.bfloat16)),
    "reshape": simple(lambda z: z.reshape(-1)),
    "last entry": simple(lambda z: z[-1]),
    "squeeze": simple(lambda z: z[:, :1].squeeze(-1)),
    "mean": simple(lambda z: z.mean(0)),
    "largest entry": simple(lambda z: jnp.argmax(z, -1)),
    "both": simple(lambda z: {"logits": z, "class": jnp.argmax(z, -1), "p": jax.nn.softmax(z)}),
    "cross-entropy": simple(cross_entropy, LABELS),
    "optax's cross-entropy": simple(
        lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), LABELS
    ),
    "squared error": simple(lambda z, y: jnp.square(z - y).mean(), array(2, 5)),
    "sum over a scan": simple(
        lambda z: lax.scan(lambda total, row: (total + row, None), jnp.zeros(5), z)[0]
    ),
    "resized by a constant matrix": simple(lambda z: jax.image.resize(z, (2, 9), "linear")),
    "statistics": simple(lambda z: (z, {"mean": z.mean(0), "var": z.var(0)})),
    "jit and remat": simple(jax.jit(jax.checkpoint(jax.nn.softmax))),
    "cond": simple(lambda z: lax.cond(z.sum() > 0, lambda: z, lambda: -z)),
}


def temperature(p, x):
    return logits(p, x) / p["t"] + p["bias"]


def penalty(p, x):
    return logits(p, x).mean() + sum(jnp.square(w).sum() for w in p.values())


def heads(p, x):
    y = hidden(p, x)
    return {"policy": jax.nn.softmax(y @ p["z"]), "value": (y @ p["v"]).squeeze(-1)}


def one_node(p, x):
    """A vector is no kernel, and yet the output layer."""
    return jnp.tanh(hidden(p, x) @ p["b"]) @ p["v"]


def one_node_by_hand(p, x):
    return (jnp.tanh(hidden(p, x) @ p["b"]) * p["v"]).sum(-1)


def normalised(p, x):
    z = logits(p, x) * p["scale"]
    return z * lax.rsqrt(jnp.square(z).sum(-1, keepdims=True))


def supervised_deeply(p, x):
    y = hidden(p, x)
    return y @ p["y"], jnp.tanh(y @ p["b"]) @ p["z"]


def auxiliary(p, x):
    first = hidden(p, x)
    second = jax.nn.relu(pre := first @ p["b"])
    return second @ p["z"], {"first": first, "pre": pre, "second": second}


def dense_net(p, x):
    first = hidden(p, x)
    second = jnp.tanh(first @ p["b"])
    return jnp.concatenate([first, second, second @ p["z"]], -1)


def parallel(p, x):
    return jnp.concatenate([hidden(p, x) @ p["y"], hidden(p, x) @ p["z"]], -1)


def skip(p, x):
    return hidden(p, x) @ p["z"] + x @ p["y"]


def residual(p, x):
    """Without a head, the last branch is the last layer."""
    for up, down in ("ab", "cz"):
        x = x + jnp.tanh(x @ p[up]) @ p[down]
    return x


def residual_with_head(p, x):
    return residual(p, x).mean(0) @ p["head"]


def autoencoder(p, x):
    code = jnp.tanh(hidden(p, x) @ p["b"])
    return jax.nn.sigmoid(jnp.tanh(code @ p["c"]) @ p["z"]), code


def reconstruction_error(p, x):
    return jnp.square(autoencoder(p, x)[0] - x).mean()


def variational(p, x, key):
    y = hidden(p, x)
    mean, log_variance = y @ p["mean"], y @ p["variance"]
    code = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
    return jnp.tanh(code @ p["b"]) @ p["z"], mean, log_variance


def tied(p, ids):
    x = p["table"][ids]
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["table"].T


def recurrent(p, xs, readout=True, carry=False):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["bias"])
        return h, h @ p["z"] if readout else h

    h, ys = lax.scan(step, jnp.zeros((2, 5)), xs)
    return (ys, h) if carry else ys


def read_out_after(p, xs):
    h, hs = lax.scan(lambda h, x: (jnp.tanh(x @ p["w"] + h @ p["u"]),) * 2, jnp.zeros((2, 5)), xs)
    return hs[-1] @ p["z"], h


def fed_back(p, xs):
    """The readout is the input of the next step."""

    def step(carry, x):
        h, y = carry
        h = jnp.tanh(x @ p["w"] + y @ p["v"] + h @ p["u"])
        return (h, h @ p["z"]), h @ p["z"]

    return lax.scan(step, (jnp.zeros((2, 5)),) * 2, xs)[1]


SAMPLES = {
    "argmax": lambda z: jax.nn.one_hot(jnp.argmax(z, -1), 5),
    "top_k": lambda z: jax.nn.one_hot(lax.top_k(z, 1)[1][:, 0], 5),
    "argsort": lambda z: jax.nn.one_hot(jnp.argsort(z)[:, -1], 5),
    "comparison": lambda z: (jax.nn.sigmoid(z) > 0.5).astype(jnp.float32),
    "largest": lambda z: (z == z.max(-1, keepdims=True)).astype(jnp.float32),
    "rounded": lambda z: jnp.round(jax.nn.sigmoid(z)),
    "stop_gradient": lambda z: lax.stop_gradient(jax.nn.softmax(z)),
}


def decoded(sample, p, x):
    """What is sampled is fed back, and brings back no error."""

    def step(carry, _):
        h, token = carry
        h = jnp.tanh(h @ p["u"] + token @ p["w"])
        z = h @ p["z"]
        return (h, sample(z)), z

    return lax.scan(step, (x, x), None, 3)[1]


def spiking(p, xs):
    @jax.custom_jvp
    def spike(v):
        return (v > 0).astype(float)

    spike.defjvp(lambda v, dv: (spike(*v), dv[0] / (1 + jnp.abs(v[0]))))

    def step(carry, x):
        v, out = carry
        v = 0.9 * v + x @ p["a"]
        s = spike(v)
        out = 0.9 * out + s @ p["z"]
        return (v, out), (out, s)

    return lax.scan(step, (jnp.zeros((2, 5)),) * 2, xs)


def stacked(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def stacked_with_head(p, x):
    return stacked(p, x) @ p["z"]


def mixture(p, x):
    """The router in front of the experts, and a head behind them."""
    gate = jax.nn.softmax(x @ p["router"])
    experts = jnp.einsum("bi,eio->beo", x, p["experts"])
    return jnp.einsum("be,beo->bo", gate, jnp.tanh(experts)) @ p["z"]


def attention(p, x):
    q, k, v = (x @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["z"]


def contrastive(p, x, y):
    return (jnp.tanh(x @ p["a"]) @ p["y"]) @ (jnp.tanh(y @ p["b"]) @ p["z"]).T


def stopped(p, x):
    """A critic that reads the logits without training them."""
    z = logits(p, x)
    return z, jnp.tanh(lax.stop_gradient(z) @ p["b"]) @ p["y"]


def adversarial(p, x):
    fake = hidden(p, x) @ p["generator"]
    return jnp.tanh(fake @ p["b"]) @ p["z"]


def through_what_is_not_understood(p, x):
    return hidden(p, x) @ jnp.cumsum(p["z"], 0)


def through_a_choice_of_weights(p, x):
    return hidden(p, x) @ lax.cond(x.sum() > 0, lambda: p["y"], lambda: p["z"])


def low_rank(p, x):
    return hidden(p, x) @ (p["y"] @ p["z"])


def by_hand(p, x):
    return (hidden(p, x)[:, :, None] * p["z"]).sum(1)


def conditional(p, x, label):
    """The discriminator of a projection: a row of a table is the kernel."""
    return (hidden(p, x) * p["table"][label]).sum(-1)


def styled(p, x, style):
    w = p["w"] * (style @ p["a"])[:, None]
    return jnp.tanh(x @ (w * lax.rsqrt(jnp.square(w).sum(0)))) @ p["z"]


def distilled(p, x):
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits(p, x)), jnp.ones((2, 5)) / 5)


STEPS = array(3, 2, 5)
AGAIN = r"finds no output layer.*\({}\) is read by a layer again"
NETS = {
    "temperature and bias": Case(
        plain(temperature, net("a", "z", t=(), bias=(5,)), array(2, 5)), {"z"}, {"a"}
    ),
    "penalty": Case(plain(penalty, net("a", "z"), array(2, 5)), {"z"}, {"a"}),
    "two heads": Case(plain(heads, net("a", "z", v=(5, 1)), array(2, 5)), {"v", "z"}, {"a"}),
    **{
        f"a vector, {how}": Case(plain(head, net("a", "b", v=(5,)), array(2, 5)), set(), {*"ab"})
        for how, head in (("contracted", one_node), ("by hand", one_node_by_hand))
    },
    "scaled and normalised": Case(
        plain(normalised, net("a", "z", scale=(5,)), array(2, 5)), {"z"}, {"a"}
    ),
    "deep supervision": Case(
        plain(supervised_deeply, net(*"abyz"), array(2, 5)), {"y", "z"}, {"a", "b"}
    ),
    "hidden activations returned": Case(
        plain(auxiliary, net(*"abz"), array(2, 5)), {"z"}, {"a", "b"}
    ),
    "concatenated with hidden activations": Case(
        plain(dense_net, net(*"abz"), array(2, 5)), {"z"}, {"a", "b"}
    ),
    "concatenated outputs": Case(plain(parallel, net(*"ayz"), array(2, 5)), {"y", "z"}, {"a"}),
    "a skip connection": Case(plain(skip, net(*"ayz"), array(2, 5)), {"y", "z"}, {"a"}),
    "a residual stream": Case(plain(residual, net(*"abcz"), array(2, 5)), {"z"}, {*"abc"}),
    "a residual stream with a head": Case(
        plain(residual_with_head, net(*"abcz", "head"), array(2, 5)), {"head"}, {*"abcz"}
    ),
    "autoencoder": Case(plain(autoencoder, net(*"abcz"), array(2, 5)), {"z"}, {*"abc"}),
    "reconstruction error": Case(
        plain(reconstruction_error, net(*"abcz"), array(2, 5)), {"z"}, {*"abc"}
    ),
    "variational autoencoder": Case(
        plain(variational, net(*"abz", "mean", "variance"), array(2, 5), KEY),
        {"z"},
        {"a", "b", "mean", "variance"},
    ),
    "tied embedding": Case(
        plain(tied, net("a", "b", table=(11, 5)), TOKENS),
        set(),
        {"a", "b"},
        r"table \(11, 5\): used in two ways",
    ),
    "readout in each step": Case(
        plain(recurrent, net(*"wuz", bias=(5,)), STEPS), {"z"}, {"w", "u"}
    ),
    "readout in each step, carry returned": Case(
        plain(lambda p, xs: recurrent(p, xs, carry=True), net(*"wuz", bias=(5,)), STEPS),
        {"z"},
        {"w", "u"},
    ),
    "readout after the steps": Case(plain(read_out_after, net(*"wuz"), STEPS), {"z"}, {"w", "u"}),
    "no readout": Case(
        plain(lambda p, xs: recurrent(p, xs, False), net(*"wu", bias=(5,)), STEPS),
        set(),
        {"w", "u"},
        AGAIN.format("u, w"),
    ),
    "readout fed back": Case(
        plain(fed_back, net(*"wvuz"), STEPS), set(), {*"wvuz"}, AGAIN.format("z")
    ),
    **{
        f"decoded by {name}": Case(
            plain(functools.partial(decoded, sample), net(*"wuz"), array(2, 5)), {"z"}, {"w", "u"}
        )
        for name, sample in SAMPLES.items()
    },
    "spikes recorded": Case(plain(spiking, net("a", "z"), STEPS), {"z"}, {"a"}),
    "a stack": Case(
        plain(stacked, {"w": array(3, 5, 5)}, array(2, 5)), set(), {"w"}, AGAIN.format("w")
    ),
    "a stack with a head": Case(
        plain(stacked_with_head, {"w": array(3, 5, 5), "z": array(5, 2)}, array(2, 5)),
        {"z"},
        {"w"},
    ),
    "mixture of experts": Case(
        plain(mixture, net("z", router=(5, 3), experts=(3, 5, 5)), array(2, 5)),
        {"z"},
        {"router", "experts"},
    ),
    "attention": Case(plain(attention, net(*"qkvz"), array(2, 5)), {"z"}, {*"qkv"}),
    "contrastive": Case(
        plain(contrastive, net(*"abyz"), *[array(2, 5)] * 2), {"y", "z"}, {"a", "b"}
    ),
    "read without gradient": Case(
        plain(stopped, net(*"abyz"), array(2, 5)), {"y", "z"}, {"a", "b"}
    ),
    "adversarial": Case(
        plain(adversarial, net("a", "generator", "b", "z"), array(2, 5)),
        {"z"},
        {"a", "generator", "b"},
    ),
    "through what is not understood": Case(
        plain(through_what_is_not_understood, net("a", "z"), array(2, 5)),
        set(),
        {"a"},
        "z .*: goes through cumsum",
    ),
    "through a choice of weights": Case(
        plain(through_a_choice_of_weights, net(*"ayz"), array(2, 5)),
        set(),
        {"a"},
        "y .*: goes through cond; z",
    ),
    "low rank": Case(
        plain(low_rank, net("a", y=(5, 2), z=(2, 5)), array(2, 5)),
        set(),
        {"a"},
        "y .*: multiplied by another parameter; z",
    ),
    "by hand": Case(
        plain(by_hand, net("a", "z"), array(2, 5)), set(), {"a"}, "z .*: multiplied and summed"
    ),
    "conditional": Case(
        plain(conditional, net("a", table=(11, 5)), array(2, 5), LABELS), set(), {"a"}
    ),
    "style": Case(
        plain(styled, net(*"awz"), array(2, 5), array(5)),
        {"z"},
        {"a", "w"},
    ),
    "distillation": Case(plain(distilled, net("a", "z"), array(2, 5)), {"z"}, {"a"}),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=False)(nn.Conv(4, (3, 3))(x)))
        x = nn.Dropout(0.5, deterministic=True)(x.mean((1, 2)))
        return nn.softmax(nn.Dense(3, name="head")(nn.LayerNorm()(x)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        carry, x = nn.RNN(nn.OptimizedLSTMCell(5, name="lstm"), return_carry=True)(x)
        return nn.Dense(3, name="head")(x), carry


class Language(nn.Module):
    tied: bool

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8)
        x = embed(ids)
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2, name="attention")(x))
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(x)))
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(11, name="head")(x)


class Recorded(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name="first")(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(3, name="head")(x)


def recorded():
    params = jax.eval_shape(Recorded().init, KEY, X)["params"]
    return (
        lambda params, x: Recorded().apply({"params": params}, x, mutable=["intermediates"]),
        params,
        (X,),
    )


LSTM = {f"lstm/{name}/kernel" for name in ["ii", "if", "ig", "io", "hi", "hf", "hg", "ho"]}
BLOCK = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
BLOCK |= {"up/kernel", "down/kernel"}
FRAMEWORKS = {
    "linen, statistics returned": Case(linen(Network(), IMAGE), {"head/kernel"}, {"Conv_0/kernel"}),
    "linen, recurrent": Case(linen(Recurrent(), X), {"head/kernel"}, LSTM),
    "linen, language model": Case(linen(Language(False), TOKENS), {"head/kernel"}, BLOCK),
    "linen, tied language model": Case(
        linen(Language(True), TOKENS),
        set(),
        BLOCK,
        r"Embed_0/embedding \(11, 8\): used in two ways",
    ),
    "linen, intermediates": Case(recorded, {"head/kernel"}, {"first/kernel"}),
    "nnx": Case(
        flax_nnx(
            lambda rngs: nnx.Sequential(
                nnx.Linear(5, 7, rngs=rngs), nnx.relu, nnx.Linear(7, 3, rngs=rngs)
            ),
            X,
        ),
        {"layers/2/kernel"},
        {"layers/0/kernel"},
    ),
    "haiku": Case(
        haiku(lambda x: jax.nn.log_softmax(hk.nets.MLP([6, 3])(x)), X),
        {"mlp/~/linear_1/w"},
        {"mlp/~/linear_0/w"},
    ),
    "equinox": Case(
        equinox(lambda key: eqx.nn.MLP(5, 3, 7, 2, key=key), array(5)),
        {"layers/2/weight"},
        {"layers/0/weight", "layers/1/weight"},
    ),
}
CASES = BEHIND | NETS | FRAMEWORKS


@pytest.mark.parametrize("name", CASES)
def test_output_layers(name):
    case = CASES[name]
    found, said = described(case)
    kernels = {path for path, value in found.items() if value and not path.endswith(("bias", "/b"))}
    output = {path for path in kernels if found[path] == LeftAlone("output")}
    assert (output, kernels - output) == (case.output, case.hidden)
    if case.said is None:
        assert said == []
    else:
        (text,) = said
        assert re.search(case.said, text)


@pytest.mark.parametrize("name", CASES)
def test_kept(name):
    """With the option, all that is an output layer is a layer like others."""
    case = CASES[name]
    found, said = described(case, modulate_output=True)
    without, _ = described(case)
    assert case.output | case.hidden <= {path for path, value in found.items() if value}
    assert not any(isinstance(value, LeftAlone) for value in found.values())
    assert not any("output layer" in text for text in said)
    hidden = {path for path, value in without.items() if isinstance(value, DimensionNumbers)}
    assert all(found[path] == without[path] for path in hidden)


def test_bias_follows():
    params = {"z": array(5, 3), "a": array(5, 5), "b": array(3), "c": array(5)}
    found = infer_dimension_numbers(
        lambda p, x: jnp.tanh(x @ p["a"] + p["c"]) @ p["z"] + p["b"], params, array(2, 5)
    )
    assert found["b"] == found["z"] == LeftAlone("output")
    assert found["c"].group == found["a"].group == "a"


ALL = r"modulates nothing: w is read by no other layer.*modulate_output=True"


def test_all_layers_are_output_layers():
    with pytest.warns(UserWarning, match=ALL):
        found = infer_dimension_numbers(lambda p, x: x @ p["w"], {"w": array(5, 3)}, array(2, 5))
    assert found == {"w": LeftAlone("output")}
    with pytest.warns(UserWarning, match="modulates nothing: z is read by no other layer"):
        infer_dimension_numbers(logits, net("a", "z"), array(2, 5), where=lambda path: path == "z")


def test_one_step_of_a_cell():
    """Where the carry goes is not in the program."""
    params = net("w", "u", b=(5,))
    with pytest.warns(UserWarning, match="modulates nothing: u, w is read by no other layer"):
        found = infer_dimension_numbers(
            lambda p, x, h: jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), params, *[array(2, 5)] * 2
        )
    assert set(found.values()) == {LeftAlone("output")}


def test_output_excluded_by_hand():
    """Who names the output layer where none is found is not told of it again."""
    case = NETS["readout fed back"]
    found, said = described(case, where=lambda path: path != "z")
    assert found["z"] is None
    assert said == []


def test_table_and_transformation():
    params = {"a": jnp.ones((5, 4)), "b": jnp.ones(4), "n": jnp.ones(4), "z": jnp.ones((4, 3))}
    description = infer_dimension_numbers(
        lambda p, x: jnp.tanh(x @ p["a"] + p["b"]) * p["n"] @ p["z"], params, jnp.ones((2, 5))
    )
    rows = {line.split()[0]: line for line in summary(params, description).splitlines()}
    roles = {"a": "kernel", "b": "bias", "n": "left alone", "z": "output"}
    assert all(re.search(rf"\) +{role}( |$)", rows[path]) for path, role in roles.items())
    tx = scale_by_grapes(description)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 2.0)
    np.testing.assert_allclose(updates["b"], 2.0)
    np.testing.assert_allclose(updates["z"], 1.0)


def test_left_alone_by_hand():
    """One reason may stand for a branch."""
    params = {"a": jnp.ones((5, 4)), "frozen": {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}}
    description = {"a": DimensionNumbers(), "frozen": LeftAlone("frozen")}
    rows = summary(params, description).splitlines()
    assert [row.split()[3] for row in rows[1:]] == ["kernel", "frozen", "frozen"]
    mapped = jax.tree.map(lambda x: x, description, is_leaf=is_leaf)
    assert mapped == description
    tx = scale_by_grapes(mapped)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["frozen"]["w"], 1.0)
