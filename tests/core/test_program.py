"""What the traced program says about its parameters, against what was written down by hand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from programs import (
    FUSED,
    GATES,
    KEY,
    STEP,
    Layer,
    array,
    assert_layers,
    below,
    by_leaf,
    infer_all,
    one,
    split_after,
    split_before,
)

from grapes_optax import (
    infer_dimension_numbers,
    modulate_error,
    scale_by_grapes,
    summary,
)

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

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
    assert_layers(infer_all(wrap(function), FUSED, *STEP), [GATES])


def test_arrays_and_shapes_alike():
    arrays = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), (FUSED, *STEP))
    assert_layers(infer_all(split_after, *arrays), [GATES])


def test_flags_are_handed_on():
    def apply(params, x, train, mode="sum"):
        assert train is True
        return getattr(x @ params["w"], mode)()

    params = {"w": array(5, 7)}
    description = infer_all(apply, params, array(2, 5), True, "mean")
    assert_layers(description, [one("w", bias=None)])


def test_feeds_the_transformation_and_the_table():
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), FUSED)
    description = infer_all(split_after, params, *STEP)
    table = [line.split() for line in summary(params, description).splitlines()]
    assert [row[0] for row in table[1:]] == ["b", "u", "w"]
    assert all(row[-3:] == ["2.000", "2.000", "2.000"] for row in table[1:])
    updates, _ = scale_by_grapes(description).update(params, optax.EmptyState(), params)
    np.testing.assert_allclose(updates["b"], 2.0)


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        (
            lambda path: "hidden" in path,
            [Layer({"hidden/u": (0, 1), "hidden/w": (0, 1)}, {"hidden/b": 0}, 4)],
        ),
        (lambda path: path == "output/w", [one("output/w", bias="output/b")]),
        (lambda path: not path.endswith("b"), True),
    ],
)
def test_where(where, layers):
    """It is asked of kernels alone, by their paths without the collection."""
    params = {"params": {"hidden": FUSED, "output": {"w": array(7, 3), "b": array(3)}}}
    asked = []

    def apply(variables, x, h):
        p = variables["params"]
        return split_after(p["hidden"], x, h) @ p["output"]["w"] + p["output"]["b"]

    def noted(path):
        asked.append(path)
        return where(path)

    found = infer_all(apply, params, *STEP, where=noted)
    assert sorted(asked) == ["hidden/u", "hidden/w", "output/w"]
    whole = infer_all(apply, params, *STEP)
    if layers is True:
        assert found == whole
    else:
        assert_layers(found["params"], layers)


def test_where_selects_a_part_of_a_layer():
    with pytest.raises(ValueError, match=r"where selects u, but not w, .* select all or none"):
        infer_all(split_after, FUSED, *STEP, where=lambda path: path == "u")


def test_where_selects_nothing():
    with pytest.raises(ValueError, match=r"where selects none of the kernels: u, w[.]"):
        infer_all(split_after, FUSED, *STEP, where=lambda path: path == "b")


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
    assert_layers(infer_all(function, TWO, array(2, 5)), layers)


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
        r"(?<!; )w \(5, 7\): not used[.]",  # vectors may be the statistics of a norm
    ),
    "entries of one stack summed": (
        lambda p, x: jnp.tanh(x @ p["w"][0] + (2 * x) @ p["w"][1]),
        {"w": array(2, 5, 7)},
        r"w \(2, 5, 7\): summed with another entry of a stack",
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
        description = infer_all(function, params, array(2, 5))
    assert len(record) == 1
    assert record[0].filename == __file__
    assert not by_leaf(description)
    # What the user excludes needs no reason.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excluded = infer_all(
            lambda p, x: (function(p[0], x), x @ p[1]),
            (params, array(5, 7)),
            array(2, 5),
            where=lambda path: path == "1",
        )
    assert_layers(excluded, [one("1", bias=None)])


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
        found = by_leaf(infer_all(function, params, x))
    assert found.keys() == params.keys() - {"b"}


def test_warning_does_not_list_all():
    params = [array(5, 7) for _ in range(20)]
    with pytest.warns(UserWarning, match=r"7 \(5, 7\): not used; [.]{3}[.] Describe") as record:
        infer_all(lambda p, x: x, params, array(2, 5))
    assert "9 (5, 7)" not in str(record[0].message)


@pytest.mark.parametrize("params", [{}, (), None, {"count": array(dtype=jnp.int32)}])
def test_nothing_to_describe(params):
    assert not by_leaf(infer_all(lambda p, x: x, params, array(2, 5)))


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
        ({"stack": {"hidden/kernel": 1}}, "stack names axis 1, fan-in: hidden/kernel: 1"),
        ({"stack": {"hidden/kernel": 3}}, "axis 3, out of range for 3 axes: hidden/kernel: 3"),
        ({"stack": {"hidden": -3}}, "axis -3, out of range for 2 axes: hidden/bias: -3"),
        ({"stack": {"hidden": 0, "hidden/bias": 1}}, "do not correspond: .*: 1, .*: 0"),
        ({"stack": {"hidden/kernel": (0, 2)}}, "stack names all axes of nodes"),
    ],
)
def test_hints_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        infer_all(net, NET, array(3, 5), **options)


def test_hints_for_branches_and_leaves():
    one_of_two = infer_all(net, NET, array(3, 5), stack={"": 0}, gates={"": 1, "hidden/kernel": 7})
    assert_layers(one_of_two, below("hidden", one(fan_in=1, nodes=2, along=1, gates=7)))


def test_kernels_of_one_layer_with_different_hints():
    with pytest.raises(ValueError, match="gates do not divide 28 nodes: u: 2, w: 4"):
        infer_all(split_after, FUSED, *STEP, gates={"u": 2, "w": 4})


def test_arrays_only():
    params = {"w": array(5, 7), "activation": jnp.tanh}
    with pytest.raises(TypeError, match=r"tanh.* at activation: .*eqx.partition"):
        infer_all(lambda p, x: x @ p["w"], params, array(2, 5))


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
            return [jax.nn.sigmoid(gate) for gate in jnp.split(z, 4)]

        described = infer_all(gates, params, array(5), array(3))
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


# What is passed, and what is not.

ALONG = {"w": array(5, 7), "b": array(7), "v": array(7, 3), "table": array(9, 5)}
CONSTANT = np.ones((2, 5), np.float32)


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda p: network(p, CONSTANT), ()),
        (lambda p: network(p, jnp.linspace(0.0, 1.0, 5)), ()),
        (lambda p: network(p, p["table"][np.arange(2)]), ()),
        (lambda p: p["table"][np.arange(2)], ()),
        (lambda p, n: network(p, jnp.full(5, n)), (3.0,)),
        (lambda p, train: network(p, CONSTANT), (True,)),
        (lambda p, x: network(p, CONSTANT), (array(2, 5),)),
        (lambda p, x: (network(p, CONSTANT), x), (array(2, 5),)),
        (lambda p, key: network(p, CONSTANT) + jax.random.normal(key, (2, 3)), (KEY,)),
    ],
)
def test_inputs_that_are_not_passed(function, inputs):
    with pytest.raises(ValueError, match=r"No kernel is multiplied by an input: .* as an argument"):
        infer_dimension_numbers(function, ALONG, *inputs)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        # The way out for a function without inputs: its constant as an argument.
        (network, (CONSTANT,)),
        (lambda p, n: network(p, jnp.full(5, n)), (jnp.float32(3),)),
        (lambda p, key: network(p, jax.random.normal(key, (2, 5))), (KEY,)),
        (lambda p, inputs: network(p, inputs["x"]), ({"x": array(2, 5), "train": True},)),
        # A part of the network may see constants alone.
        (
            lambda p, x: x @ p["w"] + (jnp.tanh(jnp.linspace(0.0, 1.0, 7) @ p["v"])).sum(),
            (array(2, 5),),
        ),
    ],
)
def test_inputs_that_are_passed(function, inputs):
    params = {k: v for k, v in ALONG.items() if k != "table"}
    found = by_leaf(infer_all(lambda p, *x: function(p, *x) + p["b"].sum(), params, *inputs))
    assert (found["w"][:2], found["v"][:2]) == (((0,), (1,)), ((0,), (1,)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, ALONG), {}, TypeError, "apply_fn must be a function, got None"),
        (({"w": 1}, ALONG), {}, TypeError, "apply_fn must be a function, got {'w': 1}"),
        ((network, "params"), {}, TypeError, "params hold 'params' at .root."),
        ((network, {"w": 3.0}), {}, TypeError, "params hold 3.0 at w: pass arrays alone"),
        (
            (network, ALONG),
            {"where": "output"},
            TypeError,
            "where must be a function, got 'out",
        ),
        ((network, ALONG), {"gates": 4}, TypeError, "gates must map paths to numbers, .* got 4"),
        ((network, ALONG), {"stack": 0}, TypeError, "stack must map paths to numbers, .* got 0"),
        ((network, ALONG), {"stack": ["w"]}, TypeError, r"stack must map paths .* got \['w'\]"),
        ((network, ALONG), {"stack": {"w": "0"}}, TypeError, "stack of w must be an int .* '0'"),
        ((network, ALONG), {"stack": {"w": (0.5,)}}, TypeError, "stack of w must be an int"),
        ((network, ALONG), {"gates": {"w": "4"}}, TypeError, "gates of w must be an int, got '4'"),
        ((network, ALONG), {"gates": {"": 1.0}}, TypeError, "gates of .root. must be an int"),
        ((network, ALONG), {"gates": {3: 4}}, TypeError, "gates must map paths to numbers"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, options, error, message):
    with pytest.raises(error, match=message):
        infer_dimension_numbers(*arguments, array(2, 5), **options)
