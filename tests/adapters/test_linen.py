"""The linen adapter: what it reaches, under which transforms, and what it refuses."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from grapes_optax import scale_by_grapes
from grapes_optax.linen import (
    direct_feedback_alignment,
    feedback_alignment,
    init_feedback,
    propagated,
)

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def random_params(model, *inputs):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda x: normal(*x.shape), nn.meta.unbox(shapes))


class MLP(nn.Module):
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(7, dtype=self.dtype)(x))
        x = nn.relu(nn.Dense(6, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype, name="output")(x)


MODEL, X = MLP(), normal(4, 5)
PARAMS = random_params(MODEL, X)


def hidden(path):
    return "output" not in path


def loss(params, x=X, model=MODEL):
    return jnp.square(model.apply(params, x)).sum()


def gradient(params, x=X, model=MODEL):
    """Jitted, for one compilation takes less time than those of every operation."""
    return jax.jit(jax.grad(lambda params: loss(params, x, model)))(params)


def by_hand(params, x=X):
    """Gradient of the loss with propagated GRAPES in the two hidden layers."""
    with jax.default_matmul_precision("highest"), propagated(hidden):
        return gradient(params, x)


PLAIN, MODULATED = gradient(PARAMS), by_hand(PARAMS)


def test_reference_value_of_this_file():
    w1, w2 = (np.asarray(PARAMS["params"][f"Dense_{i}"]["kernel"]) for i in (0, 1))
    b1, b2 = (np.asarray(PARAMS["params"][f"Dense_{i}"]["bias"]) for i in (0, 1))
    w3, b3 = (np.asarray(PARAMS["params"]["output"][name]) for name in ("kernel", "bias"))
    z1 = np.asarray(X) @ w1 + b1
    z2 = np.maximum(z1, 0) @ w2 + b2
    error = 2 * (np.maximum(z2, 0) @ w3 + b3)
    f1, f2 = (reference.factor(reference.node_importance(w, 0, 1), 1) for w in (w1, w2))
    error = error @ w3.T * (z2 > 0) * f2
    np.testing.assert_allclose(MODULATED["params"]["Dense_1"]["bias"], error.sum(0), rtol=1e-5)
    error = error @ w2.T * (z1 > 0) * f1
    np.testing.assert_allclose(MODULATED["params"]["Dense_0"]["bias"], error.sum(0), rtol=1e-5)


# One layer alone: its own gradients are the plain ones times the factors.

ONE_LAYER = {
    "Dense": (nn.Dense(6), (4, 5), (0, 1)),
    "DenseGeneral to two axes": (nn.DenseGeneral((3, 2)), (4, 5), (0, (1, 2))),
    "DenseGeneral from two axes": (nn.DenseGeneral(6, axis=(-2, -1)), (4, 5, 3), ((0, 1), 2)),
    "DenseGeneral, batch": (nn.DenseGeneral(6, batch_dims=(0,)), (4, 2, 5), (1, 2)),
    "Conv": (nn.Conv(6, (3, 2)), (2, 5, 4, 3), ((0, 1, 2), 3)),
    "Conv, 1-D": (nn.Conv(6, (3,), strides=2), (2, 5, 4), ((0, 1), 2)),
    "Conv, depthwise": (nn.Conv(6, (3, 3), feature_group_count=3), (2, 5, 5, 3), ((0, 1, 2), 3)),
    "ConvLocal": (nn.ConvLocal(6, (2,)), (2, 5, 3), (-2, -1)),
    "ConvTranspose": (nn.ConvTranspose(6, (3, 3)), (2, 4, 4, 3), ((0, 1, 2), 3)),
    "ConvTranspose, transposed": (
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
        (2, 4, 4, 3),
        ((0, 1, 3), 2),
    ),
}


@pytest.mark.parametrize(("layer", "shape", "axes"), ONE_LAYER.values(), ids=ONE_LAYER.keys())
def test_layers_that_are_reached(layer, shape, axes):
    x = normal(*shape)
    params = random_params(layer, x)
    plain = gradient(params, x, layer)["params"]
    with propagated(bounds=None):
        actual = gradient(params, x, layer)["params"]
    kernel = params["params"]["kernel"]
    expected = reference.scale(plain["kernel"], kernel, *axes, bounds=None)
    np.testing.assert_allclose(actual["kernel"], expected, rtol=1e-5, atol=1e-5)
    factor = reference.factor(
        reference.node_importance(kernel, *axes), np.size(axes[1]), bounds=None
    )
    np.testing.assert_allclose(actual["bias"], plain["bias"] * factor, rtol=1e-5, atol=1e-5)


def test_unreached_layers_are_named():
    model, x = nn.RNN(nn.OptimizedLSTMCell(6)), normal(2, 3, 5)
    params = random_params(model, x)
    with propagated(), pytest.raises(ValueError, match=r"cell/hf/kernel, .*multiplies by hand"):
        model.apply(params, x)
    einsum = nn.Einsum((5, 6), "bi,io->bo")
    with propagated(), pytest.raises(ValueError, match="kernel: the module multiplies by hand"):
        einsum.apply(random_params(einsum, X), X)


def test_unreached_layers_may_be_excluded():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(6), name="lstm")(x))

    model, x = Model(), normal(2, 3, 5)
    params = random_params(model, x)
    with propagated(where=lambda path: "LSTM" not in path):
        model.apply(params, x)


def test_no_layer_reached():
    for where in None, lambda path: "nowhere" in path:
        model = nn.LayerNorm() if where is None else MODEL
        params = random_params(model, X)
        with propagated(where), pytest.raises(ValueError, match="No layer was reached"):
            model.apply(params, X)


def test_a_part_of_the_model_may_be_called():
    class Autoencoder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(3), nn.Dense(5)

        def encode(self, x):
            return self.encoder(x)

        def __call__(self, x):
            return self.decoder(self.encode(x))

    model = Autoencoder()
    params = random_params(model, X)

    def code(params):
        return jnp.square(model.apply(params, X, method="encode")).sum()

    plain = jax.grad(code)(params)["params"]["encoder"]["kernel"]
    with propagated():
        actual = jax.grad(code)(params)["params"]["encoder"]["kernel"]
    kernel = params["params"]["encoder"]["kernel"]
    np.testing.assert_allclose(actual, reference.scale(plain, kernel, 0, 1), rtol=1e-5)


def test_convolutional_lstm():
    cell, x = nn.ConvLSTMCell(4, (3,)), normal(2, 5, 3)
    carry = normal(2, 5, 4), normal(2, 5, 4)
    params = random_params(cell, carry, x)

    def biases(params):
        def output(params):
            return jnp.square(cell.apply(params, carry, x)[1]).sum()

        leaves = jax.grad(output)(params)["params"]
        return leaves["ih"]["bias"], leaves["hh"]["bias"]

    plain = biases(params)
    sums = sum(np.abs(params["params"][name]["kernel"]).sum((0, 1)) for name in ("ih", "hh"))
    factor = reference.factor(sums.reshape(4, 4), 1).ravel()  # gates, nodes
    with propagated():
        for actual, expected in zip(biases(params), plain, strict=True):
            np.testing.assert_allclose(actual, expected * factor, rtol=2e-5)


# Transforms of JAX and Flax


def assert_close(actual, desired, tolerance=2e-5):
    chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


def test_function_that_was_traced_before():
    gradient = jax.jit(jax.grad(loss))  # one function for all contexts
    assert_close(gradient(PARAMS), PLAIN)
    with propagated(hidden):
        assert_close(gradient(PARAMS), MODULATED)
    with propagated(hidden, control="mean"):
        assert not np.allclose(
            gradient(PARAMS)["params"]["Dense_0"]["kernel"],
            MODULATED["params"]["Dense_0"]["kernel"],
        )
    assert_close(gradient(PARAMS), PLAIN)


def test_class_of_nn_jit_that_was_traced_before():
    model = nn.jit(MLP)()
    assert_close(gradient(PARAMS, X, model), PLAIN)
    with propagated(hidden):
        assert_close(gradient(PARAMS, X, model), MODULATED)
    assert_close(gradient(PARAMS, X, model), PLAIN)


def test_one_trace_for_all_steps():
    gradient = jax.jit(jax.grad(chex.assert_max_traces(loss, n=1)))
    for _ in range(3):
        with propagated(hidden):
            assert_close(gradient(PARAMS), MODULATED)


@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: (
            lambda params: jax.tree.map(
                lambda x: x[0], jax.vmap(f)(jax.tree.map(lambda x: jnp.stack([x, -x]), params))
            )
        ),
        lambda f: lambda params: jax.lax.scan(lambda c, _: (c, f(params)), 0, length=1)[1],
    ],
)
def test_transforms(transform):
    def inside(params):
        with propagated(hidden):
            return jax.grad(loss)(params)

    actual = jax.tree.map(lambda x, p: x.reshape(p.shape), transform(inside)(PARAMS), PARAMS)
    assert_close(actual, MODULATED)


def test_per_example_gradients():
    with propagated(hidden):
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(PARAMS, X[:, None])
    assert_close(jax.tree.map(lambda x: x.sum(0), each), MODULATED)


def test_lifted_remat():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, size in ("Dense_0", 7), ("Dense_1", 6):
                x = nn.relu(nn.remat(nn.Dense)(size, name=name)(x))
            return nn.Dense(3, name="output")(x)

    with propagated(hidden):
        assert_close(gradient(PARAMS, X, Remat()), MODULATED)


def test_lifted_scan_over_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(5)(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3)
            blocks = scan(name="blocks")
            return blocks(x, None)[0]

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(3):
                x, _ = Block(name=f"block_{i}")(x, None)
            return x

    params = random_params(Scanned(), X)
    stacked = params["params"]["blocks"]
    unrolled = {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)}
    with propagated():
        actual = gradient(params, X, Scanned())["params"]["blocks"]
        expected = gradient({"params": unrolled}, X, Unrolled())["params"]
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected.values()))


def test_bfloat16_activations():
    model = MLP(dtype=jnp.bfloat16)
    with propagated(hidden):
        actual = gradient(PARAMS, X, model)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, PARAMS)
    error = optax.tree.norm(optax.tree.sub(actual, MODULATED)) / optax.tree.norm(MODULATED)
    assert error < 0.03


def test_sharded_parameters():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"params": {"kernel": normal(5, 16), "bias": normal(16)}}
    with propagated():
        expected = gradient(params, X, nn.Dense(16))
        params["params"]["kernel"] = jax.device_put(params["params"]["kernel"], sharding)
        assert_close(jax.jit(jax.grad(lambda p: loss(p, X, nn.Dense(16))))(params), expected)


def test_init_is_as_ever():
    with propagated():
        inside = MODEL.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(inside, MODEL.init(jax.random.key(0), X))


def test_contexts_end_with_an_exception():
    with pytest.raises(RuntimeError, match="mine"), propagated(hidden):
        raise RuntimeError("mine")
    assert_close(gradient(PARAMS), PLAIN)


def test_nested_contexts_the_inner_one_holds():
    with propagated(hidden, control="mean"), propagated(hidden):
        assert_close(gradient(PARAMS), MODULATED)


# Both forms at once


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_both_forms_at_once_are_refused(jit):
    local = scale_by_grapes()
    with propagated(hidden):
        with pytest.raises(ValueError, match=r"Dense_0/.* has propagated GRAPES already"):
            jit(local.update)(PLAIN, optax.EmptyState(), PARAMS)
        # Each form on layers of its own is fine.
        mask = {"params": {name: name == "output" for name in PARAMS["params"]}}
        jit(optax.masked(local, mask).update)(PLAIN, optax.MaskedState(optax.EmptyState()), PARAMS)
    jit(local.update)(PLAIN, optax.EmptyState(), PARAMS)


# Feedback weights

FEEDBACK = init_feedback(jax.random.key(1), MODEL, PARAMS, X)
DIRECT = init_feedback(jax.random.key(1), MODEL, PARAMS, X, direct=True)


def test_feedback_weights():
    chex.assert_trees_all_equal_shapes(
        FEEDBACK, {name: {"kernel": leaf["kernel"]} for name, leaf in PARAMS["params"].items()}
    )
    assert jax.tree.map(jnp.shape, DIRECT) == {
        "Dense_1": {"kernel": (7, 3)},
        "output": {"kernel": (6, 3)},
    }
    assert jnp.abs(DIRECT["output"]["kernel"]).max() <= np.sqrt(6 / 6)
    small = jax.nn.initializers.variance_scaling(1e-6, "fan_in", "normal")
    scaled = init_feedback(jax.random.key(1), MODEL, PARAMS, X, initializer=small)
    assert jnp.abs(scaled["output"]["kernel"]).max() < 0.01
    some = init_feedback(jax.random.key(1), MODEL, PARAMS, X, where=hidden, direct=True)
    assert list(some) == ["Dense_1"]


@pytest.mark.parametrize("rule", [feedback_alignment, direct_feedback_alignment])
def test_feedback_missing_or_of_the_wrong_shape(rule):
    weights = DIRECT if rule is direct_feedback_alignment else FEEDBACK
    with rule(weights):
        loss(PARAMS)
    with (
        rule({k: v for k, v in weights.items() if k != "output"}),
        pytest.raises(ValueError, match="no feedback weights for output/kernel"),
    ):
        loss(PARAMS)
    with (
        rule(weights | {"output": {"kernel": jnp.ones((2, 3))}}),
        pytest.raises(ValueError, match=r"of output/kernel have shape \(2, 3\), not \(6, 3\)"),
    ):
        loss(PARAMS)


def test_feedback_among_the_parameters():
    params = {"params": PARAMS["params"] | {"feedback": FEEDBACK}}
    with (
        feedback_alignment(FEEDBACK),
        pytest.raises(ValueError, match="collection of their own"),
    ):
        loss(params)


def test_unknown_rule_and_keys():
    with pytest.raises(ValueError, match="Unknown rule 'sign': choose one of"):
        feedback_alignment(FEEDBACK, rule="sign")
    for options in {"rule": "random_sign"}, {"key": jax.random.key(0)}:
        with pytest.raises(ValueError, match="alone takes a key"):
            feedback_alignment(FEEDBACK, **options)


def test_random_signs_change_with_the_key():
    def kernel(seed):
        with feedback_alignment(FEEDBACK, rule="random_sign", key=jax.random.key(seed)):
            return gradient(PARAMS)["params"]["Dense_0"]["kernel"]

    np.testing.assert_array_equal(kernel(0), kernel(0))
    assert not np.allclose(kernel(0), kernel(1))


def test_direct_feedback_needs_one_array():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dense(4)(x)), x

    params = random_params(Pair(), X)
    feedback = {"Dense_0": {"kernel": jnp.ones((4, 3))}}
    with direct_feedback_alignment(feedback), pytest.raises(ValueError, match="not tuple"):
        Pair().apply(params, X)


def test_direct_feedback_cannot_reach_into_lifted_loops():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.SimpleCell(6))(x)[:, -1])

    model, x = Model(), normal(2, 3, 5)
    params = random_params(model, x)
    with pytest.raises(ValueError, match="inside a transform within the model"):
        init_feedback(jax.random.key(0), model, params, x, direct=True)
    feedback = {"SimpleCell_0": {n: {"kernel": jnp.ones((6, 3))} for n in "ih"}}
    with (
        direct_feedback_alignment(feedback | {"Dense_0": {"kernel": jnp.ones((6, 3))}}),
        pytest.raises(ValueError, match="inside a transform within the model"),
    ):
        model.apply(params, x)


def test_importance_from_other_parameters():
    other = jax.tree.map(lambda x: -3 * x, PARAMS)  # the same factors
    for importance in other, other["params"]:
        with propagated(hidden, importance=importance):
            assert_close(gradient(PARAMS), MODULATED)
    with (
        propagated(hidden, importance={"params": {}}),
        pytest.raises(ValueError, match="`importance` lacks Dense_0/kernel"),
    ):
        loss(PARAMS)


def test_unknown_options():
    with pytest.raises(ValueError, match="Unknown control"):
        propagated(control="shuffle")


@pytest.mark.parametrize(
    "cell",
    [
        nn.SimpleCell(4),
        nn.LSTMCell(4),
        nn.GRUCell(4),
        nn.MGUCell(4),
        nn.ConvLSTMCell(2, (3,)),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_local_and_propagated_form_agree_in_one_recurrent_layer(cell):
    # No error travels upstream from there but through time, where it is left as it is.
    model = nn.RNN(cell)
    x = normal(2, 5, 6, 3) if isinstance(cell, nn.ConvLSTMCell) else normal(2, 5, 3)
    params = random_params(model, x)
    plain = jax.jit(jax.grad(lambda p: loss(p, x, model)))(params)
    local, _ = scale_by_grapes().update(plain, optax.EmptyState(), params)
    with propagated():
        modulated = jax.jit(jax.grad(lambda p: loss(p, x, model)))(params)
    chex.assert_trees_all_close(modulated, local, rtol=1e-4, atol=1e-5)
    assert not np.allclose(jax.tree.leaves(plain)[0], jax.tree.leaves(local)[0], rtol=1e-2)
