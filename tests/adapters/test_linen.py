"""The linen adapter: what it reaches, under which transforms, and what it refuses."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax.training import train_state
from frameworks import LinenMLP

from grapes_optax import DimensionNumbers, scale_by_grapes
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


def gradient(params, x=X, model=MODEL, rule=lambda forward: forward):
    """Jitted, for one compilation takes less time than those of every operation."""
    forward = rule(model.apply)
    return jax.jit(jax.grad(lambda params: jnp.square(forward(params, x)).sum()))(params)


def hidden_propagated(forward):
    return propagated(forward, hidden)


PLAIN = gradient(PARAMS)
MODULATED = gradient(PARAMS, rule=hidden_propagated)


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
    unclipped = functools.partial(propagated, bounds=None)
    actual = gradient(params, x, layer, unclipped)["params"]
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
    with pytest.raises(ValueError, match=r"cell/ii/kernel: .*use LSTMCell"):
        propagated(model.apply)(params, x)
    einsum = nn.Einsum((5, 6), "bi,io->bo")
    with pytest.raises(ValueError, match=r"kernel: .*exclude it.*layers={Einsum: .*modulate_error"):
        propagated(einsum.apply)(random_params(einsum, X), X)
    with pytest.raises(ValueError, match="kernel: Einsum is no layer") as error:
        feedback_alignment(einsum.apply)(random_params(einsum, X), X)
    assert "modulate_error" not in str(error.value)  # no way out of this rule


def test_unreached_layers_may_be_excluded():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(6), name="lstm")(x))

    model, x = Model(), normal(2, 3, 5)
    params = random_params(model, x)
    propagated(model.apply, where=lambda path: "LSTM" not in path)(params, x)


def test_registered_classes():
    class Scaled(nn.Module):
        """As Conv1D of GPT-2: a product by hand, and more arguments than one."""

        features: int

        @nn.compact
        def __call__(self, name, x, *, scale):
            kernel = self.param("kernel", nn.initializers.normal(), (self.features, x.shape[-1]))
            shift = self.variable("constants", "shift", jnp.ones, ())
            return scale * (x @ kernel.T) + shift.value

    class Model(nn.Module):
        by_hand: bool

        @nn.compact
        def __call__(self, x):
            if self.by_hand:
                x = Scaled(7, name="first")("first", x, scale=5.0)
            else:
                x = 5.0 * nn.Dense(7, use_bias=False, name="first")(x) + 1
            return nn.Dense(3, name="output")(nn.relu(x))

    kernels = normal(5, 7), normal(7, 3)
    feedback = {"first/kernel": normal(5, 7), "output/kernel": normal(7, 3)}
    variables, grads = {}, {}
    for by_hand in True, False:
        first = {"kernel": kernels[0].T if by_hand else kernels[0]}
        output = {"kernel": kernels[1], "bias": jnp.zeros(3)}
        variables = {"params": {"first": first, "output": output}}
        if by_hand:
            variables["constants"] = {"first": {"shift": jnp.ones(())}}
        layers = {Scaled: DimensionNumbers(1, 0)}
        forward = propagated(feedback_alignment(Model(by_hand).apply, layers=layers))
        weights = feedback | ({"first/kernel": feedback["first/kernel"].T} if by_hand else {})
        plain = Model(by_hand).apply(variables, X)
        np.testing.assert_array_equal(forward(variables, X, feedback=weights), plain)

        def value(params, x, forward=forward, variables=variables, weights=weights):
            return jnp.square(forward(variables | params, x, feedback=weights)).sum()

        params = {"params": variables["params"]}
        grads[by_hand] = jax.grad(value, argnums=(0, 1))(params, X)
    by_hand, dense = ((g["params"], dx) for g, dx in (grads[True], grads[False]))
    np.testing.assert_allclose(by_hand[0]["first"]["kernel"].T, dense[0]["first"]["kernel"], 1e-5)
    np.testing.assert_allclose(by_hand[1], dense[1], rtol=1e-5, atol=1e-5)


class Named(nn.Dense):
    """Overrides nothing that the layer does."""

    kernel_init: nn.initializers.Initializer = nn.initializers.normal()
    note: str = ""


class Overriding(nn.Dense):
    @nn.compact
    def __call__(self, x, scale=1.0):
        return scale * super().__call__(x)


class Standardized(nn.Dense):
    def param(self, name, *args, **kwargs):
        leaf = super().param(name, *args, **kwargs)
        return leaf / jnp.linalg.norm(leaf) if name == "kernel" else leaf


def test_subclasses():
    params = random_params(nn.Dense(6), X)
    expected = gradient(params, X, nn.Dense(6), propagated)
    chex.assert_trees_all_equal(gradient(params, X, Named(6), propagated), expected)
    for cls in Overriding, Standardized:
        for rule in propagated, feedback_alignment, direct_feedback_alignment:
            with pytest.raises(ValueError, match=f"{cls.__name__} is no layer that the rule knows"):
                rule(cls(6).apply)(params, X)
        excluded = propagated(
            nn.Sequential([cls(6), nn.Dense(3)]).apply, where=lambda path: "_0" not in path
        )
        excluded(random_params(nn.Sequential([cls(6), nn.Dense(3)]), X), X)


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

    def encoder(forward):
        def code(params):
            return jnp.square(forward(params, X, method="encode")).sum()

        return jax.grad(code)(params)["params"]["encoder"]["kernel"]

    plain, actual = encoder(model.apply), encoder(propagated(model.apply))
    kernel = params["params"]["encoder"]["kernel"]
    np.testing.assert_allclose(actual, reference.scale(plain, kernel, 0, 1), rtol=1e-5)


def test_convolutional_lstm():
    cell, x = nn.ConvLSTMCell(4, (3,)), normal(2, 5, 3)
    carry = normal(2, 5, 4), normal(2, 5, 4)
    params = random_params(cell, carry, x)

    def biases(forward):
        def output(params):
            return jnp.square(forward(params, carry, x)[1]).sum()

        leaves = jax.grad(output)(params)["params"]
        return leaves["ih"]["bias"], leaves["hh"]["bias"]

    plain = biases(cell.apply)
    sums = sum(np.abs(params["params"][name]["kernel"]).sum((0, 1)) for name in ("ih", "hh"))
    factor = reference.factor(sums.reshape(4, 4), 1).ravel()  # gates, nodes
    for actual, expected in zip(biases(propagated(cell.apply)), plain, strict=True):
        np.testing.assert_allclose(actual, expected * factor, rtol=2e-5)


# Transforms of JAX and Flax


def assert_close(actual, desired, tolerance=2e-5):
    chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("wrap", [nn.jit, nn.checkpoint], ids=["jit", "checkpoint"])
def test_classes_that_are_traced_within_the_model(jit, wrap):
    # A function that jax.jit has traced within the model is not seen again: never with a wrong
    # rule, and where the layers of a call cannot be told, with an error.
    wrapped = wrap(LinenMLP)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(wrapped(name="mlp")(x))

    model = Model()
    params = random_params(model, X)
    roll = functools.partial(propagated, control="roll")
    rules = {"plain": lambda f: f, "propagated": propagated, "roll": roll}

    def value(forward):
        return lambda params: jnp.square(forward(params, X)).sum()

    unlifted = {name: rule(Unlifted().apply) for name, rule in rules.items()}
    expected = {name: jax.grad(value(forward))(params) for name, forward in unlifted.items()}
    forwards = {name: rule(model.apply) for name, rule in rules.items()}
    for _ in range(2):
        for name, forward in forwards.items():
            assert_close(jit(jax.grad(value(forward)))(params), expected[name])

    forward = feedback_alignment(model.apply)
    for seed in 0, 1:
        feedback = init_feedback(jax.random.key(seed), forward, params, X)
        fixed = functools.partial(forward, feedback=feedback)
        by_hand = functools.partial(feedback_alignment(Unlifted().apply), feedback=feedback)
        assert_close(jit(jax.grad(value(fixed)))(params), jax.grad(value(by_hand))(params))


class Unlifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(LinenMLP(name="mlp")(x))


def test_model_that_is_traced_as_a_whole_is_refused_the_second_time():
    model = nn.jit(LinenMLP)()
    params = random_params(model, X)
    forward = propagated(model.apply)
    forward(params, X)
    with pytest.raises(ValueError, match=r"No layer was reached.*put jax.jit around"):
        forward(params, X)
    for _ in range(2):
        jax.jit(lambda params: forward(params, X))(params)


@pytest.mark.parametrize("lift", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_what_is_traced_once_takes_the_feedback_weights_of_the_call(lift):
    # The layer runs outside of the inner function as well: that it is reached says nothing.
    model = nn.Dense(5)
    inner, params = lift(model.apply), random_params(model, X)
    kernel, bias = (np.asarray(params["params"][name]) for name in ("kernel", "bias"))
    forward = feedback_alignment(lambda params, x: model.apply(params, jnp.tanh(inner(params, x))))
    for seed in 0, 1, 0:
        matrix = jax.random.normal(jax.random.key(seed), (5, 5))
        fixed = functools.partial(forward, params, feedback={"kernel": matrix})
        h = np.tanh(X @ kernel + bias)
        by_hand = ((np.ones_like(h) @ matrix.T) * (1 - h**2)) @ matrix.T
        actual = jax.grad(lambda x: fixed(x).sum())(X)  # noqa: B023
        np.testing.assert_allclose(actual, by_hand, rtol=1e-4, atol=1e-5)

    rule = feedback_alignment(lambda params, x: inner(params, x), rule="kolen_pollack")
    for seed in 0, 1:
        feedback = {"kernel": jax.random.normal(jax.random.key(seed), (5, 5))}
        grads = jax.grad(lambda feedback: rule(params, X, feedback=feedback).sum())(feedback)
        np.testing.assert_allclose(grads["kernel"], X.T @ np.ones((len(X), 5)), rtol=1e-4)


class Holder(nn.Module):
    """Bilinear in its kernel and its input, and holds a layer."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 4))
        return nn.Dense(3, use_bias=False)(x @ kernel)


def test_layers_that_hold_layers():
    params = random_params(Holder(), X)
    numbers = {Holder: DimensionNumbers(0, 1)}
    refused = pytest.raises(ValueError, match="kernel belongs to a layer that holds other layers: ")
    with refused:
        propagated(Holder().apply, layers=numbers)(params, X)
    with refused:
        aligned = feedback_alignment(Holder().apply, layers=numbers)
        init_feedback(jax.random.key(0), aligned, params, X)
    grad = jax.grad(lambda p: propagated(Holder().apply, lambda path: "Dense" in path)(p, X).sum())
    assert set(grad(params)["params"]) == {"Dense_0", "kernel"}


class Unlisted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("W", nn.initializers.lecun_normal(), (x.shape[-1], 4))


def test_declared_layer_without_the_name_of_a_kernel():
    forward = propagated(Unlisted().apply, layers={Unlisted: DimensionNumbers(0, 1)})
    with pytest.raises(ValueError, match="is declared a layer and holds W: none has the name of a"):
        forward(random_params(Unlisted(), X), X)


def test_masks_take_weights_away():
    mask = np.ones((3, 5, 4), np.float32)
    mask[:2, :, 0] = 0
    conv, x = nn.Conv(4, (3,), mask=jnp.asarray(mask)), X.reshape(2, -1, 5)
    params = random_params(conv, x)
    forward = propagated(conv.apply, bounds=None)
    grads = jax.grad(lambda params: forward(params, x).sum())(params)["params"]["bias"]
    positions = conv.apply(params, x)[..., 0].size
    kernel = np.asarray(params["params"]["kernel"]) * mask
    importance = reference.node_importance(kernel, (0, 1), 2)
    expected = positions * reference.factor(importance, 1, bounds=None)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


class SharedFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = nn.Dense(5, name="a")
        return nn.Dense(3, name="b")(jnp.tanh(first(jnp.tanh(first(x)))))


def test_the_first_layer_may_be_called_again():
    # Under direct feedback alignment only its first call has nothing before it that learns.
    model = SharedFirst()
    params = random_params(model, X)
    forward = direct_feedback_alignment(model.apply)
    feedback = init_feedback(jax.random.key(0), forward, params, X)
    assert {path: leaf.shape for path, leaf in feedback.items()} == {
        "a/kernel": (5, 3),
        "b/kernel": (5, 3),
    }
    grads = jax.grad(lambda p: forward(p, X, feedback=feedback).sum())(params)["params"]["a"]
    kernel, bias = (np.asarray(params["params"]["a"][name]) for name in ("kernel", "bias"))
    one = np.tanh(X @ kernel + bias)
    two = np.tanh(one @ kernel + bias)
    error = np.ones((len(X), 3))
    errors = [error @ np.asarray(feedback[name]).T for name in ("a/kernel", "b/kernel")]
    errors = [e * (1 - h**2) for e, h in zip(errors, (one, two), strict=True)]
    expected = X.T @ errors[0] + one.T @ errors[1]
    np.testing.assert_allclose(grads["kernel"], expected, rtol=1e-4, atol=1e-5)


def test_train_state():
    state = train_state.TrainState.create(
        apply_fn=propagated(MODEL.apply, hidden), params=PARAMS["params"], tx=optax.sgd(1.0)
    )

    @jax.jit
    def step(state, x):
        def value(params):
            return jnp.square(state.apply_fn({"params": params}, x)).sum()

        return state.apply_gradients(grads=jax.grad(value)(state.params))

    after = step(state, X).params
    moved = jax.tree.map(jnp.subtract, PARAMS["params"], after)
    assert_close(moved, MODULATED["params"])


def test_bound_modules_and_any_function():
    class Model(nn.Module):
        def setup(self):
            self.a, self.b = nn.Dense(4), nn.Dense(3)

        def __call__(self, x):
            return self.b(nn.relu(self.a(x)))

    def bound(params, x):
        model = Model().bind(params)
        return model.b(nn.relu(model.a(x)))

    params = random_params(Model(), X)
    for rule in propagated, feedback_alignment, direct_feedback_alignment:
        grads = []
        for forward in map(rule, (Model().apply, bound)):
            feedback = {}
            if rule is not propagated:
                feedback["feedback"] = init_feedback(jax.random.key(0), forward, params, X)

            def value(params, forward=forward, feedback=feedback):
                return jnp.square(forward(params, X, **feedback)).sum()

            grads.append(jax.grad(value)(params))
        chex.assert_trees_all_equal(*grads)


def test_interceptors_of_others_pass():
    def doubled(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        return 2 * out if isinstance(context.module, nn.Dense) else out

    def value(params):
        with nn.intercept_methods(doubled):
            return jnp.square(hidden_propagated(MODEL.apply)(params, X)).sum()

    with nn.intercept_methods(doubled):
        outside = MODEL.apply(PARAMS, X)
    assert_close(value(PARAMS), jnp.square(outside).sum())


def test_mutable_collections():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
            self.sow("intermediates", "x", x)
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))

    model, rngs = Model(), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(rngs, X)
    kwargs = {"mutable": ["batch_stats", "intermediates"], "rngs": rngs}
    plain = model.apply(variables, X, **kwargs)
    chex.assert_trees_all_equal(propagated(model.apply)(variables, X, **kwargs), plain)
    for rule in feedback_alignment, direct_feedback_alignment:
        forward = rule(model.apply)
        feedback = init_feedback(jax.random.key(0), forward, variables, X, **kwargs)
        actual = forward(variables, X, **kwargs, feedback=feedback)
        chex.assert_trees_all_equal(actual, plain)


def test_lifted_remat():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, size in ("Dense_0", 7), ("Dense_1", 6):
                x = nn.relu(nn.remat(nn.Dense)(size, name=name)(x))
            return nn.Dense(3, name="output")(x)

    assert_close(gradient(PARAMS, X, Remat(), hidden_propagated), MODULATED)


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
    actual = gradient(params, X, Scanned(), propagated)["params"]["blocks"]
    expected = gradient({"params": unrolled}, X, Unrolled(), propagated)["params"]
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected.values()))


def test_bfloat16_activations():
    model = MLP(dtype=jnp.bfloat16)
    actual = gradient(PARAMS, X, model, hidden_propagated)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, PARAMS)
    error = optax.tree.norm(optax.tree.sub(actual, MODULATED)) / optax.tree.norm(MODULATED)
    assert error < 0.03


def test_sharded_parameters():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"params": {"kernel": normal(5, 16), "bias": normal(16)}}
    expected = gradient(params, X, nn.Dense(16), propagated)
    params["params"]["kernel"] = jax.device_put(params["params"]["kernel"], sharding)
    assert_close(gradient(params, X, nn.Dense(16), propagated), expected)


def test_init_is_as_ever():
    inside = propagated(lambda key: (MODEL.init(key, X), MODEL.apply(PARAMS, X)))
    chex.assert_trees_all_equal(inside(jax.random.key(0))[0], MODEL.init(jax.random.key(0), X))


# Feedback weights


def test_feedback_weights_are_no_parameters():
    # They are an argument: no collection of variables, so no optimizer or decay meets them.
    forward = feedback_alignment(MODEL.apply)
    feedback = init_feedback(jax.random.key(1), forward, PARAMS, X)
    out = forward(PARAMS, X, feedback=feedback, mutable=True)
    assert set(out[1]) == {"params"}
    chex.assert_trees_all_equal(out[1]["params"], PARAMS["params"])


def test_stacked_layers_draw_with_the_fan_in_of_one():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(64)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=9)
            return scan(name="blocks")(x, None)[0]

    x = normal(2, 64)
    params = random_params(Stack(), x)
    forward = feedback_alignment(Stack().apply, rule="fixed_sign")
    feedback = init_feedback(jax.random.key(0), forward, params, x)
    (weights,) = feedback.values()
    np.testing.assert_allclose(weights.std(), np.sqrt(2 / 64), rtol=0.05)

    def errors(key):  # random signs, drawn anew
        feedback = init_feedback(key, forward, params, x)
        return jax.grad(lambda x: forward(params, x, feedback=feedback).sum())(x)

    one, two = (errors(jax.random.key(seed)) for seed in (0, 1))
    assert jnp.abs(one - two).max() > 0


def test_direct_feedback_cannot_reach_into_lifted_loops():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.SimpleCell(6))(x)[:, -1])

    model, x = Model(), normal(2, 3, 5)
    params = random_params(model, x)
    forward = direct_feedback_alignment(model.apply)
    with pytest.raises(ValueError, match="inside a transform within the forward function"):
        init_feedback(jax.random.key(0), forward, params, x)
    feedback = {f"SimpleCell_0/{n}/kernel": jnp.ones((6, 3)) for n in "ih"}
    with pytest.raises(ValueError, match="inside a transform within the forward function"):
        forward(params, x, feedback=feedback | {"Dense_0/kernel": jnp.ones((6, 3))})


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
    plain = gradient(params, x, model)
    local, _ = scale_by_grapes().update(plain, optax.EmptyState(), params)
    modulated = gradient(params, x, model, propagated)
    chex.assert_trees_all_close(modulated, local, rtol=1e-4, atol=1e-5)
    assert not np.allclose(jax.tree.leaves(plain)[0], jax.tree.leaves(local)[0], rtol=1e-2)


@pytest.mark.parametrize("layer", ["batch dimensions", "positions"])
def test_a_stack_as_long_as_the_batch(layer):
    """The sizes leave open where the stack lies; the layer knows."""
    model, axis = {
        "batch dimensions": (nn.DenseGeneral(5, batch_dims=(0,), use_bias=False), 0),
        "positions": (nn.ConvLocal(5, (1,), use_bias=False), 1),
    }[layer]
    x = jnp.ones((3, 3, 4))
    params = model.init(jax.random.key(0), x)
    (kernel,) = jax.tree.leaves(params)
    factor = reference.factor(np.abs(np.asarray(kernel)).sum(1), 1)
    error = jax.vjp(lambda x: propagated(model.apply)(params, x), x)[1](jnp.ones((3, 3, 5)))[0]
    for i in range(3):
        expected = np.asarray(kernel)[i] @ factor[i]
        np.testing.assert_allclose(jnp.take(error, i, axis), np.tile(expected, (3, 1)), rtol=1e-5)
