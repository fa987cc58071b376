"""Cells, stacks, evidence beside the names: what by_path reads, and what it leaves open."""

import itertools
import warnings

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import test_program_cells
import test_program_layers
import test_program_models
from flax import nnx
from programs import assert_layers, inferred

from grapes_optax import DimensionNumbers, by_path, scale_by_grapes, summary

KEY = jax.random.key(0)
CASES = test_program_layers.CASES | test_program_cells.CASES | test_program_models.CASES


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def factors(params, description=None):
    """What becomes of updates of 1: the factor of every weight."""
    ones = jax.tree.map(jnp.ones_like, params)
    return scale_by_grapes(description).update(ones, (), params)[0]


# The same cell, its gates in one kernel and in many

RNG = np.random.default_rng(0)
KERNELS = {gate: RNG.normal(size=(5, 7)) * RNG.gamma(1, size=7) for gate in "abcd"}
CARRIES = {gate: RNG.normal(size=(7, 7)) * RNG.gamma(1, size=7) for gate in "abcd"}


def fused(order, axis=1):
    pair = [np.concatenate([part[gate] for gate in order], 1) for part in (KERNELS, CARRIES)]
    return [jnp.asarray(kernel if axis else kernel.T, jnp.float32) for kernel in pair]


def expected(order):
    gates = [np.abs(KERNELS[gate]).sum(0) + np.abs(CARRIES[gate]).sum(0) for gate in order]
    return np.concatenate([reference.factor(importance, 1) for importance in gates])


def unfused_linen(kind):
    def cell(*pairs):
        leaves = {}
        for gate, (read, carried) in zip("abcd", pairs, strict=False):
            leaves[read] = {"kernel": jnp.asarray(KERNELS[gate], jnp.float32)}
            leaves[carried] = {
                "kernel": jnp.asarray(CARRIES[gate], jnp.float32),
                "bias": jnp.zeros(7),
            }
        return leaves

    return cell(*zip(*kind, strict=True))


@pytest.mark.parametrize(
    ("read", "carried"),
    [
        (("i",), ("h",)),
        (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
        (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")),
        (("ir", "iz", "in"), ("hr", "hz", "hn")),
        (("if", "in"), ("hf", "hn")),
    ],
)
def test_unfused_cells(read, carried):
    params = {"cell": unfused_linen((read, carried))}
    result = factors(params)["cell"]
    for gate, i, h in zip("abcd", read, carried, strict=False):
        want = expected(gate)
        np.testing.assert_allclose(result[i]["kernel"], np.tile(want, (5, 1)), rtol=1e-6)
        np.testing.assert_allclose(result[h]["kernel"], np.tile(want, (7, 1)), rtol=1e-6)
        np.testing.assert_allclose(result[h]["bias"], want, rtol=1e-6)


@pytest.mark.parametrize("order", ["abcd", "abc", "ab"])
def test_fused_cells_have_the_factors_of_unfused_ones(order):
    nodes, want = 7 * len(order), expected(order)
    read, carried = fused(order)
    cells = {
        "nnx": {
            "dense_i": {"kernel": read},
            "dense_h": {"kernel": carried, "bias": jnp.zeros(nodes)},
        },
        "haiku": {"w_i": read, "w_h": carried, "b": jnp.zeros(nodes)},
        "equinox": {
            "weight_ih": read.T,
            "weight_hh": carried.T,
            "bias": jnp.zeros(nodes),
            "bias_n": jnp.zeros(7),
        },
    }
    if order == "abcd":
        cells["haiku/lstm/linear"] = {"w": jnp.concatenate([read, carried]), "b": jnp.zeros(nodes)}
    for name, result in factors(cells).items():
        for path, factor in jax.tree_util.tree_leaves_with_path(result):
            matrix = np.atleast_2d(factor.T if name == "equinox" else factor)
            own = want[-7:] if "bias_n" in jax.tree_util.keystr(path) else want
            np.testing.assert_allclose(matrix, np.tile(own, (len(matrix), 1)), rtol=1e-6)


def test_convolutional_cell():
    cell, x = nn.ConvLSTMCell(7, (3, 3)), jnp.ones((2, 6, 6, 5))
    params = jax.eval_shape(
        lambda: cell.init(KEY, cell.initialize_carry(KEY, x.shape), x)["params"]
    )
    description = by_path()(params)
    assert description["hh"]["kernel"] == DimensionNumbers((0, 1, 2), (3,), "hh/kernel", 4)
    assert description["hh"]["bias"] == DimensionNumbers((), (0,), "hh/kernel")


def test_stacked_cells():
    keys = jax.random.split(KEY, 3)
    cells = {
        "equinox": eqx.filter_vmap(lambda key: eqx.nn.GRUCell(5, 7, key=key))(keys),
        "nnx": nnx.to_pure_dict(
            nnx.state(nnx.vmap(lambda key: nnx.LSTMCell(5, 7, rngs=nnx.Rngs(key)))(keys), nnx.Param)
        ),
    }
    single = {
        "equinox": eqx.nn.GRUCell(5, 7, key=keys[1]),
        "nnx": nnx.to_pure_dict(nnx.state(nnx.LSTMCell(5, 7, rngs=nnx.Rngs(keys[1])), nnx.Param)),
    }
    got, want = factors(cells), factors(single)
    for stacked, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(stacked[1], one, rtol=1e-6)


def test_names_of_a_cell_without_its_shapes():
    # The carry of 7 features cannot have 9 nodes: no cell, two layers.
    params = {"i": {"kernel": jnp.ones((5, 9))}, "h": {"kernel": jnp.ones((7, 9))}}
    described = by_path()(params)
    assert described["i"]["kernel"] == DimensionNumbers((0,), (1,), "i/kernel")
    assert described["h"]["kernel"] == DimensionNumbers((0,), (1,), "h/kernel")


def test_kernels_of_one_layer_are_not_parted():
    params = {"cell": unfused_linen((("i",), ("h",)))}
    with pytest.raises(ValueError, match="selects cell/h/kernel and not cell/i/kernel"):
        by_path(lambda path: path != "cell/i/kernel")(params)


def test_a_user_describes_one_leaf_otherwise():
    params = {"cell": unfused_linen((("i",), ("h",))), "Dense_0": {"kernel": jnp.ones((2, 3))}}
    description = by_path()(params)
    description["Dense_0"]["kernel"] = DimensionNumbers(1, 0)
    description["cell"]["h"]["bias"] = None
    result = factors(params, description)
    np.testing.assert_allclose(result["cell"]["h"]["kernel"][0], expected("a"), rtol=1e-6)
    assert (result["cell"]["h"]["bias"] == 1).all()
    assert description["Dense_0"]["kernel"].group is None


# What names and biases settle, and what they do not

DENSE = {"kernel": (5, 7), "bias": (7,)}


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.parametrize(
    ("module", "leaves", "reduction", "output", "bias_output"),
    [
        ("x", {"kernel": (5, 3, 7), "bias": (7, 3)}, (0,), (2,), (0,)),  # nn.scan along axis 1
        ("x", {"kernel": (3, 5, 7), "bias": (3, 7)}, (1,), (2,), (1,)),
        ("x", {"kernel": (3, 2, 5, 7), "bias": (3, 7)}, (1, 2), (3,), (1,)),  # convolutions
        ("x", {"kernel": (3, 2, 5, 7), "bias": (3, 2, 7)}, (2,), (3,), (2,)),  # ConvLocal
        ("x", {"kernel": (3, 3, 7, 5), "bias": (7,)}, (0, 1, 3), (2,), (0,)),  # transposed
        ("x", {"kernel": (3, 3, 7, 7), "bias": (7,)}, (0, 1, 2), (3,), (0,)),
        ("conv", {"kernel": (3, 3, 5, 7)}, (0, 1, 2), (3,), None),
        ("ConvTranspose_0", {"kernel": (3, 3, 7, 5), "bias": (7,)}, (0, 1, 3), (2,), (0,)),
        ("ConvTranspose_0", {"kernel": (3, 3, 5, 7), "bias": (7,)}, (0, 1, 2), (3,), (0,)),
        ("x", {"w": (5, 7), "bias": (7,)}, (0,), (1,), (0,)),
        ("x", {"kernel": (5, 7), "b": (7,)}, (0,), (1,), (0,)),
        ("x", {"weight": (7, 5), "b": (7,)}, (1,), (0,), (0,)),
        ("conv1", {"kernel": (3, 5, 7)}, (0, 1), (2,), None),
        ("Dense_3", {"kernel": (2, 3, 5, 7), "bias": (2, 3, 7)}, (2,), (3,), (2,)),
        ("ConvLocal_0", {"kernel": (3, 5, 7)}, (1,), (2,), None),
        ("linear_1", {"w": (3, 5, 7), "b": (3, 7)}, (1,), (2,), (1,)),
        ("__layer_stack/conv2_d", {"w": (4, 3, 3, 5, 7)}, (1, 2, 3), (4,), None),
    ],
)
def test_settled(module, leaves, reduction, output, bias_output):
    described = by_path()(shapes({module: leaves}))[module]
    kernel, *bias = (described[name] for name in leaves)
    label = f"{module}/{next(iter(leaves))}"
    assert kernel == DimensionNumbers(reduction, output, label)
    if bias:
        assert bias == [DimensionNumbers((), bias_output, label)]


@pytest.mark.parametrize(
    ("module", "leaves"),
    [
        ("x", {"kernel": (3, 5, 7)}),
        ("x", {"kernel": (3, 3, 5, 7)}),  # a convolution, or Gemma's three products in one
        ("Dense_3", {"kernel": (3, 5, 7)}),  # scanned along axis 0 or 1
        ("Conv_0", {"kernel": (3, 3, 3, 5, 7)}),  # in three dimensions, or a stack of two
        ("ConvTranspose_0", {"kernel": (3, 3, 5, 7)}),  # transposed or not
        ("ConvTranspose_0", {"kernel": (3, 3, 7, 7), "bias": (7,)}),
        ("query", {"kernel": (5, 3, 4)}),  # without `out` beside it, a stack as well
        ("DenseGeneral_0", {"kernel": (5, 3, 4)}),
        ("Einsum_0", {"kernel": (2, 5, 3, 4)}),
        ("Einsum_0", {"kernel": (5, 7)}),  # nodes first or last, as its equation says
        ("x", {"kernel": (3, 3, 7), "bias": (3, 7)}),
        ("x", {"kernel": (5, 7), "bias": (3,)}),
    ],
)
def test_open(module, leaves):
    params = shapes({module: leaves, "Dense_0": DENSE})
    with pytest.warns(UserWarning, match=rf"do not settle: {module}/kernel \(") as record:
        described = by_path()(params)
    assert len(record) == 1
    assert set(described[module].values()) == {None}
    assert described["Dense_0"]["kernel"] is not None


def test_attention_is_known_by_its_parts():
    heads = {name: {"kernel": (6, 3, 4)} for name in ("query", "key", "value")}
    params = shapes({"attention": heads | {"out": {"kernel": (3, 4, 6)}}})
    described = by_path()(params)["attention"]
    assert described["key"]["kernel"] == DimensionNumbers((0,), (1, 2), "attention/key/kernel")
    assert described["out"]["kernel"] == DimensionNumbers((0, 1), (2,), "attention/out/kernel")
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((9, *x.shape), x.dtype), params)
    described = by_path()(stacked)["attention"]
    assert described["key"]["kernel"] == DimensionNumbers((1,), (2, 3), "attention/key/kernel")
    assert described["out"]["kernel"] == DimensionNumbers((1, 2), (3,), "attention/out/kernel")


def test_attention_of_rank_2_is_dense():
    params = shapes({name: {"kernel": (6, 6)} for name in ("query", "key", "value", "out")})
    for name, described in by_path()(params).items():
        assert described["kernel"] == DimensionNumbers((0,), (1,), f"{name}/kernel")


@pytest.mark.parametrize(
    ("inputs", "layers", "heads", "dim", "stack"),
    [(6, 9, 3, 4, 1), (6, 3, 3, 4, 1), (6, 9, 3, 3, 1), (9, 9, 9, 4, None)],
)
def test_attention_scanned_along_axis_1(inputs, layers, heads, dim, stack):
    """Without biases sizes that are equal leave open which axis holds the layers."""
    kernels = {name: {"kernel": (inputs, layers, heads, dim)} for name in ("query", "value")}
    params = shapes(kernels | {"out": {"kernel": (heads, layers, dim, inputs)}})
    if stack is None:
        with pytest.warns(UserWarning, match=r"do not settle: out/kernel .*, query/kernel"):
            described = by_path()(params)
        assert jax.tree.leaves(described) == []
    else:
        described = by_path()(params)
        expected = DimensionNumbers((0,), (2, 3), "query/kernel"), ((0, 2), (3,))
        assert described["query"]["kernel"] == expected[0]
        assert described["out"]["kernel"][:2] == expected[1]


# Evidence elsewhere in the tree


def layer(name, shape, nodes=None):
    return {name: shape} | ({} if nodes is None else {"bias": (shape[nodes],)})


@pytest.mark.parametrize(
    ("tree", "alone"),
    [
        # GPT-2's Conv1D is called kernel, and lies nodes first.
        (
            {
                "c_attn": layer("kernel", (48, 16), 0),
                "c_proj": layer("kernel", (16, 16), 0),
                "c_fc": layer("kernel", (64, 16), 0),
                "head": layer("kernel", (16, 16)),
            },
            {"c_attn", "c_proj", "c_fc", "head"},
        ),
        # StyleGAN2's weights are called weight, and lie nodes last.
        (
            {"a": layer("weight", (6, 10), 1), "b": layer("weight", (10, 10), 1)},
            {"a", "b"},
        ),
        # Another leaf name, a telling module, a bias that fits one order alone.
        (
            {
                "a": layer("weight", (6, 10), 1),
                "b": layer("kernel", (10, 10)),
                "Linear": layer("weight", (10, 10)),
                "c": layer("weight", (5, 10), 0),
            },
            {"a"},
        ),
        # A bias of other nodes disproves no order.
        ({"a": {"kernel": (5, 7), "bias": (3,)}, "b": layer("kernel", (5, 5))}, {"a"}),
    ],
)
def test_a_bias_disproves_the_order_of_its_kin(tree, alone):
    with pytest.warns(UserWarning, match="do not settle") as record:
        described = by_path()(shapes(tree))
    (message,) = (str(warning.message) for warning in record)
    for name, leaves in described.items():
        kernel = next(leaf for leaf in leaves if leaf != "bias")
        assert (leaves[kernel] is None) == (name in alone), name
        assert (f"{name}/{kernel} (" in message) == (name in alone), name


def test_a_layer_is_settled_where_all_its_kernels_are():
    cell = {"i": layer("kernel", (5, 7)), "h": layer("kernel", (7, 7), 1)}  # h may lie either way
    assert by_path()(shapes(cell))["i"]["kernel"].group == "h/kernel"
    with pytest.warns(UserWarning, match=r"settle: c/kernel .*, h/kernel .*, i/kernel"):
        described = by_path()(shapes(cell | {"c": layer("kernel", (48, 16), 0)}))
    assert jax.tree.leaves(described) == []


def test_vectors_of_rank_2_tell_a_stack():
    block = {"Conv_0": {"kernel": (9, 3, 5, 7)}, "BatchNorm_0": {"scale": (9, 7), "bias": (9, 7)}}
    with pytest.warns(UserWarning, match=r"do not settle: blocks/Conv_0/kernel"):
        described = by_path()(shapes({"blocks": block, "Dense_0": DENSE}))
    assert described["blocks"]["Conv_0"]["kernel"] is None
    single = shapes(block | {"BatchNorm_0": {"scale": (7,), "bias": (7,)}})
    assert by_path()(single)["Conv_0"]["kernel"] == DimensionNumbers(
        (0, 1, 2), (3,), "Conv_0/kernel"
    )


def test_an_unusual_bias_belongs_to_the_only_kernel():
    both = shapes({"kernel": (5, 7), "w": (5, 7), "b": (7,)})
    described = by_path()(both)
    assert described["kernel"] == DimensionNumbers((0,), (1,), "kernel")
    assert described["b"] == DimensionNumbers((), (0,), "w")


@pytest.mark.parametrize(
    ("leaves", "named"),
    [
        ({"matrix": (5, 7), "bias": (7,)}, ["x/matrix (5, 7)"]),
        ({"u": (7, 7), "v": (5, 7), "b": (7,)}, ["x/u (7, 7)", "x/v (5, 7)"]),
        ({"embedding": (5, 7)}, []),
        ({"matrix": (5, 7), "bias": (3,)}, []),
        ({"matrix": (5, 7), "kernel": (5, 7), "bias": (7,)}, []),
    ],
)
@pytest.mark.parametrize("where", [None, lambda path: "x" not in path])
def test_leaves_of_unknown_names_with_a_bias_are_named(leaves, named, where):
    params = shapes({"x": leaves, "Dense_0": DENSE})
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        by_path(where)(params)
    messages = [str(warning.message) for warning in record]
    assert len(messages) == bool(named and not where)
    for words in named if not where else ():
        assert words in messages[0]


# Who is told, and where


@pytest.mark.parametrize(
    "act",
    [
        lambda params: by_path()(params),
        lambda params: summary(params),
        lambda params: scale_by_grapes().init(params),
        lambda params: optax.chain(optax.clip(1.0), scale_by_grapes()).init(params),
        lambda params: optax.inject_hyperparams(scale_by_grapes)(gain=1.5).init(params),
        lambda params: optax.masked(scale_by_grapes(), True).init(params),
        lambda params: jax.jit(scale_by_grapes().init)(params),
    ],
)
def test_warnings_point_at_the_users_line(act):
    params = {"x": {"kernel": jnp.ones((3, 5, 7))}, "Dense_0": {"kernel": jnp.ones((3, 3))}}
    with pytest.warns(UserWarning, match="do not settle: x/kernel") as record:
        act(params)
    assert [warning.filename for warning in record] == [__file__]
    assert "infer_dimension_numbers" in str(record[0].message)


def test_an_update_says_nothing_again():
    params = {"x": {"kernel": jnp.ones((3, 5, 7))}}
    scale_by_grapes().update(params, optax.EmptyState(), params)  # warnings are errors


@pytest.mark.parametrize("make", [hk.LSTM, hk.GRU, hk.VanillaRNN])
def test_haiku_under_another_name(make):
    def network(x):
        first, second = make(7), make(7)
        hidden, _ = first(x, first.initial_state(2))
        return second(hidden, second.initial_state(2))

    params = jax.eval_shape(hk.transform(network).init, KEY, jnp.ones((2, 5)))
    groups = {
        d.group
        for d in jax.tree.leaves(
            by_path()(params), is_leaf=lambda x: isinstance(x, DimensionNumbers)
        )
    }
    assert len(groups) == 2  # one layer each


# Names and program agree, however differently they look

DIFFERENT = {
    "stack: ensemble": "read from the program without a hint",
    "recurrent: haiku LSTM": "read from the program without a hint",
    "model: PaLM": "parallel branches, summed",
    "model: Inception": "parallel branches, summed",
    "linear: nnx LoRALinear": "low rank by name, kernels for the program",
    "linear: linen SpectralNorm of the input": "used in two ways, for the program",
}
NAMED = [name for name, case in CASES.items() if not case.make.__qualname__.startswith("plain.")]


@pytest.mark.filterwarnings("ignore:GRAPES modulates nothing")  # an Embed alone
@pytest.mark.parametrize("name", NAMED)
def test_names_and_program_agree(name):
    case = CASES[name]
    _, params, _ = case.make()
    described = by_path(case.options.get("where"))(params)
    if name in DIFFERENT:
        with pytest.raises(AssertionError):
            assert_layers(described, case.layers)
    else:
        assert_layers(described, case.layers)


def test_how_many_agree():
    assert len(set(NAMED) - DIFFERENT.keys()) >= 85


# The table of every model


@pytest.mark.parametrize("name", CASES)
def test_summary_has_a_full_row_for_every_leaf(name):
    case = CASES[name]
    if case.unsettled is not None:
        pytest.skip("left alone in part")
    _, params, _ = case.make()
    description = inferred(case)
    if description is None:
        pytest.skip("a bare array: None asks for the default")
    head, *rows = summary(params, description).splitlines()
    starts = [head.index(column) for column in ("shape", "role", "group", "fan-in")]
    ends = [head.index(column) + len(column) for column in ("fan-in", "nodes", "stack", "gates")]
    found = {}
    for row in rows:
        path, _, *cells = (
            row[begin:end].strip() for begin, end in itertools.pairwise([0, *starts, *ends])
        )
        found["" if path == "(root)" else path] = cells
    assert len(rows) == len(found) == len(jax.tree.leaves(params))
    for layer in case.layers:
        for path in layer.kernels:
            role, group, fan_in, nodes, _, gates = found.pop(path)
            assert (role, gates) == ("kernel", str(layer.gates))
            assert group
            assert int(fan_in) * int(nodes) > 0
        for path in layer.biases:
            role, group, fan_in, nodes, _, gates = found.pop(path)
            assert (role, fan_in, gates) == ("bias", "", str(layer.gates))
            assert group
            assert int(nodes) > 0
    assert all(cells == ["left alone", "", "", "", "", ""] for cells in found.values())
