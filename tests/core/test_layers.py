"""From a parameter tree to layers: names, descriptions, and what is said when they fail."""

import itertools
import warnings
from types import SimpleNamespace

import chex
import equinox as eqx
import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from grapes_optax import (
    DimensionNumbers,
    by_path,
    factors,
    infer_dimension_numbers,
    scale_by_grapes,
)

KEY = jax.random.key(0)


def random_like(tree, seed=1):
    """A tree of the same structure whose floating leaves are random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def updated(params, weight_dimension_numbers=None, **options):
    """Random updates before and after the transformation, as dicts by path."""
    params = random_like(params)
    updates = random_like(params, seed=2)
    transformation = scale_by_grapes(weight_dimension_numbers, **options)
    result, _ = transformation.update(updates, transformation.init(params), params)
    chex.assert_trees_all_equal_structs(result, updates)

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}

    return flat(params), flat(updates), flat(result)


def assert_modulated(params, expected, weight_dimension_numbers=None):
    """Checks each leaf: `expected` maps path to (fan-in, node axes) or to its kernel's path."""
    params, updates, result = updated(params, weight_dimension_numbers)
    assert set(expected) <= set(params)
    for path, before in updates.items():
        layout = expected.get(path)
        if layout is None:
            want = before
        elif isinstance(layout, str):
            reduction, output = expected[layout]
            importance = reference.node_importance(params[layout], reduction, output)
            factor = reference.factor(importance, np.size(output))
            want = before * factor.reshape(before.shape)
        else:
            want = reference.scale(before, params[path], *layout)
        np.testing.assert_allclose(result[path], want, rtol=2e-6, err_msg=path)


# linen


class Everything(nn.Module):
    @nn.compact
    def __call__(self, tokens, image):
        x = nn.Embed(11, 8)(tokens)
        x = nn.LayerNorm()(nn.Dense(6)(x))
        x = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, out_features=5)(x)
        x = nn.DenseGeneral((3, 4))(x)
        x = nn.DenseGeneral(7, axis=(-2, -1))(x)
        y = nn.Conv(8, (3, 3))(image)
        y = nn.BatchNorm(use_running_average=True)(y)
        y = nn.Conv(8, (3, 3), feature_group_count=4)(y)
        y = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False)(y)
        y = nn.ConvTranspose(6, (2, 2))(y)
        return x.mean() + y.mean()


LINEN = {
    "Dense_0/kernel": (0, 1),
    "Dense_0/bias": "Dense_0/kernel",
    **{
        f"MultiHeadDotProductAttention_0/{name}/{leaf}": layout
        for name in ("query", "key", "value")
        for leaf, layout in {
            "kernel": (0, (1, 2)),
            "bias": f"MultiHeadDotProductAttention_0/{name}/kernel",
        }.items()
    },
    "MultiHeadDotProductAttention_0/out/kernel": ((0, 1), 2),
    "MultiHeadDotProductAttention_0/out/bias": "MultiHeadDotProductAttention_0/out/kernel",
    "DenseGeneral_0/kernel": (0, (1, 2)),
    "DenseGeneral_0/bias": "DenseGeneral_0/kernel",
    "DenseGeneral_1/kernel": ((0, 1), 2),
    "DenseGeneral_1/bias": "DenseGeneral_1/kernel",
    "Conv_0/kernel": ((0, 1, 2), 3),
    "Conv_0/bias": "Conv_0/kernel",
    "Conv_1/kernel": ((0, 1, 2), 3),
    "Conv_1/bias": "Conv_1/kernel",
    "Conv_2/kernel": ((0, 1, 2), 3),
    "ConvTranspose_0/kernel": ((0, 1, 2), 3),
    "ConvTranspose_0/bias": "ConvTranspose_0/kernel",
}


@pytest.fixture(scope="module")
def linen_params():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tokens, image = jnp.zeros((2, 4), int), jnp.zeros((1, 8, 8, 3))
        return jax.eval_shape(Everything().init, KEY, tokens, image)["params"]


@pytest.mark.parametrize("container", [dict, flax.core.freeze])
def test_linen(linen_params, container):
    assert_modulated(container(linen_params), LINEN)


def test_linen_with_collections(linen_params):
    expected = {
        f"params/{path}": f"params/{layout}" if isinstance(layout, str) else layout
        for path, layout in LINEN.items()
    }
    assert_modulated({"params": linen_params}, expected)


def test_linen_partitioned():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = nn.Dense(7, kernel_init=init)
    params = jax.eval_shape(layer.init, KEY, jnp.ones((1, 5)))["params"]
    assert isinstance(params["kernel"], nn.Partitioned)
    assert_modulated(params, {"kernel/value": (0, 1), "bias": "kernel/value"})


def test_more_than_one_reading_is_left_alone():
    params = {"net": {"kernel": jnp.ones((4, 4, 4)), "bias": jnp.ones((4, 4))}}
    with pytest.warns(UserWarning, match=r"do not settle: net/kernel \(4, 4, 4\)") as record:
        assert by_path()(params) == {"net": {"kernel": None, "bias": None}}
    assert "weight_dimension_numbers=" in str(record[0].message)
    # The name of the module tells that it is a stack of Dense layers, but not along which axis.
    with pytest.warns(UserWarning, match=r"do not settle: Dense_0/kernel \(4, 4, 4\)"):
        by_path()({"Dense_0": params["net"]})
    assert_modulated(
        {"Dense_0": {"kernel": jnp.ones((4, 4, 5)), "bias": jnp.ones((4, 5))}},
        {"Dense_0/kernel": (1, 2), "Dense_0/bias": "Dense_0/kernel"},
    )


def test_shape_of_the_bias_tells_stacks_from_several_node_axes():
    params = {
        "stacked": {"kernel": jnp.ones((2, 5, 7)), "bias": jnp.ones((2, 7))},
        "general": {"kernel": jnp.ones((5, 3, 4)), "bias": jnp.ones((3, 4))},
    }
    expected = {
        "stacked/kernel": (1, 2),
        "stacked/bias": "stacked/kernel",
        "general/kernel": (0, (1, 2)),
        "general/bias": "general/kernel",
    }
    assert_modulated(params, expected)


def test_a_bias_of_another_shape_makes_a_stranger():
    strange = {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(3)}
    plain = {"kernel": jnp.ones((5, 7))}
    with pytest.warns(UserWarning, match=r"do not settle: strange/kernel \(5, 7\)"):
        assert_modulated({"strange": strange, "plain": plain}, {"plain/kernel": (0, 1)})


# nnx, Haiku, Equinox


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 7, rngs=rngs)])
        self.norm = nnx.LayerNorm(7, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 7, 12, rngs=rngs, decode=False)
        self.embed = nnx.Embed(11, 7, rngs=rngs)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 7, rngs=rngs)])
        self.norm = nnx.LayerNorm(7, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layers[1](jnp.tanh(self.layers[0](x))))


NNX = {
    "layers/0/kernel": (0, 1),
    "layers/0/bias": "layers/0/kernel",
    "layers/1/kernel": (0, 1),
    "layers/1/bias": "layers/1/kernel",
    "attention/query/kernel": (0, (1, 2)),
    "attention/query/bias": "attention/query/kernel",
    "attention/key/kernel": (0, (1, 2)),
    "attention/key/bias": "attention/key/kernel",
    "attention/value/kernel": (0, (1, 2)),
    "attention/value/bias": "attention/value/kernel",
    "attention/out/kernel": ((0, 1), 2),
    "attention/out/bias": "attention/out/kernel",
}


def with_suffix(expected, suffix):
    return {
        path + suffix: layout + suffix if isinstance(layout, str) else layout
        for path, layout in expected.items()
    }


def test_nnx_state():
    state = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    assert_modulated(state, with_suffix(NNX, "/value"))
    assert_modulated(nnx.to_pure_dict(state), NNX)


def test_nnx_optimizer():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Small(nnx.Rngs(0))
        before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        optimizer = nnx.Optimizer(
            model, optax.chain(scale_by_grapes(), optax.sgd(1.0)), wrt=nnx.Param
        )

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda model: (model(jnp.ones((2, 5))) ** 3).sum())(model)
            optimizer.update(model, grads)
            return grads

        grads = nnx.to_pure_dict(step(model, optimizer))
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for index in 0, 1:
        layer, old, new = (tree["layers"][index] for tree in (grads, before, after))
        expected = old["kernel"] - reference.scale(layer["kernel"], old["kernel"], 0, 1)
        np.testing.assert_allclose(new["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        after["norm"]["scale"], before["norm"]["scale"] - grads["norm"]["scale"], rtol=1e-6
    )


def test_haiku():
    def network(x, image, tokens):
        x = hk.nets.MLP([6, 7], name="mlp")(x + hk.Embed(11, 5)(tokens))
        x = hk.LayerNorm(-1, True, True)(x)
        y = hk.Conv2DTranspose(6, 3)(hk.Conv2D(4, 3, with_bias=False)(image))
        return x.mean() + y.mean()

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        inputs = jnp.ones((2, 5)), jnp.ones((1, 6, 6, 3)), jnp.zeros(2, int)
        params = jax.eval_shape(hk.transform(network).init, KEY, *inputs)
    expected = {
        "mlp/~/linear_0/w": (0, 1),
        "mlp/~/linear_0/b": "mlp/~/linear_0/w",
        "mlp/~/linear_1/w": (0, 1),
        "mlp/~/linear_1/b": "mlp/~/linear_1/w",
        "conv2_d/w": ((0, 1, 2), 3),
        "conv2_d_transpose/w": ((0, 1, 3), 2),
        "conv2_d_transpose/b": "conv2_d_transpose/w",
    }
    assert params["embed"]["embeddings"].ndim == 2
    assert_modulated(params, expected)


def test_equinox():
    def make():
        return {
            "mlp": eqx.nn.MLP(5, 2, 7, 1, key=KEY),
            "conv": eqx.nn.Conv2d(3, 4, 3, key=KEY),
            "back": eqx.nn.ConvTranspose2d(4, 6, 3, key=KEY),
            "tokens": eqx.nn.Embedding(11, 5, key=KEY),
            "scale": eqx.nn.LayerNorm((3, 4)),
            "linear": eqx.nn.Linear(5, 6, use_bias=False, key=KEY),
        }

    model = eqx.filter(eqx.filter_eval_shape(make), lambda x: hasattr(x, "shape"))
    expected = {"linear/weight": (1, 0)}
    for layer in "mlp/layers/0", "mlp/layers/1":
        expected |= {f"{layer}/weight": (1, 0), f"{layer}/bias": f"{layer}/weight"}
    for layer in "conv", "back":
        expected |= {f"{layer}/weight": ((1, 2, 3), 0), f"{layer}/bias": f"{layer}/weight"}
    assert_modulated(model, expected)


def test_pytree_without_names():
    @jax.tree_util.register_pytree_node_class
    class Pair:
        def __init__(self, *leaves):
            self.leaves = leaves

        def tree_flatten(self):
            return self.leaves, None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    params = Pair({"kernel": jnp.ones((5, 7))}, jnp.ones(3))
    assert_modulated(params, {"0/kernel": (0, 1)})


# Leaves without a name


@pytest.mark.parametrize(
    ("params", "seen"),
    [
        ({"a": jnp.ones((2, 3))}, "none of a (2, 3)."),
        ([jnp.ones((2, 3))], "none of 0 (2, 3)."),
        (jnp.ones((2, 3)), "none of (root) (2, 3)."),
    ],
)
def test_one_warning_if_nothing_is_recognised(params, seen):
    transformation = scale_by_grapes()
    with pytest.warns(UserWarning, match="GRAPES modulates nothing") as record:
        updates, _ = transformation.update(params, transformation.init(params), params)
    assert len(record) == 1
    for words in "grapes_optax.summary", "infer_dimension_numbers", seen:
        assert words in str(record[0].message)
    chex.assert_trees_all_equal(updates, params)


def test_warning_lists_what_it_saw_but_not_all():
    params = {f"leaf{i}": jnp.ones((2, 3)) for i in range(20)}
    with pytest.warns(UserWarning, match="leaf0 .*, leaf1 .*, [.]{3}[.]") as record:
        by_path()(params)
    assert "leaf9" not in str(record[0].message)


def test_where_that_selects_nothing():
    description = by_path(lambda path: "Dense" in path)
    for call in description, scale_by_grapes(description).init:
        with pytest.raises(ValueError, match=r"selects none .* there are kernel \(2, 3\)"):
            call({"kernel": jnp.ones((2, 3))})


@pytest.mark.parametrize(
    "params",
    [{}, (), None, {"a": jnp.ones(3)}, {"a": 1.0}, {"kernel": jnp.ones((2, 3), int)}, jnp.ones(())],
)
def test_nothing_to_say_without_a_matrix(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jax.tree.leaves(by_path()(params)) == []


# Descriptions

HIDDEN = {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}
PARAMS = {"hidden": HIDDEN, "output": {"kernel": jnp.ones((7, 3)), "bias": jnp.ones(3)}}
BY_HAND = {"hidden/kernel": (0, 1), "hidden/bias": "hidden/kernel"}
DENSE = DimensionNumbers(0, 1)


@pytest.mark.parametrize(
    "description",
    [
        {"hidden": DENSE, "output": None},
        {"hidden": {"kernel": DENSE, "bias": DENSE}, "output": None},
        {"hidden": optax.contrib.MuonDimensionNumbers(), "output": None},
        {"hidden": SimpleNamespace(reduction_axis=[-2], output_axis=np.int64(-1)), "output": None},
        {
            "hidden": {
                "kernel": DimensionNumbers(0, 1, group="x"),
                "bias": DimensionNumbers((), 0, group="x"),
            },
            "output": {"kernel": None, "bias": None},
        },
        lambda params: jax.tree.map(lambda x: None, params) | {"hidden": DENSE},
        by_path(where=lambda path: not path.startswith("output")),
        by_path(where=lambda path: not path.startswith("output"))(PARAMS),
    ],
)
def test_ways_to_describe(description):
    assert_modulated(PARAMS, BY_HAND, description)


def test_one_description_for_all():
    layers = {"a": {"kernel": jnp.ones((5, 7)), "bias": jnp.ones(7)}, "b": jnp.ones((2, 3))}
    expected = {"a/kernel": (1, 0), "b": (1, 0)}  # nodes first: the bias of 7 is not theirs
    assert_modulated(layers, expected, DimensionNumbers(1, 0))
    assert_modulated(layers["b"], {"": (0, 1)}, DENSE)


def test_none_leaves_the_bias_alone():
    description = {"hidden": {"kernel": DENSE, "bias": None}, "output": None}
    assert_modulated(PARAMS, {"hidden/kernel": (0, 1)}, description)


def test_description_as_a_module_of_equinox():
    linear = eqx.nn.Linear(5, 7, key=KEY)
    description = jax.tree.map(lambda x: DimensionNumbers(1, 0), linear)
    assert callable(description)
    assert_modulated(linear, {"weight": (1, 0), "bias": "weight"}, description)


def test_members_of_a_group_share_their_importance():
    params = {"w": jnp.ones((5, 7)), "u": jnp.ones((7, 7)), "c": jnp.ones((7, 1))}
    description = {
        "w": DimensionNumbers(0, 1, "z"),
        "u": DimensionNumbers(1, 0, "z"),
        "c": DimensionNumbers((), (0, 1), "z"),
    }
    params, updates, result = updated(params, description)
    importance = np.abs(params["w"]).sum(0) + np.abs(params["u"]).sum(1)
    factor = reference.factor(importance, 1)
    np.testing.assert_allclose(result["w"], updates["w"] * factor[None], rtol=1e-6)
    np.testing.assert_allclose(result["u"], updates["u"] * factor[:, None], rtol=1e-6)
    np.testing.assert_allclose(result["c"], updates["c"] * factor[:, None], rtol=1e-6)


def test_members_of_a_group_may_differ_in_type():
    group = DimensionNumbers(0, 1, "z")
    with jax.enable_x64(True):
        params = {"u": jnp.ones((5, 7), jnp.float32), "v": jnp.ones((3, 7), jnp.float64)}
        for order in ("u", "v"), ("v", "u"):
            _, updates, result = updated(
                {name: params[name] for name in order}, {"u": group, "v": group}
            )
            chex.assert_trees_all_equal_shapes_and_dtypes(result, updates)


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        ({"hidden": DENSE}, ValueError, "says nothing of output/bias"),
        (
            {"hidden": DENSE, "output": None, "third": DENSE},
            ValueError,
            "describes third, where they have no leaf",
        ),
        (
            {"hidden": {"kernel": {"deep": DENSE}, "bias": None}, "output": None},
            ValueError,
            "says nothing of hidden/kernel",
        ),
        ({"hidden": 0, "output": None}, TypeError, "holds 0 at hidden"),
        ({"hidden": "kernel", "output": None}, TypeError, "holds 'kernel' at hidden"),
        (
            {"hidden": DimensionNumbers(0, 2), "output": None},
            ValueError,
            "of hidden/kernel: output_axis=.* names axis 2, out of range for 2 axes",
        ),
        (DimensionNumbers(1, -1), ValueError, "of hidden/kernel: .*distinct axes"),
        (
            {"hidden": None, "output": {"kernel": DimensionNumbers((), 1), "bias": None}},
            ValueError,
            "output/kernel leave no fan-in",
        ),
        (
            {"hidden": None, "output": {"kernel": None, "bias": DimensionNumbers((), 0, "g")}},
            ValueError,
            "output/bias leave no fan-in",
        ),
        (
            {"hidden": None, "output": {"kernel": None, "bias": DENSE}},
            ValueError,
            "of output/bias: output_axis=.* names axis 1, out of range for 1 axes",
        ),
        (
            jax.tree.map(lambda x: DimensionNumbers(0, -1, "g") if x.ndim > 1 else None, PARAMS),
            ValueError,
            r"one group .* got {'hidden/kernel': \(7,\), 'output/kernel': \(3,\)}",
        ),
    ],
)
def test_descriptions_that_do_not_fit(description, error, message):
    transformation = scale_by_grapes(description)
    for update in transformation.update, jax.jit(transformation.update):
        with pytest.raises(error, match=message):
            update(PARAMS, transformation.init(PARAMS), PARAMS)


# Gates


def test_every_gate_has_its_own_maximum_and_a_short_bias_belongs_to_the_last():
    description = {
        "w": DimensionNumbers(0, 1, "z", gates=3),
        "u": DimensionNumbers(1, 0, "z", gates=3),
        "b": DimensionNumbers((), 0, "z"),
        "last": DimensionNumbers((), 0, "z"),
    }
    shapes = {"w": (5, 6), "u": (6, 2), "b": (6,), "last": (2,)}
    params, updates, result = updated(
        jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple)), description
    )
    importance = np.abs(params["w"]).sum(0) + np.abs(params["u"]).sum(1)
    factor = np.concatenate([reference.factor(s, 1) for s in np.split(importance, 3)])
    np.testing.assert_allclose(result["w"], updates["w"] * factor[None], rtol=1e-6)
    np.testing.assert_allclose(result["u"], updates["u"] * factor[:, None], rtol=1e-6)
    np.testing.assert_allclose(result["b"], updates["b"] * factor, rtol=1e-6)
    np.testing.assert_allclose(result["last"], updates["last"] * factor[4:], rtol=1e-6)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ((4, 4), "of u: 4 gates do not divide the last node axis, of 6 nodes"),
        ((0, 0), "of u: gates must be a positive int, got 0"),
        ((1.5, 1.5), "gates must be a positive int, got 1.5"),
        ((3, 2), "same number of gates, got {'u': 3, 'w': 2}"),
    ],
)
def test_gates_that_do_not_fit(gates, message):
    params = {"u": jnp.ones((2, 6)), "w": jnp.ones((5, 6))}
    description = {
        name: DimensionNumbers(0, 1, "z", gates=count)
        for name, count in zip(params, gates, strict=True)
    }
    with pytest.raises(ValueError, match=message):
        scale_by_grapes(description).update(params, optax.EmptyState(), params)


# Descriptions of parts, put together


def network(widths, seed):
    rng, sizes = np.random.default_rng(seed), itertools.pairwise(widths)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=size), jnp.float32),
            "bias": jnp.zeros(size[1]),
        }
        for i, size in enumerate(sizes)
    }


def apply(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    return x


@pytest.mark.parametrize("widths", [(5, 7, 3), (5, 6, 3)])
@pytest.mark.parametrize("way", ["names", "program"])
def test_descriptions_of_two_networks_in_one_tree(way, widths):
    params = {"actor": network((5, 7, 3), 1), "critic": network(widths, 2)}
    params = {"params": params | {"Dense_0": network((4, 7), 3)["Dense_0"]}}
    described = {"Dense_0": by_path()({"Dense_0": params["params"]["Dense_0"]})["Dense_0"]}
    for name in "actor", "critic":
        part = params["params"][name]
        described[name] = (
            by_path()(part)
            if way == "names"
            else infer_dimension_numbers(apply, part, jnp.ones((2, 5)), modulate_output=True)
        )
    expected = {
        f"params/{name}/{leaf}": (0, 1) if leaf == "kernel" else f"params/{name}/kernel"
        for name in ("Dense_0", *(f"{n}/Dense_{i}" for n in ("actor", "critic") for i in (0, 1)))
        for leaf in ("kernel", "bias")
    }
    assert_modulated(params, expected, {"params": described})


def test_a_layer_of_two_branches_keeps_its_label():
    kernels = {
        "Dense_0": {"kernel": jnp.ones((5, 7))},
        "Z": {"Dense_0": {"kernel": jnp.ones((5, 7))}},
    }
    described = infer_dimension_numbers(
        lambda p, x: jnp.tanh(x @ p["Dense_0"]["kernel"] + x @ p["Z"]["Dense_0"]["kernel"]),
        kernels,
        jnp.ones((2, 5)),
        modulate_output=True,
    )
    params, updates, result = updated({"part": kernels}, {"part": described})
    importance = sum(np.abs(np.asarray(kernel)).sum(0) for kernel in params.values())
    for path, update in updates.items():
        np.testing.assert_allclose(
            result[path], np.asarray(update) * reference.factor(importance, 1), rtol=1e-6
        )


def test_a_label_meets_no_path():
    params = {"cell": jnp.ones((4, 5)), "other": jnp.ones((4, 5))}
    described = {"cell": DimensionNumbers(), "other": DimensionNumbers(group="cell")}
    assert_modulated(params, {"cell": (0, 1), "other": (0, 1)}, described)
    params = random_like({"a/b": jnp.ones((4, 5)), "a": {"b": jnp.ones((4, 5))}})
    result = factors(params, DimensionNumbers())
    for kernel, factor in (params["a/b"], result["a/b"]), (params["a"]["b"], result["a"]["b"]):
        expected = reference.factor(np.abs(kernel).sum(0), 1)
        np.testing.assert_allclose(factor, expected, rtol=1e-6)
    twins = {"x/y": {"kernel": params["a/b"]}, "x": {"y": {"kernel": params["a/b"]}}}
    for call in (
        lambda: by_path()(twins),
        lambda: infer_dimension_numbers(
            lambda p, x: (x @ p["a/b"]) * (x @ p["a"]["b"]), params, jnp.ones((2, 4))
        ),
    ):
        with pytest.raises(ValueError, match="Two kernels have the path"):
            call()


def test_a_users_label_joins_the_layer_of_a_path():
    params = {"Dense_0": {"kernel": jnp.ones((5, 7))}, "recurrent": jnp.ones((7, 7))}
    described = by_path(lambda path: "Dense" in path)(params)
    described["recurrent"] = DimensionNumbers(0, 1, group="Dense_0/kernel")
    params, updates, result = updated(params, described)
    importance = sum(np.abs(np.asarray(kernel)).sum(0) for kernel in params.values())
    for path, update in updates.items():
        np.testing.assert_allclose(
            result[path], np.asarray(update) * reference.factor(importance, 1), rtol=1e-6
        )


def test_kernels_of_one_layer_have_one_stack():
    params = {"a": jnp.ones((3, 4, 5)), "b": jnp.ones((4, 3, 5))}
    described = {"a": DimensionNumbers(1, 2, "z"), "b": DimensionNumbers(0, (1, 2), "z")}
    with pytest.raises(ValueError, match=r"same stack, got {'a': \(3,\), 'b': \(\)}"):
        scale_by_grapes(described).init(params)
