"""Tables that are looked up, by whatever means, and kernels that look like them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from programs import TOKENS, Case, Layer, array, assert_layers, by_leaf, inferred, one, plain

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

IDS = array(6, dtype=jnp.int32)
NET = {"table": array(9, 5), "w": array(5, 7), "b": array(7)}
HIDDEN = [one("w", bias="b")]


def net(look_up):
    """A network that reads what is looked up."""

    def apply(p, ids, *more):
        return jnp.tanh(look_up(p["table"], ids, *more) @ p["w"] + p["b"])

    return apply


def eye(table, ids):
    return jnp.eye(9)[ids] @ table


def by_where(table, ids):
    return jnp.where(ids[:, None] == jnp.arange(9), 1.0, 0.0) @ table


def padded(table, ids):
    return (jax.nn.one_hot(ids, 9) * (ids > 0)[:, None]) @ table


def where_valid(table, ids):
    return jnp.where((ids > 0)[:, None], jax.nn.one_hot(ids, 9), 0) @ table


def weighted(table, ids, x):
    return (jax.nn.one_hot(ids, 9) * x[:, None]) @ table


def mapped(table, ids):
    return jax.vmap(lambda i: jax.nn.one_hot(i, 9) @ table)(ids)


def scanned(table, ids):
    return lax.scan(lambda _, i: (None, jax.nn.one_hot(i, 9) @ table), None, ids)[1]


def flattened(table, ids):
    rows = jax.nn.one_hot(ids.reshape(2, 3), 9).reshape(6, 9)
    return rows @ table


def counted_from_one(table, ids):
    return (ids[:, None] == jnp.arange(9) + 1).astype(table.dtype) @ table


def difference(table, ids):
    return (ids[:, None] - jnp.arange(9) == 0).astype(table.dtype) @ table


def captured_count(table, ids):
    return (ids[:, None] == np.arange(9)).astype(table.dtype) @ table


def transposed(table, ids):
    return jnp.einsum("vf,vt->tf", table, jax.nn.one_hot(ids, 9, axis=0))


def from_a_choice(table, ids, x):
    """The index may be computed from activations: a codebook."""
    return jax.nn.one_hot(jnp.argmax(x[:, None] * jnp.ones(9), -1), 9) @ table


LOOK_UPS = {
    "gather": (lambda table, ids: table[ids],),
    "one_hot": (lambda table, ids: jax.nn.one_hot(ids, 9) @ table,),
    "one_hot in bfloat16": (
        lambda table, ids: jax.nn.one_hot(ids, 9, dtype=jnp.bfloat16) @ table.astype(jnp.bfloat16),
    ),
    "eye": (eye,),
    "where": (by_where,),
    "padded": (padded,),
    "where valid": (where_valid,),
    "weighted": (weighted, array(6)),
    "vmap": (mapped,),
    "scan": (scanned,),
    "flattened": (flattened,),
    "counted from one": (counted_from_one,),
    "difference": (difference,),
    "captured count": (captured_count,),
    "transposed": (transposed,),
    "from a choice": (from_a_choice, array(6)),
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups(name):
    look_up, *more = LOOK_UPS[name]
    assert_layers(inferred(Case(plain(net(look_up), NET, IDS, *more), HIDDEN)), HIDDEN)


# Relative positions: the index is computed from nothing that is passed.


def relative(p, x):
    n = x.shape[0]
    distance = jnp.clip(jnp.arange(n)[:, None] - jnp.arange(n) + 4, 0, 8)
    bias = jnp.einsum("hb,qkb->hqk", p["relative"], jax.nn.one_hot(distance, 9))
    return jax.nn.softmax(jnp.einsum("qd,hde->hqe", x, p["w"]) @ x.T + bias) @ x


def relative_of_captured(p, x):
    index = np.abs(np.subtract.outer(np.arange(6), np.arange(6)))
    return jax.nn.softmax(jnp.einsum("qd,hde->hqe", x, p["w"]) @ x.T + p["relative"][:, index]) @ x


RELATIVE = {"relative": array(2, 9), "w": array(2, 5, 5)}


@pytest.mark.parametrize("function", [relative, relative_of_captured])
def test_relative_positions(function):
    layers = [one("w", 1, (0, 2), None)]
    assert_layers(inferred(Case(plain(function, RELATIVE, array(6, 5)), layers)), layers)


def test_a_table_that_is_a_kernel_too():
    def tied(p, ids):
        x = jax.nn.one_hot(ids, 9) @ p["table"]
        return jnp.tanh(x @ p["w"] + p["b"]) @ p["w"].T @ p["table"].T

    params = {"table": array(9, 5), "w": array(5, 7), "b": array(7)}
    case = Case(plain(tied, params, IDS), [], unsettled=r"table \(9, 5\): used in two ways; w")
    assert_layers(inferred(case), [])


def test_a_token_added_to_a_pre_activation():
    def step(p, ids, x):
        h = x
        for i in range(3):
            h = jnp.tanh(jax.nn.one_hot(ids[i], 9) @ p["table"] + h @ p["u"] + p["b"])
        return h

    params = {"table": array(9, 5), "u": array(5, 5), "b": array(5)}
    layers = [one("u", bias="b")]
    assert_layers(inferred(Case(plain(step, params, IDS, array(5)), layers)), layers)


# Kernels.


def spikes(p, x):
    return (jnp.tanh(x @ p["w"] + p["b"]) > 0).astype(float) @ p["v"]


def winner(p, x):
    """The largest compares with data, not with a count."""
    z = jnp.tanh(x @ p["w"] + p["b"])
    return (z == z.max(-1, keepdims=True)).astype(float) @ p["v"]


def levels(p, x):
    """A comparison with a count along another axis than the product sums over."""
    z = jnp.tanh(x @ p["w"] + p["b"])
    return (jnp.round(z)[:, None] == jnp.arange(4)[:, None]).astype(float) @ p["v"]


def thermometer(p, x):
    """Cumulative, not one-hot."""
    z = jnp.tanh(x @ p["w"] + p["b"]).sum(-1)
    return (z[:, None] > jnp.arange(7)).astype(float) @ p["v"]


def each_its_own(p, x):
    """Every entry is compared with its own number: any of them may be equal."""
    z = jnp.tanh(x @ p["w"] + p["b"])
    return (jnp.round(z) == jnp.arange(7)).astype(float) @ p["v"]


def smoothed(p, x):
    """As one-hot as a softmax is."""
    z = jnp.tanh(x @ p["w"] + p["b"])
    return (0.9 * jax.nn.one_hot(jnp.argmax(z, -1), 7) + 0.1 * jax.nn.softmax(z)) @ p["v"]


def bag_of_words(p, x):
    z = jnp.tanh(x @ p["w"] + p["b"])
    return jax.nn.one_hot(jnp.round(z).astype(int), 7).sum(1) @ p["v"]


def masked(p, x):
    return jnp.tanh(x @ (p["w"] * (1 - jnp.eye(5, 7))) + p["b"]) @ p["v"]


@pytest.mark.parametrize(
    "function",
    [spikes, winner, levels, thermometer, each_its_own, smoothed, bag_of_words, masked],
)
def test_kernels(function):
    params = {"w": array(5, 7), "b": array(7), "v": array(7, 3)}
    layers = [one("w", bias="b"), one("v", bias=None)]
    assert_layers(inferred(Case(plain(function, params, array(2, 5)), layers)), layers)


# Experts chosen by a router: what is looked up there is a kernel.

EXPERTS = {"router": array(5, 4), "up": array(4, 5, 6), "down": array(4, 6, 5)}
ROUTED = [one("router", bias=None), one("up", 1, 2, None), one("down", 1, 2, None)]


def route(p, x):
    gate = jax.nn.softmax(x @ p["router"])
    return gate, jax.nn.one_hot(jnp.argmax(gate, -1), 4)


def dispatched(p, x):
    """With places in the buffer of each expert (Switch Transformer)."""
    gate, chosen = route(p, x)
    place = (jnp.cumsum(chosen, 0) * chosen).sum(-1).astype(int)
    dispatch = chosen[:, :, None] * jax.nn.one_hot(place, 3)[:, None]
    combine = dispatch * gate[:, :, None]
    inside = jnp.einsum("tec,td->ecd", dispatch, x)
    inside = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", inside, p["up"]))
    return jnp.einsum("tec,ecd->td", combine, jnp.einsum("ecf,efd->ecd", inside, p["down"]))


def selected(p, x):
    """The kernels of the expert that was chosen."""
    _, chosen = route(p, x)
    up = jnp.einsum("te,edf->tdf", chosen, p["up"])
    down = jnp.einsum("te,efd->tfd", chosen, p["down"])
    return jnp.einsum("tf,tfd->td", jax.nn.gelu(jnp.einsum("td,tdf->tf", x, up)), down)


def placed(p, x):
    """Activations in the place of their expert, zeros elsewhere."""
    _, chosen = route(p, x)
    inside = jax.nn.gelu(jnp.einsum("ted,edf->tf", chosen[:, :, None] * x[:, None], p["up"]))
    return jnp.einsum("te,tf,efd->td", chosen, inside, p["down"])


def all_of_them(p, x):
    _, chosen = route(p, x)
    inside = jax.nn.gelu(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,ted->td", chosen, jnp.einsum("tef,efd->ted", inside, p["down"]))


@pytest.mark.parametrize("function", [dispatched, selected, placed, all_of_them])
def test_experts(function):
    found = inferred(Case(plain(function, EXPERTS, array(6, 5)), ROUTED))
    if function is all_of_them:
        # Every expert reads every input: to the program a layer with more nodes.
        assert by_leaf(found)["up"][:2] == ((1,), (0, 2))
        assert by_leaf(found)["down"][:2] == ((1,), (2,))
    else:
        assert_layers(found, ROUTED)


def test_cross_entropy_by_one_hot():
    def loss(p, x, ids):
        z = jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
        return optax.softmax_cross_entropy(z, jax.nn.one_hot(ids, 3)).mean()

    params = {"w": array(5, 7), "b": array(7), "v": array(7, 3)}
    layers = [one("w", bias="b"), one("v", bias=None)]
    assert_layers(inferred(Case(plain(loss, params, array(6, 5), IDS), layers)), layers)


def test_tokens_of_two_axes():
    layers = [Layer({"w": (0, 1)}, {"b": 0})]
    function = net(lambda table, ids: jax.nn.one_hot(ids, 9) @ table)
    assert_layers(inferred(Case(plain(function, NET, TOKENS), layers)), layers)
