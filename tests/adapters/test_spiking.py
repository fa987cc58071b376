"""Spiking units: values and gradients against NumPy, transforms, rate codes, gradients in time."""

import functools
import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reference_backward as by_hand
import reference_spiking
from flax import nnx

import grapes_optax
from grapes_optax import linen as glinen
from grapes_optax import nnx as gnnx
from grapes_optax.linen import SNU, SoftSNU, propagated
from grapes_optax.spiking import rate_code, spike

KEY = jax.random.key(0)
PAGE = (Path(__file__).parents[2] / "docs/spiking.md").read_text()

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def slope(z):
    return 1 - np.tanh(z) ** 2


def test_spike():
    z, dz = jnp.array([-2.0, -0.1, 0.0, 0.1, 2.0]), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_array_equal(spike(z), [0, 0, 0, 1, 1])
    primal, forward = jax.jvp(spike, (z,), (dz,))
    np.testing.assert_array_equal(primal, spike(z))
    np.testing.assert_allclose(forward, slope(z) * dz, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(spike))(z), slope(z), rtol=1e-6)
    second = jax.vmap(jax.grad(jax.grad(spike)))(z)
    np.testing.assert_allclose(second, -2 * np.tanh(z) * slope(z), rtol=1e-6)
    assert spike(z.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jnp.isnan(spike(jnp.nan))  # not silence


# Values and gradients against the loops by hand, in float64.

LEAKY = functools.partial(nn.leaky_relu, negative_slope=0.1)
UNITS = {  # a cell and the same by hand
    "SNU": (SNU, {}),
    "sSNU": (SoftSNU, {"soft": True}),
    "leaky SNU": (
        functools.partial(SNU, decay=0.9, activation=LEAKY),
        {"decay": 0.9, "leak": 0.1},
    ),
    "feedforward SNU": (functools.partial(SNU, recurrent=False), {}),
    "feedforward sSNU": (functools.partial(SoftSNU, recurrent=False), {"soft": True}),
}
PLAIN, LOCAL, PROPAGATED, THROUGH_TIME = "plain", "local", "propagated", "through time"


def in_nnx(cell, params, transform):
    """A function of the parameters of linen, made of the cell of nnx."""
    options = dict(getattr(cell, "keywords", {}))
    kind = getattr(gnnx, getattr(cell, "func", cell).__name__)
    make = functools.partial(kind, 3, 4, param_dtype=np.float64, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: nnx.RNN(make(rngs=nnx.Rngs(0)))))
    forward = transform(gnnx, nnx.RNN.__call__)

    def of_params(variables, x):
        nnx.replace_by_pure_dict(state, variables["params"])
        return forward(nnx.merge(graph, state), x)

    return of_params


@pytest.mark.parametrize("rule", [PLAIN, LOCAL, PROPAGATED, THROUGH_TIME])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_backpropagation_through_time(framework, unit, rule):
    cell, options_by_hand = UNITS[unit]
    rng = np.random.default_rng(0)
    shapes = {"i": (3, 4)} if "feedforward" in unit else {"i": (3, 4), "h": (4, 4)}
    params = {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}
    params["bias"] = rng.normal(-1, 0.2, size=4)
    x, error = rng.normal(size=(2, 8, 3)), rng.normal(size=(2, 8, 4))

    hand = reference_spiking.SNU(params, **options_by_hand)
    if rule != PLAIN:
        by_hand.modulate(hand, through_time=rule == THROUGH_TIME)
    if rule == LOCAL:
        for layer in hand.layers.values():
            layer.own = True
    outputs = hand.forward(x)
    assert 0.1 < outputs.mean() < 0.9
    dx = hand.backward(error)
    expected = {n: layer.gradients for n, layer in hand.cell.items() if n in params}
    expected["bias"] = hand.bias_gradient

    with jax.enable_x64(True):
        transforms = {
            PROPAGATED: lambda grapes, f: grapes.propagated(f),
            THROUGH_TIME: lambda grapes, f: grapes.propagated(f, through_time=True),
        }
        transform = transforms.get(rule, lambda grapes, f: f)
        if framework == "linen":
            forward = transform(glinen, nn.RNN(cell(4, param_dtype=np.float64)).apply)
        else:
            forward = in_nnx(cell, params, transform)

        @jax.jit
        def gradients(params, x, error):
            outputs, pullback = jax.vjp(forward, {"params": {"cell": params}}, x)
            return outputs, *pullback(error)

        results = gradients(params, x, error)
        if rule == LOCAL:
            tx = grapes_optax.scale_by_grapes()
            variables = {"params": {"cell": jax.tree.map(jnp.asarray, params)}}
            gradient, _ = tx.update(results[1], tx.init(variables), variables)
            results = results[0], gradient, results[2]
    expected = outputs, {"params": {"cell": expected}}, dx
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for actual, desired in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, desired, rtol=0, atol=1e-12 * np.abs(desired).max())


# In the company of transforms, and of the rest of the library.


class Block(nn.Module):
    cell: type[SNU]

    @nn.compact
    def __call__(self, x, _=None):
        return nn.RNN(self.cell(4))(x), None


class Deep(nn.Module):
    """Blocks one after the other, or in a scan over layers."""

    scanned: bool

    @nn.compact
    def __call__(self, x):
        if not self.scanned:
            for n in range(3):
                x, _ = Block(SNU, name=f"block_{n}")(x)
            return x
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(SNU, name="blocks")(x, None)[0]


def propagated_gradient(model):
    forward = propagated(model.apply)

    def loss(params, x):
        return jnp.square(forward({"params": params}, x)).sum()

    return jax.grad(loss)


def test_vmap_and_remat():
    layer, x = nn.RNN(SNU(4)), jax.random.normal(KEY, (3, 2, 6, 4))
    params = jax.vmap(layer.init)(jax.random.split(KEY, 3), x)["params"]
    gradient = propagated_gradient(layer)
    one_by_one = jax.jit(lambda *args: jax.lax.map(lambda args: gradient(*args), args))(params, x)
    for model in (layer, nn.RNN(nn.remat(SNU)(4))):
        together = jax.jit(jax.vmap(propagated_gradient(model)))(params, x)
        chex.assert_trees_all_close(together, one_by_one, rtol=1e-5)


def test_scan_over_layers():
    x, model = 3 * jax.random.normal(KEY, (2, 6, 4)), Deep(scanned=True)
    variables = model.init(KEY, x)
    # Without a readout there is no output layer.
    described = grapes_optax.infer_dimension_numbers(
        model.apply, variables, x, modulate_output=True
    )
    unit = described["params"]["blocks"]["SNU_0"]
    assert unit["bias"] is None
    assert unit["i"]["kernel"] == unit["h"]["kernel"]  # one group too

    stack = variables["params"]["blocks"]
    layers = {f"block_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stack) for n in range(3)}
    scanned = jax.jit(propagated_gradient(model))({"blocks": stack}, x)["blocks"]
    in_a_row = jax.jit(propagated_gradient(Deep(scanned=False)))(layers, x)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *in_a_row.values())
    for leaf in jax.tree.leaves(expected):
        assert (jnp.abs(leaf).reshape(3, -1).max(1) > 0).all()
    chex.assert_trees_all_close(scanned, expected, rtol=1e-5)


@pytest.mark.parametrize("recurrent", [True, False])
def test_input_and_recurrent_kernel_are_one_layer(recurrent):
    params = nn.RNN(SNU(4, recurrent)).init(KEY, jnp.ones((2, 5, 3)))["params"]
    described = grapes_optax.by_path()(params)["cell"]
    assert described.pop("bias") is None
    assert len({layer["kernel"].group for layer in described.values()}) == 1
    rows = [row.split() for row in str(grapes_optax.summary(params)).splitlines()]
    kernels = {row[0]: row[-3:] for row in rows if "kernel" in row}
    assert list(kernels) == ["cell/h/kernel"] * recurrent + ["cell/i/kernel"]
    assert len({tuple(factors) for factors in kernels.values()}) == 1


# Rate codes.


def test_rates_are_those_of_the_pixels():
    images = jnp.linspace(0, 1, 12).reshape(2, 6)
    spikes = rate_code(KEY, images, steps=10_000, rate=0.4)
    assert spikes.shape == (2, 10_000, 6)
    assert spikes.dtype == images.dtype
    assert set(np.unique(spikes)) == {0, 1}
    deviation = np.sqrt(0.4 * images * (1 - 0.4 * images) / 10_000)
    assert (np.abs(spikes.mean(1) - 0.4 * images) <= 4 * deviation).all()
    pairs = (spikes[:, 1:] * spikes[:, :-1]).mean(1)  # no memory from step to step
    assert np.abs(pairs - (0.4 * images) ** 2).max() < 0.02


def test_the_key_alone_decides():
    images = jnp.full((5, 8), 0.5)
    codes = [rate_code(key, images) for key in (KEY, KEY, jax.random.key(1))]
    assert codes[0].shape == (5, 20, 8)
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    np.testing.assert_array_equal(codes[0], jax.jit(rate_code)(KEY, images))
    keys = jax.random.split(KEY, 5)
    one_by_one = [rate_code(key, image) for key, image in zip(keys, images, strict=True)]
    np.testing.assert_array_equal(jax.vmap(rate_code)(keys, images), one_by_one)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rates_of_dim_pixels_in_few_bits(dtype):
    spikes = rate_code(KEY, jnp.full((1, 64), 1 / 255, dtype), steps=5000, rate=0.3)
    assert spikes.dtype == dtype
    np.testing.assert_allclose(spikes.astype(np.float32).mean(), 0.3 / 255, rtol=0.2)


@pytest.mark.parametrize("make", [lambda n: SNU(n), lambda n: gnnx.SNU(4, n, rngs=nnx.Rngs(0))])
def test_units_must_be_there(make):
    with pytest.raises(ValueError, match="features, the number of units, must be positive; got 0"):
        make(0)


@pytest.mark.parametrize("pixel", [-0.1, 16.0, np.nan])
def test_pixels_out_of_range(pixel):
    with pytest.raises(ValueError, match="divide the images"):
        rate_code(KEY, np.array([[0.5, pixel]], np.float32))


# Factors do not compound through time.

STEPS = 5, 10, 20, 50
CELLS = {
    "vanilla": nn.SimpleCell,
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
    "SNU": SNU,
    "sSNU": SoftSNU,
}


class Reader(nn.Module):
    """The mean over the first steps alone; what comes later has no gradient."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x, steps):
        x = nn.RNN(self.cell(64))(x)
        mask = jnp.expand_dims(jnp.arange(x.shape[1]) < steps, (0, 2))
        return nn.Dense(10, name="output")((x * mask).sum(1) / steps)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_norm_of_the_gradient_over_time(cell):
    model, hidden = Reader(CELLS[cell]), lambda path: "output" not in path
    x = jax.random.bernoulli(KEY, 0.3, (8, max(STEPS), 64)).astype(jnp.float32)
    labels = jax.random.randint(KEY, (8,), 0, 10)

    def loss(forward, params, steps):
        logits = forward({"params": params}, x, steps)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def ratios(params, steps):
        def norm(forward):
            gradient = jax.grad(loss, argnums=1)(forward, params, steps)
            return optax.tree.norm(gradient | {"output": None})

        plain = norm(model.apply)
        ratio = norm(propagated(model.apply, hidden)) / plain
        return ratio, norm(propagated(model.apply, hidden, through_time=True)) / plain

    keys = jax.random.split(KEY, 3)
    # One after the other: on CPUs, orthogonal matrices drawn at once may wait for each other.
    params = jax.lax.map(lambda key: model.init(key, x[:, :1], 1)["params"], keys)
    over_time = jax.vmap(jax.vmap(ratios, (None, 0)), (0, None))
    ratio, through_time = (r.mean(0) for r in jax.jit(over_time)(params, jnp.array(STEPS)))
    assert ratio.min() > 1
    assert ratio.max() < 2
    assert ratio.max() / ratio.min() < 1.02
    assert through_time[-1] > 1.01 * through_time[0]
    (row,) = re.findall(rf"^\| {cell} +\|(.*)\|$", PAGE, re.M)
    documented = [float(number.replace(",", "")) for number in row.split("|")]
    np.testing.assert_allclose([*ratio, *through_time], documented, rtol=0.05)


# Another library of spiking networks.


@pytest.mark.slow
def test_spyx(capsys):
    pytest.importorskip("spyx")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "spyx.nn" in code]
    names = {}
    exec(compile(code, "spiking.md", "exec"), names)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    described = {row[0]: row for row in rows if "left" not in row and "path" not in row}
    assert list(described) == ["layers/0/kernel", "layers/1/recurrent_w"]
    assert len({row[4] for row in described.values()}) == 1
    assert names["losses"][-1] < 0.9 * names["losses"][0]

    params = nnx.to_pure_dict(nnx.state(names["model"], nnx.Param))
    scale = grapes_optax.scale_by_grapes(names["description"])
    ones = jax.tree.map(jnp.ones_like, params)
    first, second, *rest = scale.update(ones, scale.init(params), params)[0]["layers"].values()
    kernels = params["layers"][0]["kernel"], params["layers"][1]["recurrent_w"]
    importance = sum(reference.node_importance(kernel, 0, 1) for kernel in kernels)
    for update in first["kernel"], second["recurrent_w"]:
        np.testing.assert_allclose(update[0], reference.factor(importance, 1), rtol=1e-5)
    chex.assert_trees_all_equal(rest, list(ones["layers"].values())[2:])
