"""Recurrent cells of every framework and in plain JAX, read from the program."""

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
    FUSED,
    GATES,
    KEY,
    LSTM,
    SEQUENCE,
    STEP,
    STEPS,
    SUM,
    Case,
    Layer,
    array,
    assert_layers,
    below,
    equinox,
    flax_nnx,
    haiku,
    inferred,
    linen,
    one,
    pair,
    plain,
    split_after,
    split_before,
    sum_of,
)

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

# Rows of the second table: recurrent cells, inputs 5 and hidden 7.


LINEN_CELLS = {
    "SimpleCell": (nn.SimpleCell(7), [pair("i", "h", True, False)]),
    "LSTMCell": (nn.LSTMCell(7), LSTM),
    "OptimizedLSTMCell": (nn.OptimizedLSTMCell(7), LSTM),
    "GRUCell": (
        nn.GRUCell(7),
        [pair("ir", "hr", True, False), pair("iz", "hz", True, False), pair("in", "hn")],
    ),
    "MGUCell": (nn.MGUCell(7), [pair("if", "hf", True, False), pair("in", "hn")]),
    "ConvLSTMCell": (
        nn.ConvLSTMCell(7, (3, 3)),
        [pair("ih", "hh", gates=4, fan_in=(0, 1, 2), nodes=3)],
    ),
}
NNX_CELLS = {
    "SimpleCell": [pair("dense_i", "dense_h", True, False)],
    "LSTMCell": [
        Layer(
            {f"i{g}_/kernel" if g == "f" else f"i{g}/kernel": (0, 1), f"h{g}/kernel": (0, 1)},
            {f"h{g}/bias": 0},
        )
        for g in "ifgo"
    ],
    "OptimizedLSTMCell": [pair("dense_i", "dense_h", False, gates=4)],
    "GRUCell": [pair("dense_i", "dense_h", True, False, gates=3)],
}


def cell_call(cell, x):
    carry = cell.initialize_carry(x.shape[:1] + x.shape[2:], nnx.Rngs(0))
    return cell(carry, x[:, 0])


def haiku_cell(make):
    def function(x):
        core = make()
        return hk.dynamic_unroll(core, jnp.swapaxes(x, 0, 1), core.initial_state(2))[0]

    return haiku(function, SEQUENCE)


RECURRENT = {
    **{
        f"linen {name}": Case(
            linen(nn.RNN(cell), array(2, 3, 8, 8, 5) if "Conv" in name else SEQUENCE),
            below("cell", *layers),
        )
        for name, (cell, layers) in LINEN_CELLS.items()
    },
    **{
        f"nnx {name}": Case(
            flax_nnx(
                functools.partial(
                    lambda name, rngs: nnx.RNN(getattr(nnx, name)(5, 7, rngs=rngs)), name
                ),
                SEQUENCE,
            ),
            below("cell", *layers),
        )
        for name, layers in NNX_CELLS.items()
    },
    "equinox LSTMCell": Case(
        equinox(lambda key: eqx.nn.LSTMCell(5, 7, key=key), array(5), (array(7), array(7))),
        [Layer({"weight_ih": (1, 0), "weight_hh": (1, 0)}, {"bias": 0}, 4)],
    ),
    "equinox GRUCell": Case(
        equinox(lambda key: eqx.nn.GRUCell(5, 7, key=key), array(5), array(7)),
        [Layer({"weight_ih": (1, 0), "weight_hh": (1, 0)}, {"bias": 0, "bias_n": 0}, 3)],
    ),
    "haiku LSTM": Case(haiku_cell(lambda: hk.LSTM(7)), below("lstm/linear", one("w", bias="b"))),
    "haiku LSTM with a hint": Case(
        haiku_cell(lambda: hk.LSTM(7)),
        below("lstm/linear", one("w", bias="b", gates=4)),
        {"gates": {"lstm/linear/w": 4}},
    ),
    "haiku GRU": Case(
        haiku_cell(lambda: hk.GRU(7)),
        below("gru", Layer({"w_i": (0, 1), "w_h": (0, 1)}, {"b": 0}, 3)),
    ),
    "haiku VanillaRNN": Case(
        haiku_cell(lambda: hk.VanillaRNN(7)),
        below(
            "vanilla_rnn",
            Layer({"linear/w": (0, 1), "linear_1/w": (0, 1)}, {"linear/b": 0, "linear_1/b": 0}),
        ),
    ),
    "haiku Conv1DLSTM": Case(
        haiku(
            lambda x: (core := hk.Conv1DLSTM((8,), 4, 3))(x, core.initial_state(2))[0],
            array(2, 8, 5),
        ),
        below(
            "conv1_dlstm",
            Layer(
                {"input_to_hidden/w": ((0, 1), 2), "hidden_to_hidden/w": ((0, 1), 2)},
                {"input_to_hidden/b": 0, "hidden_to_hidden/b": 0},
                4,
            ),
        ),
    ),
}

# Cells written in plain JAX.


def sliced(p, x, h):
    z = sum_of(p, x, h)
    return z[:, :7] * z[:, 7:14] + z[:, 14:21] * z[:, 21:]


def sliced_dynamically(p, x, h):
    z = sum_of(p, x, h)
    return sum(jnp.tanh(lax.dynamic_slice_in_dim(z, 7 * i, 7, 1)) for i in range(4))


def reshaped(p, x, h):
    i, f, g, o = jnp.unstack(sum_of(p, x, h).reshape(-1, 4, 7), axis=1)
    return i * g + f * o


def reshaped_before(p, x, h):
    z = (x @ p["w"]).reshape(-1, 4, 7) + (h @ p["u"]).reshape(-1, 4, 7) + p["b"].reshape(4, 7)
    return z[:, 0] * z[:, 1] + z[:, 2] * z[:, 3]


def gates_have_an_axis(p, x, h):
    z = jnp.einsum("bi,ign->bgn", x, p["w"]) + jnp.einsum("bi,ign->bgn", h, p["u"]) + p["b"]
    return z[:, 0] * z[:, 1] + z[:, 2] * z[:, 3]


def crossed(p, x, h):
    (a, b), (c, d) = jnp.split(x @ p["w"], 2, -1), jnp.split(h @ p["u"], 2, -1)
    return jnp.tanh(a + d) * jnp.tanh(b + c)


def interleaved(p, x, h):
    z = sum_of(p, x, h).reshape(-1, 7, 4)
    return z[..., 0] * z[..., 1] + z[..., 2] * z[..., 3]


def uneven(p, x, h):
    a, b = jnp.split(sum_of(p, x, h), [10], -1)
    return jnp.tanh(a).sum() + jnp.tanh(b).sum()


def gated_candidate(p, x, h):
    return jnp.tanh(x @ p["w"] + p["b"] + jax.nn.sigmoid(h) * (h @ p["u"]))


def dropped_out(p, x, h, key):
    keep = jax.random.bernoulli(key, 0.9, h.shape)
    return jnp.tanh(x @ p["w"] + p["b"] + jnp.where(keep, (h @ p["u"]) / 0.9, 0.0))


def scanned(p, xs):
    h = jnp.zeros((2, 7))
    return lax.scan(lambda h, x: ((h := jnp.tanh(sum_of(p, x, h))), h), h, xs)[1]


def projected_outside(p, xs):
    def step(h, z):
        h = jnp.tanh(z + h @ p["u"] + p["b"])
        return h, h

    return lax.scan(step, jnp.zeros((2, 7)), xs @ p["w"])[1]


def unrolled(p, xs):
    z, h = xs @ p["w"] + p["b"], jnp.zeros((2, 7))
    for t in range(3):
        h = jnp.tanh(z[t] + h @ p["u"])
    return h


def with_context(p, xs, context):
    """The context is projected once, and added in every step."""
    z = context @ p["w"]

    def step(h, x):
        return jnp.tanh(z + h @ p["u"] + p["b"] + x), None

    return lax.scan(step, jnp.zeros((2, 7)), xs)[0]


def learned_decay(p, xs):
    def step(s, x):
        s = jax.nn.relu(x @ p["w"] + p["decay"] * s)
        return s, s

    return lax.scan(step, jnp.zeros((2, 7)), xs)[1]


def spiking(p, xs):
    def step(carry, x):
        s, y = carry
        s = jax.nn.relu(x @ p["w"] + y @ p["u"] + 0.8 * s * (1 - y))
        y = jax.nn.sigmoid(s + p["b"])
        return (s, y), y

    return lax.scan(step, (jnp.zeros((2, 7)),) * 2, xs)[1]


def weights_carried(p, x):
    def step(i, carry):
        p, h = carry
        return p, jnp.tanh(sum_of(p, x, h))

    return lax.fori_loop(0, 3, step, (p, jnp.zeros((2, 7))))[1]


def weights_carried_through_remat(p, x):
    def step(carry, _):
        return jax.checkpoint(lambda p, h: (p, jnp.tanh(sum_of(p, x, h))))(*carry), None

    return lax.scan(step, (p, jnp.zeros((2, 7))), None, length=3)[0][1]


def fixed_point(p, x):
    z = x @ p["w"] + p["b"]

    def step(carry):
        p, h, _ = carry
        new = jnp.tanh(h @ p["u"] + z)
        return p, new, jnp.abs(new - h).max()

    carry = p, jnp.zeros((2, 7)), jnp.inf
    return lax.while_loop(lambda carry: carry[2] > 1e-3, step, carry)[1]


def gates_put_together(p, x, h):
    z = x @ jnp.concatenate([p["w1"], p["w2"]], 1) + h @ jnp.concatenate([p["u1"], p["u2"]], 1)
    first, last = jnp.split(z, 2, 1)
    return jnp.tanh(first) * jnp.tanh(last + p["b"])


def concatenated(p, x, h):
    return jnp.concatenate([x, h], -1) @ jnp.concatenate([p["w"], p["u"]]) + p["b"]


def mixed_context(p, query, keys):
    scores = jnp.tanh((query @ p["w"])[:, None] + keys @ p["u"] + p["b"])
    return jnp.einsum("bt,btk->bk", jax.nn.softmax(scores.sum(-1)), keys)


CELL = {"b": array(7), "u": array(7, 7), "w": array(5, 7)}
AXIS = {"b": array(4, 7), "u": array(7, 4, 7), "w": array(5, 4, 7)}
UNEVEN = r"u \(7, 28\): its nodes are cut, but not into equal gates; w \(5, 28\): its"


def rotated(p, x, angle):
    """A rotary embedding of queries that are adapted by a second, low-rank product."""
    q = jnp.einsum("bi,ihd->bhd", x, p["q"]) + jnp.einsum("br,rhd->bhd", x @ p["a"], p["b"])
    left, right = jnp.split(q, 2, -1)
    cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def two_branches(p, x, h):
    left, right = jnp.split(sum_of(p, x, h), 2, -1)
    return jnp.concatenate([jax.nn.relu(left), right], -1)


CELLS = {
    "cut by a rotary embedding": Case(
        plain(
            rotated,
            {"q": array(5, 2, 4), "a": array(5, 3), "b": array(3, 2, 4)},
            array(2, 5),
            array(2),
        ),
        [Layer({"q": (0, (1, 2)), "b": (0, (1, 2))}), one("a", bias=None)],
    ),
    "cut into branches": Case(plain(two_branches, FUSED, *STEP), [SUM]),
    "sum": Case(plain(sum_of, CELL, *STEP), [SUM]),
    "split after the sum": Case(plain(split_after, FUSED, *STEP), [GATES]),
    "split before the sum": Case(plain(split_before, FUSED, *STEP), [GATES]),
    "sliced": Case(plain(sliced, FUSED, *STEP), [GATES]),
    "reshaped": Case(plain(reshaped, FUSED, *STEP), [GATES]),
    "reshaped before the sum": Case(plain(reshaped_before, FUSED, *STEP), [GATES]),
    # The axis of the gates is the last in the order of the nodes.
    "an axis of gates": Case(
        plain(gates_have_an_axis, AXIS, *STEP),
        [Layer({"w": (0, (2, 1)), "u": (0, (2, 1))}, {"b": (1, 0)}, 4)],
    ),
    "gates that are not one after the other": Case(
        plain(interleaved, FUSED, *STEP), [], unsettled=UNEVEN
    ),
    "gates of different sizes": Case(plain(uneven, FUSED, *STEP), [], unsettled=UNEVEN),
    "gates in another order": Case(
        plain(crossed, {"w": array(5, 14), "u": array(7, 14)}, *STEP),
        [],
        unsettled="u .*: summed with other nodes of another kernel; w",
    ),
    "gates at places that are computed": Case(
        plain(sliced_dynamically, FUSED, *STEP), [], unsettled=UNEVEN
    ),
    "a hint wins": Case(plain(split_after, FUSED, *STEP), [SUM], {"gates": {"": 1}}),
    "a hint settles": Case(plain(interleaved, FUSED, *STEP), [SUM], {"gates": {"w": 1}}),
    "gated candidate": Case(plain(gated_candidate, CELL, *STEP), [SUM]),
    "dropout of one summand": Case(plain(dropped_out, CELL, *STEP, KEY), [SUM]),
    "scan": Case(plain(scanned, CELL, STEPS), [SUM]),
    "input projected outside": Case(plain(projected_outside, CELL, STEPS), [SUM]),
    "unrolled": Case(plain(unrolled, CELL, STEPS), [SUM]),
    "context projected outside": Case(
        plain(with_context, CELL, array(3, 2, 7), array(2, 5)), [SUM]
    ),
    "spiking neural unit": Case(plain(spiking, CELL, STEPS), [SUM._replace(biases={})]),
    "a learned decay": Case(
        plain(learned_decay, {"w": array(5, 7), "decay": array(7)}, STEPS), [one("w", bias=None)]
    ),
    "weights in the carry": Case(plain(weights_carried, CELL, array(2, 5)), [SUM]),
    "weights in the carry, through remat": Case(
        plain(weights_carried_through_remat, CELL, array(2, 5)), [SUM]
    ),
    "weights in the carry of while_loop": Case(plain(fixed_point, CELL, array(2, 5)), [SUM]),
    "kernels put together along the fan-in": Case(plain(concatenated, CELL, *STEP), [SUM]),
    "kernels put together along the nodes": Case(
        plain(
            gates_put_together,
            {
                "w1": array(5, 7),
                "w2": array(5, 7),
                "u1": array(7, 7),
                "u2": array(7, 7),
                "b": array(7),
            },
            *STEP,
        ),
        [Layer({"w1": (0, 1), "u1": (0, 1)}), Layer({"w2": (0, 1), "u2": (0, 1)}, {"b": 0})],
    ),
    "sum that broadcasts": Case(plain(mixed_context, CELL, array(2, 5), array(2, 4, 7)), [SUM]),
}

CASES: dict[str, Case] = {
    f"{name}: {row}": case
    for name, table in {
        "recurrent": RECURRENT,
        "cell": CELLS,
    }.items()
    for row, case in table.items()
}


@pytest.mark.parametrize("name", CASES)
def test_layers(name):
    assert_layers(inferred(CASES[name]), CASES[name].layers)
