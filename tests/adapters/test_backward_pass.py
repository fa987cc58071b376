"""The rules for linen and nnx against backward passes in NumPy, and what they leave alone.

Dense and convolutional nets agree to 3e-7 in float32. Where an exponential or tanh rounds by
more than that, without any rule, models run in float64 and agree to 1e-12.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_backward as by_hand
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from grapes_optax import alignment, modulate_error
from grapes_optax import linen as glinen
from grapes_optax import nnx as gnnx

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _numerics():
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        yield


# Models, alike in both frameworks: the names of their layers, and what is done with them.


def dense(net, x):
    return net.output(jax.nn.relu(net.hidden(x)))


def conv(net, x):
    x = jax.nn.relu(net.conv(x))
    return net.output(x.reshape(len(x), -1))


def deep(net, x):
    x = nn.max_pool(jax.nn.relu(net.first(x)), (2, 2), (2, 2))
    x = nn.avg_pool(jax.nn.relu(net.second(x)), (2, 2), (2, 2))
    x = net.dropout(x.reshape(len(x), -1))
    return net.output(jax.nn.relu(net.hidden(x)))


class LinenNet(nn.Module):
    body: Callable
    layers: dict[str, Callable]

    @nn.compact
    def __call__(self, x):
        return self.body(SimpleNamespace(**{k: make(name=k) for k, make in self.layers.items()}), x)


class NnxNet(nnx.Module):
    def __init__(self, body, layers, rngs):
        self.body = body
        for name, make in layers.items():
            setattr(self, name, make(rngs=rngs))

    def __call__(self, x):
        return self.body(self, x)


class Net(NamedTuple):
    """One model in linen, in nnx and by hand."""

    x: tuple[int, ...]
    linen: nn.Module
    nnx: Callable[[nnx.Rngs], Any]
    by_hand: Callable[..., by_hand.Net]  # of the parameters of every layer
    dtype: Any = np.float32
    fused: Any = None  # layers of nnx that are several of linen: by name, their names


def layered(x, body, linen, nnx, by_hand):
    return Net(x, LinenNet(body, linen), functools.partial(NnxNet, body, nnx), by_hand)


def dense_by_hand(params):
    layers = {name: by_hand.Dense(leaves) for name, leaves in params.items()}
    return by_hand.Net("hidden", by_hand.Relu(), "output", **layers)


def conv_net(padding, flat, stride=1, groups=1):
    options = {"strides": (stride, stride), "padding": padding, "feature_group_count": groups}

    def conv_by_hand(params):
        return by_hand.Net(
            *("conv", by_hand.Relu(), by_hand.Flatten(), "output"),
            conv=by_hand.Conv(params["conv"], stride, padding, groups),
            output=by_hand.Dense(params["output"]),
        )

    return layered(
        (2, 5, 4, 4),
        conv,
        {
            "conv": functools.partial(nn.Conv, 6, (3, 2), **options),
            "output": functools.partial(nn.Dense, 3),
        },
        {
            "conv": functools.partial(nnx.Conv, 4, 6, (3, 2), **options),
            "output": functools.partial(nnx.Linear, flat, 3),
        },
        conv_by_hand,
    )


def recurrent(linen, nnx_cell, by_hand, **fused):
    kwargs = {"dtype": np.float64, "param_dtype": np.float64}
    return Net(
        (2, 3, 3),
        nn.RNN(linen(4, **kwargs)),
        lambda rngs: nnx.RNN(nnx_cell(3, 4, **kwargs, rngs=rngs)),
        lambda params: by_hand({name.removeprefix("cell/"): p for name, p in params.items()}),
        np.float64,
        {f"cell/{name}": tuple(f"cell/{part}" for part in parts) for name, parts in fused.items()},
    )


def deep_by_hand(params, mask):
    return by_hand.Net(
        *("first", by_hand.Relu(), by_hand.MaxPool()),
        *("second", by_hand.Relu(), by_hand.AvgPool()),
        *(by_hand.Flatten(), by_hand.Dropout(mask), "hidden", by_hand.Relu(), "output"),
        first=by_hand.Conv(params["first"]),
        second=by_hand.Conv(params["second"]),
        hidden=by_hand.Dense(params["hidden"]),
        output=by_hand.Dense(params["output"]),
    )


NETS = {
    "dense": layered(
        (4, 5),
        dense,
        {"hidden": functools.partial(nn.Dense, 6), "output": functools.partial(nn.Dense, 3)},
        {
            "hidden": functools.partial(nnx.Linear, 5, 6),
            "output": functools.partial(nnx.Linear, 6, 3),
        },
        dense_by_hand,
    ),
    "conv_stride_valid": conv_net("VALID", 24, stride=2),
    "conv_stride_same": conv_net("SAME", 36, stride=2),
    "conv_groups_valid": conv_net("VALID", 54, groups=2),
    "conv_groups_same": conv_net("SAME", 120, groups=2),
    "attention": Net(
        (2, 3, 5),
        nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=4),
        lambda rngs: nnx.MultiHeadAttention(
            *(2, 5, 6, 4),
            decode=False,
            # That of nnx takes the softmax in float32.
            attention_fn=lambda q, k, v, **_: nn.dot_product_attention(q, k, v),
            rngs=rngs,
        ),
        by_hand.Attention,
        np.float64,
    ),
    "simple": recurrent(
        nn.SimpleCell, nnx.SimpleCell, by_hand.SimpleCell, dense_i=("i",), dense_h=("h",)
    ),
    "lstm": recurrent(nn.LSTMCell, nnx.LSTMCell, by_hand.LSTMCell, if_=("if",)),
    "fused_lstm": recurrent(
        nn.LSTMCell,
        nnx.OptimizedLSTMCell,
        by_hand.LSTMCell,
        dense_i=("ii", "if", "ig", "io"),
        dense_h=("hi", "hf", "hg", "ho"),
    ),
    "gru": recurrent(
        nn.GRUCell,
        nnx.GRUCell,
        by_hand.GRUCell,
        dense_i=("ir", "iz", "in"),
        dense_h=("hr", "hz", "hn"),
    ),
}
ONE_LAYER = layered(
    (6, 5),
    lambda net, x: net.output(x),
    {"output": functools.partial(nn.Dense, 6)},
    {"output": functools.partial(nnx.Linear, 5, 6)},
    None,
)
DEEP = layered(
    (2, 8, 8, 2),
    deep,
    {
        "first": functools.partial(nn.Conv, 4, (3, 3)),
        "second": functools.partial(nn.Conv, 3, (3, 3)),
        "dropout": functools.partial(nn.Dropout, 0.5, deterministic=False),
        "hidden": functools.partial(nn.Dense, 5),
        "output": functools.partial(nn.Dense, 3),
    },
    {
        "first": functools.partial(nnx.Conv, 2, 4, (3, 3)),
        "second": functools.partial(nnx.Conv, 4, 3, (3, 3)),
        "dropout": functools.partial(nnx.Dropout, 0.5),
        "hidden": functools.partial(nnx.Linear, 12, 5),
        "output": functools.partial(nnx.Linear, 5, 3),
    },
    deep_by_hand,
)


RECURRENT = ("simple", "lstm", "fused_lstm", "gru")
SIGN_RULES = ("uniform_sign", "fixed_sign")


# Rules, and a function of (parameters, feedback weights, input), all dicts by path, for each.


class Rule(NamedTuple):
    propagated: bool = False
    through_time: bool = False
    aligned: str | None = None
    direct: bool = False


def hidden(path):
    return "output" not in path


def shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def transformed(grapes, forward, rule):
    if rule.aligned:
        forward = grapes.feedback_alignment(forward, rule=rule.aligned)
    if rule.direct:
        forward = grapes.direct_feedback_alignment(forward)
    if rule.propagated:
        forward = grapes.propagated(forward, hidden, through_time=rule.through_time)
    return forward


def given(feedback):
    return {"feedback": feedback} if feedback else {}


class Linen:
    def __init__(self, net, rule):
        self.model, self.rngs = net.linen, {"dropout": jax.random.key(1)}
        self.forward = transformed(glinen, net.linen.apply, rule)
        x = jax.ShapeDtypeStruct(net.x, jnp.float32)
        variables = jax.eval_shape(self.model.init, {"params": KEY, **self.rngs}, x)
        self.params, self.feedback = shapes(variables["params"]), {}
        if rule.aligned or rule.direct:
            draw = functools.partial(self.draw, rngs=self.rngs)
            self.feedback = shapes(jax.eval_shape(draw, KEY, variables, x))

    def draw(self, key, variables, x, **kwargs):
        return glinen.init_feedback(key, self.forward, variables, x, **kwargs)

    def __call__(self, params, feedback, x):
        """The value of the model under the rule."""
        variables = {"params": unflatten_dict(params, sep="/")}
        return self.forward(variables, x, rngs=self.rngs, **given(feedback))

    @staticmethod
    def by_layer(tree, net):
        del net
        result = {}
        for path, leaf in tree.items():
            layer, name = path.rsplit("/", 1)
            result.setdefault(layer, {})[name] = leaf
        return result

    def dropout_mask(self, params, x):
        """What dropout multiplies by, where its input is not zero."""
        _, state = self.model.apply(
            {"params": unflatten_dict(params, sep="/")},
            x,
            rngs=self.rngs,
            capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
            mutable=["intermediates"],
        )
        (dropped,) = jax.tree.leaves(state)
        return 2.0 * (dropped > 0)


class Nnx:
    def __init__(self, net, rule):
        self.forward = transformed(gnnx, lambda model, x: model(x), rule)
        model = nnx.eval_shape(lambda: net.nnx(nnx.Rngs(0)))
        self.graph, self.state, self.rest = nnx.split(model, nnx.Param, ...)
        self.params, self.feedback = shapes(nnx.to_pure_dict(self.state)), {}
        if rule.aligned or rule.direct:
            x = jax.ShapeDtypeStruct(net.x, jnp.float32)
            draw = jax.eval_shape(lambda key: gnnx.init_feedback(key, self.forward, model, x), KEY)
            self.feedback = shapes(draw)

    def merged(self, params):
        def random_state(leaf):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return KEY if is_key else jnp.zeros(leaf.shape, leaf.dtype)

        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, unflatten_dict(params, sep="/"))
        return nnx.merge(self.graph, state, jax.tree.map(random_state, self.rest))

    def __call__(self, params, feedback, x):
        """The value of the model under the rule."""
        return self.forward(self.merged(params), x, **given(feedback))

    @staticmethod
    def by_layer(tree, net):
        """As layers of linen: the gates of fused layers apart."""
        result = {}
        for path, leaf in tree.items():
            layer, name = path.rsplit("/", 1)
            parts = (net.fused or {}).get(layer, (layer,))
            for part, piece in zip(parts, np.split(leaf, len(parts), axis=-1), strict=True):
                result.setdefault(part, {})[name] = piece
        return result

    def dropout_mask(self, params, x):
        return self.merged(params).dropout(jnp.ones((len(x), 12)))


FRAMEWORKS = {"linen": Linen, "nnx": Nnx}
both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


def values(shapes, seed):
    """Random arrays, of which float32 takes exact sums of products; nodes differ in strength."""
    rng = np.random.default_rng(seed)
    return {
        path: np.round(16 * rng.normal(size=shape)) / 16 * 2.0 ** rng.integers(-2, 1, shape[-1:])
        for path, shape in shapes.items()
    }


def value(shape, seed):
    return values({"": shape}, seed)[""]


def cast(tree, dtype=np.float32):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def arguments(run, net):
    """Parameters, feedback weights and input."""
    return cast((values(run.params, 0), values(run.feedback, 1), value(net.x, 2)), net.dtype)


# Optimization by the compiler takes longer than all the rest.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# Against backward passes by hand.


def check_gradients(framework, net, rule):
    run = FRAMEWORKS[framework](net, rule)
    params, feedback, x = values(run.params, 0), values(run.feedback, 1), value(net.x, 2)

    mask = fast_jit(run.dropout_mask)(*cast((params, x))) if rule.direct else None
    layers = run.by_layer(params, net)
    hand = net.by_hand(layers, np.asarray(mask)) if rule.direct else net.by_hand(layers)
    if rule.propagated:
        by_hand.modulate(hand, except_for=("output",), through_time=rule.through_time)
    for name, leaves in run.by_layer(feedback, net).items():
        setattr(hand.layers[name], "direct" if rule.direct else "back", leaves["kernel"])
    outputs = hand.forward(x)
    error = value(outputs.shape, 3)
    dx = hand.backward(error)

    @fast_jit
    def gradients(error, *args):
        outputs, pullback = jax.vjp(run, *args)
        return outputs, *pullback(error)

    def assert_close(actual, expected, scale=None):
        assert actual.dtype == net.dtype
        scale = np.abs(expected).max() if scale is None else scale
        tolerance = {np.float32: 5e-7, np.float64: 1e-12}[net.dtype]  # 4 units of float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)

    result = gradients(*cast((error, params, feedback, x), net.dtype))
    assert_close(result[0], outputs)
    assert_close(result[3], dx)
    gradient, feedback_gradient = (run.by_layer(tree, net) for tree in result[1:3])
    for name, layer in hand.layers.items():
        assert set(gradient[name]) == set(layer.gradients)
        for leaf, expected in layer.gradients.items():
            # Softmax does not see what all keys have in common: this gradient is zero.
            scale = 1.0 if (name, leaf) == ("key", "bias") else None
            assert_close(gradient[name][leaf], expected, scale)
    for name, leaves in feedback_gradient.items():
        expected = gradient[name]["kernel"] if rule.aligned == "kolen_pollack" else 0.0
        np.testing.assert_array_equal(leaves["kernel"], expected)


# A cell of fused gates is the same in linen, where it cannot be reached.
EVERY = [(f, name) for f in FRAMEWORKS for name in NETS if (f, name) != ("linen", "fused_lstm")]


@pytest.mark.parametrize(("framework", "name"), EVERY)
def test_propagated(framework, name):
    check_gradients(framework, NETS[name], Rule(propagated=True))


@pytest.mark.parametrize(("framework", "name"), [case for case in EVERY if case[1] in RECURRENT])
def test_propagated_through_time(framework, name):
    check_gradients(framework, NETS[name], Rule(propagated=True, through_time=True))


@pytest.mark.parametrize(("framework", "name"), EVERY)
def test_feedback_alignment_with_propagated(framework, name):
    check_gradients(framework, NETS[name], Rule(propagated=True, aligned="fixed"))


@both_frameworks
@pytest.mark.parametrize("name", ["dense", "conv_stride_valid", "conv_groups_same", "lstm"])
def test_feedback_alignment(framework, name):
    check_gradients(framework, NETS[name], Rule(aligned="fixed"))


@both_frameworks
@pytest.mark.parametrize("propagated", [False, True])
@pytest.mark.parametrize("name", ["dense", "simple"])
def test_kolen_pollack_gives_the_feedback_the_gradient_of_the_kernel(framework, name, propagated):
    check_gradients(framework, NETS[name], Rule(propagated=propagated, aligned="kolen_pollack"))


@both_frameworks
@pytest.mark.parametrize("propagated", [False, True])
def test_direct_feedback_alignment(framework, propagated):
    check_gradients(framework, DEEP, Rule(propagated=propagated, direct=True))


# The kernels that carry errors back.


@both_frameworks
@pytest.mark.parametrize("rule", SIGN_RULES)
def test_backward_kernel_of_the_sign_rules(framework, rule):
    run = FRAMEWORKS[framework](ONE_LAYER, Rule(aligned=rule))
    params, feedback, x = arguments(run, ONE_LAYER)
    feedback = {"output/kernel": 0.01 + jnp.square(feedback["output/kernel"])}
    kernel, weights = params["output/kernel"].at[0, 0].set(0), -feedback["output/kernel"]
    params, feedback = params | {"output/kernel": kernel}, {"output/kernel": weights}

    def backward_kernel(feedback):
        """The errors at x of errors at one node after the other."""
        _, pullback = jax.vjp(lambda x: run(params, feedback, x), x)
        return pullback(jnp.eye(len(x), dtype=x.dtype))[0].T

    draw = np.asarray(fast_jit(backward_kernel)(feedback))
    np.testing.assert_array_equal(np.sign(draw), np.sign(kernel))
    if rule == "uniform_sign":
        size = np.sqrt(np.square(weights).mean())
        np.testing.assert_allclose(draw, np.sign(kernel) * size, rtol=3e-7)
    else:
        np.testing.assert_array_equal(draw, np.sign(kernel) * np.abs(weights))


def test_random_signs_are_fixed_signs_drawn_anew():
    run = Linen(ONE_LAYER, Rule(aligned="fixed_sign"))
    params, _, x = arguments(run, ONE_LAYER)
    variables = {"params": unflatten_dict(params, sep="/")}

    @fast_jit
    @jax.vmap
    def backward_kernel(key):
        feedback = run.draw(key, variables, x)
        _, pullback = jax.vjp(lambda x: run(params, feedback, x), x)
        return pullback(jnp.eye(len(x), dtype=x.dtype))[0].T

    draws = np.asarray(backward_kernel(jax.random.split(KEY, 1000)))
    signs = np.broadcast_to(np.sign(params["output/kernel"]), draws.shape)
    np.testing.assert_array_equal(np.sign(draws), signs)
    # Uniform magnitudes with the root mean square of He's initialization.
    quantiles = np.linspace(0, 1, 9)
    magnitudes = np.abs(draws) / np.sqrt(6 / 5)
    np.testing.assert_allclose(np.quantile(magnitudes, quantiles), quantiles, atol=0.02)


@both_frameworks
def test_kolen_pollack_aligns_under_weight_decay(framework):
    net = NETS["dense"]
    run = FRAMEWORKS[framework](net, Rule(aligned="kolen_pollack"))
    params, feedback, x = arguments(run, net)
    target = cast(value((4, 3), 3))
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.2))

    def loss(weights):
        return jnp.square(run(*weights, x) - target).mean()

    @jax.jit
    def train(weights):
        def step(_, carry):
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
            return optax.apply_updates(weights, updates), state

        return jax.lax.fori_loop(0, 300, step, (weights, optimizer.init(weights)))[0]

    before = alignment(feedback, params)
    trained, aligned = train((params, feedback))
    after = alignment(aligned, trained)
    assert loss((trained, aligned)) < loss((params, feedback)) / 2
    for path in feedback:
        assert before[path].angle > 45
        assert after[path].angle < 5


# What no rule changes, and what is not kept.


FORWARD = [
    *(("dense", Rule(aligned=rule)) for rule in (*SIGN_RULES, "fixed", "kolen_pollack")),
    ("dense", Rule(propagated=True)),
    ("conv_groups_same", Rule(propagated=True, aligned="fixed")),
    ("attention", Rule(propagated=True, aligned="fixed")),
    ("simple", Rule(propagated=True, aligned="fixed")),
    ("dense", Rule(propagated=True, direct=True)),
]


@both_frameworks
@pytest.mark.parametrize(("name", "rule"), FORWARD)
def test_forward_pass_is_exact(framework, name, rule):
    net = NETS[name]
    run, plain = (FRAMEWORKS[framework](net, r) for r in (rule, Rule()))
    params, feedback, x = arguments(run, net)

    def outputs_and_loss(run, feedback):
        outputs = run(params, feedback, x)
        return outputs, jnp.square(outputs).mean()

    chex.assert_trees_all_equal(outputs_and_loss(run, feedback), outputs_and_loss(plain, {}))
    jitted = [jax.jit(functools.partial(outputs_and_loss, r)) for r in (run, plain)]
    chex.assert_trees_all_equal(jitted[0](feedback), jitted[1]({}))


def keeps(leaves, kernel):
    """Whether a kernel is among arrays, transposed or stacked too."""
    return any(np.isin(kernel, leaf).all() for leaf in leaves)


@both_frameworks
@pytest.mark.parametrize(
    ("name", "aligned"),
    [
        *(("dense", rule) for rule in (None, "fixed", "kolen_pollack", *SIGN_RULES)),
        *((name, rule) for name in ("conv_groups_same", "attention") for rule in (None, "fixed")),
        *(("lstm", rule) for rule in (None, "fixed")),
    ],
)
def test_feedback_alignment_does_not_keep_the_kernels(framework, name, aligned):
    net, rng = NETS[name], np.random.default_rng(0)
    run = FRAMEWORKS[framework](net, Rule(aligned=aligned))
    sizes = (run.params, run.feedback, {"x": net.x})
    args = [{p: rng.normal(size=s) for p, s in some.items()} for some in sizes]
    params, feedback, x = cast(args, net.dtype)

    @fast_jit
    def residuals(params, feedback, x):
        return jax.tree.leaves(jax.vjp(run, params, feedback, x)[1])

    leaves = residuals(params, feedback, x["x"])
    for path, kernel in params.items():
        if path.endswith("kernel"):
            assert keeps(leaves, kernel) == (aligned is None), path


# modulate_error by itself.


KERNEL = cast(value((5, 6), 0))
FACTOR = reference.factor(reference.node_importance(KERNEL, 0, 1), 1)


def test_forward_mode():
    z, dz = cast(value((4, 6), 1)), cast(value((4, 6), 2))
    primal, tangent = jax.jvp(lambda z: modulate_error(z, KERNEL), (z,), (dz,))
    np.testing.assert_array_equal(primal, z)
    np.testing.assert_allclose(tangent, FACTOR * dz, rtol=3e-7)


def test_second_derivative():
    z = cast(value((6,), 1))
    hessian = fast_jit(jax.hessian(lambda z: (modulate_error(z, KERNEL) ** 3).sum()))(z)
    np.testing.assert_allclose(hessian, np.diag(6 * z * FACTOR**2), rtol=1e-6)


def test_second_derivative_through_the_kernel():
    x = cast(value((5,), 1))

    def loss(kernel):
        return jnp.square(modulate_error(x @ kernel, kernel)).sum()

    # The factor is a constant of the step, in second derivatives too.
    hessian = fast_jit(jax.hessian(loss))(KERNEL)
    expected = np.einsum("i,k,j,jl->ijkl", x, x, 2 * FACTOR**2, np.eye(6))
    np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def modulated(kernel, x):
    return jnp.tanh(modulate_error(x @ kernel, kernel) / 8)


@pytest.mark.parametrize("case", ["modulate_error", *FRAMEWORKS])
def test_forward_and_reverse_mode_are_transposes(case):
    if case == "modulate_error":
        function, args = modulated, (KERNEL, cast(value((4, 5), 1)))
    else:
        net = NETS["dense"]
        run = FRAMEWORKS[case](net, Rule(propagated=True, aligned="fixed"))
        params, feedback, x = arguments(run, net)
        function, args = lambda params, x: run(params, feedback, x), (params, x)
    tangents = jax.tree.map(lambda leaf: cast(value(leaf.shape, 4)), args)
    error = cast(value(jax.eval_shape(function, *args).shape, 5))

    @fast_jit
    def derivatives(args, tangents, error):
        _, linear = jax.linearize(function, *args)
        forward = jax.jvp(function, args, tangents)[1], linear(*tangents)
        reverse = jax.vjp(function, *args)[1](error), jax.linear_transpose(linear, *args)(error)
        return forward, reverse

    forward, reverse = derivatives(args, tangents, error)
    chex.assert_trees_all_close(*forward, rtol=1e-6)
    chex.assert_trees_all_close(*reverse, rtol=1e-6)
    products = optax.tree.vdot(forward[0], error), optax.tree.vdot(tangents, reverse[0])
    np.testing.assert_allclose(*products, rtol=1e-5)
