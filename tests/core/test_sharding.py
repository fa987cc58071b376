"""Parameters that lie on many devices: the numbers of one device, and what is sent between them."""

import contextlib
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from grapes_optax import (
    DimensionNumbers,
    alignment,
    factors,
    importance_factor,
    modulate_error,
    node_importance,
    scale_by_grapes,
    scale_by_outgoing_importance,
    sharded,
    summary,
)
from grapes_optax.linen import feedback_alignment, init_feedback, propagated

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape) * RNG.gamma(1, size=shape[-1]), jnp.float32)


def mesh_of(kind, sizes=(4, 2)):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(kind,) * len(sizes))


# A dense layer, a stack of them, the heads of an attention, and a fused cell whose four gates do
# not divide evenly over eight devices.
PARAMS = {
    "Dense_0": {"kernel": normal(64, 48), "bias": normal(48)},
    "layers": {"kernel": normal(8, 16, 24), "bias": normal(8, 24)},
    "query": {"kernel": normal(16, 8, 2), "bias": normal(8, 2)},
    "lstm": {
        "dense_i": {"kernel": normal(8, 96)},
        "dense_h": {"kernel": normal(24, 96), "bias": normal(96)},
    },
}
STACK = DimensionNumbers(1, 2, "layers")
NUMBERS = {
    "Dense_0": {"kernel": DimensionNumbers(0, 1, "a"), "bias": DimensionNumbers((), 0, "a")},
    "layers": {"kernel": STACK, "bias": STACK._replace(reduction_axis=(), output_axis=1)},
    "query": {
        "kernel": DimensionNumbers(0, (1, 2), "q"),
        "bias": DimensionNumbers((), (0, 1), "q"),
    },
    "lstm": {
        "dense_i": {"kernel": DimensionNumbers(0, 1, "lstm", 4)},
        "dense_h": {
            "kernel": DimensionNumbers(0, 1, "lstm", 4),
            "bias": DimensionNumbers((), 0, "lstm"),
        },
    },
}
# Fan-in and nodes of every kernel, and of the biases; the stack last.
LAYOUTS = {
    "fan-in": ("x", None, None, None),
    "nodes": (None, "x", "x", None),
    "nodes, biases whole": (None, "x", None, None),
    "both": ("y", "x", "x", None),
    "nodes over all": (None, ("x", "y"), None, None),
    "stack and nodes": (None, "y", "y", "x"),
}


def specs_of(layout):
    fan_in, nodes, biases, stack = LAYOUTS[layout]
    return {
        "Dense_0": {"kernel": P(fan_in, nodes), "bias": P(biases)},
        "layers": {"kernel": P(stack, fan_in, nodes), "bias": P(stack, biases)},
        "query": {"kernel": P(fan_in, nodes), "bias": P(biases)},
        "lstm": {
            "dense_i": {"kernel": P(fan_in, nodes)},
            "dense_h": {"kernel": P(fan_in, nodes), "bias": P(biases)},
        },
    }


OPTIONS = {
    "default": {},
    "mean of the layer": {"normalization": "mean", "bounds": None},
    "control mean": {"control": "mean"},
    "control roll": {"control": "roll"},
    "control reverse": {"control": "reverse"},
    "control norm": {"control": "norm"},
}
all_layouts = pytest.mark.parametrize("layout", LAYOUTS)
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def placed(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def update(tx, params):
    return tx.update(params, tx.init(params), params)[0]


def assert_same(actual, expected):
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
    jax.tree.map(close, actual, expected)


# Under jit


def sent(compiled):
    """What a compiled program sends between devices: name and elements of every collective."""
    pattern = (
        r" = (.+?) (all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
    )
    for shapes, name in re.findall(pattern, compiled.as_text()):
        sizes = [s.split(",") if s else [] for s in re.findall(r"\[([\d,]*)\]", shapes)]
        yield name, sum(math.prod(map(int, size)) for size in sizes)


@all_layouts
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("context", ["set_mesh", "arrays alone"])
def test_numbers_and_shardings_under_jit(layout, kind, context):
    mesh, specs = mesh_of(kind), specs_of(layout)
    tx = scale_by_grapes(NUMBERS)
    params = placed(PARAMS, specs, mesh)
    # Where axes are automatic and a bias is whole beside divided nodes, XLA is free to divide it.
    free = kind == AxisType.Auto and LAYOUTS[layout][1] and not LAYOUTS[layout][2]
    out = jax.tree.map(lambda leaf: leaf.sharding, params) if free else None
    step = jax.jit(functools.partial(update, tx), out_shardings=out)
    with jax.set_mesh(mesh) if context == "set_mesh" else contextlib.nullcontext():
        actual, compiled = step(params), step.lower(params).compile()
    assert_same(actual, update(tx, PARAMS))
    for leaf, original in zip(jax.tree.leaves(actual), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(original.sharding, leaf.ndim)
    largest = max(48, 8 * 24, 96)  # node vectors, of a stack the longest
    assert all(elements <= 4 * largest for _, elements in sent(compiled))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@all_options
def test_options_under_jit(kind, options):
    mesh, tx = mesh_of(kind), scale_by_grapes(NUMBERS, **options)
    params = placed(PARAMS, specs_of("both"), mesh)
    with jax.set_mesh(mesh):
        assert_same(jax.jit(functools.partial(update, tx))(params), update(tx, PARAMS))


def test_one_reduction_of_sums_and_one_of_maxima():
    mesh = mesh_of(AxisType.Auto)
    layers = {f"Dense_{i}": {"kernel": normal(64, 64), "bias": normal(64)} for i in range(6)}
    specs = {name: {"kernel": P("x", "y"), "bias": P("y")} for name in layers}
    step = jax.jit(functools.partial(update, scale_by_grapes()))
    names = [name for name, _ in sent(step.lower(placed(layers, specs, mesh)).compile())]
    assert 1 <= len(names) <= 2
    assert set(names) == {"all-reduce"}


def test_updates_that_are_sharded_unlike_the_parameters():
    mesh = mesh_of(AxisType.Auto)
    params = {"Dense_0": {"kernel": normal(64, 64), "bias": normal(64)}}
    specs = {"Dense_0": {"kernel": P("x", "y"), "bias": P("x")}}
    tx = scale_by_grapes()
    step = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    for mine, others in ((specs, P()), (P(), specs)):
        given = [placed(params, jax.tree.broadcast(spec, params), mesh) for spec in (mine, others)]
        assert_same(step(*given), update(tx, params))
        for _, elements in sent(step.lower(*given).compile()):
            assert elements <= 64


@pytest.mark.parametrize("rule", ["propagated", "both"])
@pytest.mark.parametrize("spec", [P("x", None), P(None, "y"), P("x", "y"), P("y", "x")], ids=str)
def test_the_backward_pass_under_jit(rule, spec):
    mesh = mesh_of(AxisType.Auto)
    model, x = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(24)]), normal(8, 16)
    params = model.init(jax.random.key(0), x)
    forward, kwargs = propagated(model.apply, lambda path: "layers_0" in path), {}
    if rule == "both":
        forward = feedback_alignment(forward)
        kwargs = {"feedback": init_feedback(jax.random.key(1), forward, params, x)}

    def loss(params, x, kwargs):
        return jnp.square(forward(params, x, **kwargs)).sum()

    def specs(tree):
        return jax.tree.map(lambda leaf: spec if leaf.ndim == 2 else P(), tree)

    right = jax.grad(loss)(params, x, kwargs)
    step = jax.jit(jax.grad(loss))
    with jax.set_mesh(mesh):
        given = placed(params, specs(params), mesh), placed(kwargs, specs(kwargs), mesh)
        actual = step(given[0], jax.device_put(x, NamedSharding(mesh, P("x"))), given[1])
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_the_backward_pass_on_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    hidden, output, x = nn.Dense(16), nn.Dense(4), normal(8, 16)
    params = hidden.init(jax.random.key(0), x), output.init(jax.random.key(1), x)

    def loss(params, x, gather=lambda h: h):
        h = propagated(hidden.apply)(params[0], x)
        return jnp.square(output.apply(params[1], gather(nn.relu(h)))).sum()

    right = jax.grad(loss)(params, x)
    columns = {"params": {"kernel": P(None, "y"), "bias": P("y")}}
    with jax.set_mesh(mesh):
        first = placed(params[0], columns, mesh)
        second = jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P())), params[1]
        )
        x = jax.device_put(x, NamedSharding(mesh, P("x")))
        gather = functools.partial(reshard, out_shardings=P("x"))
        actual = jax.jit(lambda params, x: jax.grad(loss)(params, x, gather))((first, second), x)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


# Inside shard_map


def in_shard_map(function, specs, check_vma=True, out=None):
    mesh = mesh_of(AxisType.Auto)
    out = specs if out is None else out
    options = {"mesh": mesh, "in_specs": (specs,), "out_specs": out, "check_vma": check_vma}
    return jax.jit(jax.shard_map(function, **options))


@all_layouts
@all_options
@pytest.mark.parametrize("check_vma", [True, False])
def test_numbers_inside_shard_map(layout, options, check_vma):
    specs = specs_of(layout)
    tx = scale_by_grapes(sharded(NUMBERS, specs), **options)
    tx.init(PARAMS)  # outside, of the whole arrays
    actual = in_shard_map(functools.partial(update, tx), specs, check_vma)(PARAMS)
    assert_same(actual, update(scale_by_grapes(NUMBERS, **options), PARAMS))


def test_names_are_read_of_the_whole_arrays():
    # The part of the kernel is square, and the bias no longer fits its nodes.
    params = {"Dense_0": {"kernel": normal(16, 64), "bias": normal(64)}}
    specs = {"Dense_0": {"kernel": P(None, "x"), "bias": P()}}
    tx = scale_by_grapes(sharded(None, specs))
    actual = in_shard_map(functools.partial(update, tx), specs)(params)
    assert_same(actual, update(scale_by_grapes(), params))


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_number_of_a_part_is_wrong_and_refused(check_vma):
    kernel = jax.random.normal(jax.random.key(0), (64, 16))
    params, specs = {"kernel": kernel}, {"kernel": P("x")}
    right = update(scale_by_grapes(), params)["kernel"]
    parts = jnp.split(params["kernel"], 4)
    wrong = [update(scale_by_grapes(), {"kernel": part})["kernel"] for part in parts]
    assert np.abs(jnp.concatenate(wrong) / right - 1).max() > 0.1
    claimed = scale_by_grapes(sharded(None, P()))  # who says that a part is whole, gets its number
    actual = in_shard_map(functools.partial(update, claimed), specs, check_vma)(params)
    assert_same(actual["kernel"], jnp.concatenate(wrong))
    step = in_shard_map(functools.partial(update, scale_by_grapes()), specs, check_vma)
    with pytest.raises(ValueError, match=r"may be a part of one here, divided over the axes .*'x'"):
        step(params)


def test_every_reader_of_kernels_refuses_a_part():
    kernel = normal(64, 64)
    outgoing = scale_by_outgoing_importance(["a", "b"])
    readers = {
        "node_importance": node_importance,
        "importance_factor": importance_factor,
        "modulate_error": lambda kernel: modulate_error(kernel, kernel),
        "factors": lambda kernel: factors({"kernel": kernel})["kernel"],
        "outgoing": lambda kernel: update(outgoing, {"a": kernel.T, "b": kernel})["a"],
        "propagated": lambda kernel: propagated(nn.Dense(kernel.shape[1]).apply)(
            {"params": {"kernel": kernel, "bias": kernel[0]}}, kernel.T
        ),
    }
    for reader in readers.values():
        with pytest.raises(ValueError, match="may be a part of one here"):
            in_shard_map(reader, P("x"), out=P("x"))(kernel)


def test_whole_kernels_need_no_word():
    # Data parallel: the parameters are the same on all devices, and JAX follows that.
    tx = scale_by_grapes(NUMBERS)
    actual = in_shard_map(functools.partial(update, tx), P())(PARAMS)
    assert_same(actual, update(tx, PARAMS))


def test_pmap_needs_a_word():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), PARAMS)
    with pytest.raises(ValueError, match="may be a part of one here"):
        jax.pmap(functools.partial(update, scale_by_grapes(NUMBERS)))(stacked)
    actual = jax.pmap(functools.partial(update, scale_by_grapes(sharded(NUMBERS, P()))))(stacked)
    assert_same(actual, jax.vmap(functools.partial(update, scale_by_grapes(NUMBERS)))(stacked))


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P("x", "y"), P(None, ("y", "x"))], ids=str)
def test_bare_arrays_inside_shard_map(spec):
    kernel = np.asarray(normal(16, 8))
    numbers = DimensionNumbers(spec=spec)
    nodes = P(*spec[1:])
    importance = reference.node_importance(kernel, 0, 1)
    actual = in_shard_map(
        functools.partial(node_importance, weight_dimension_numbers=numbers), spec, out=nodes
    )
    np.testing.assert_allclose(actual(kernel), importance, rtol=1e-6)
    actual = in_shard_map(
        functools.partial(importance_factor, weight_dimension_numbers=numbers), spec, out=nodes
    )
    np.testing.assert_allclose(actual(kernel), reference.factor(importance, 1), rtol=1e-6)


class Columns(nn.Dense):
    """Its nodes are divided over devices."""


class Rows(nn.Dense):
    """Its fan-in is divided over devices, and its values are partial sums."""


def test_the_propagated_form_of_tensor_parallel_layers():
    hidden, output = Columns(4, use_bias=False), Rows(8, use_bias=False)
    kernels = normal(16, 16), normal(16, 8)  # of which a device holds four columns, four rows
    x = normal(5, 16)
    layers = {
        Columns: DimensionNumbers(spec=P(None, "x")),
        Rows: DimensionNumbers(spec=P("x", None)),
    }

    def network(params, x):
        h = jnp.tanh(hidden.apply({"params": {"kernel": params[0]}}, x))
        return jax.lax.psum(output.apply({"params": {"kernel": params[1]}}, h), "x")

    def loss(params, x):
        return jnp.square(propagated(network, layers=layers)(params, x)).sum()

    specs = P(None, "x"), P("x", None)
    mesh = mesh_of(AxisType.Auto)
    gradient = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(specs, P()), out_specs=specs)
    actual = jax.jit(gradient)(kernels, x)

    h = np.tanh(x @ kernels[0])
    one, two = (reference.factor(reference.node_importance(k, 0, 1), 1) for k in kernels)
    error = 2 * (h @ kernels[1]) * two
    back = error @ kernels[1].T * (1 - h**2) * one
    for a, b in zip(actual, (x.T @ back, h.T @ error), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_means_over_parts_are_refused():
    kernel, x = normal(16, 16), normal(5, 16)

    def aligned(layers):
        rule = feedback_alignment(nn.Dense(4, use_bias=False).apply, rule="uniform_sign", **layers)
        return lambda kernel: rule({"params": {"kernel": kernel}}, x, feedback={"kernel": kernel})

    divided = {"layers": {nn.Dense: DimensionNumbers(spec=P(None, "x"))}}
    refused = (
        (aligned({}), "may be a part of one here"),
        (aligned(divided), "divided over devices, and rule='uniform_sign'"),
        (lambda kernel: alignment({"w": kernel}, {"w": kernel})["w"].angle, "may be a part of one"),
    )
    for function, message in refused:
        with pytest.raises(ValueError, match=message):
            in_shard_map(function, P(None, "x"))(kernel)


def test_sizes_are_those_of_the_whole_arrays():
    specs, said = specs_of("both"), []

    def tell(params):
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        said.append(summary(shapes, sharded(NUMBERS, specs)))
        return params

    in_shard_map(tell, specs)(PARAMS)
    (row,) = [line.split() for line in said[0].splitlines() if "dense_h/kernel" in line]
    assert row[-3:] == ["24", "96", "4"]  # fan-in, nodes, gates


WRONG = {
    "nothing of a leaf": ({"other": P()}, ValueError, "say nothing of kernel"),
    "too many entries": (P("x", None, None), ValueError, "more entries than the array has axes, 2"),
    "no axis of the mesh": (P("z"), ValueError, "names 'z'; the axes of the mesh are"),
}


@pytest.mark.parametrize(("specs", "error", "message"), WRONG.values(), ids=WRONG)
def test_specs_that_do_not_fit(specs, error, message):
    tx = scale_by_grapes(sharded(None, specs))
    with pytest.raises(error, match=message):
        in_shard_map(functools.partial(update, tx), P("x"))({"kernel": normal(64, 16)})


def test_what_is_no_spec():
    for specs in ({"kernel": "x"}, None, ("x", None)):
        with pytest.raises(TypeError, match=r"specs must be a jax.sharding.PartitionSpec"):
            sharded(None, specs)
    with pytest.raises(TypeError, match=r"spec must be a jax.sharding.PartitionSpec, got 'x'"):
        node_importance(normal(4, 4), DimensionNumbers(spec="x"))
    twice = scale_by_grapes(sharded(DimensionNumbers(spec=P("x")), P("x")))
    with pytest.raises(ValueError, match="kernel has a spec in its description too"):
        twice.init({"kernel": normal(64, 16)})
