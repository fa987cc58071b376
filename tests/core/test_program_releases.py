"""Programs as a coming release of JAX may write them: read rightly, or left alone with a reason."""

import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from programs import array, by_leaf

from grapes_optax import infer_dimension_numbers

PARAMS = {"w": array(5, 7), "v": array(7, 3)}
X = array(2, 5)


def as_written(change):
    """`jax.make_jaxpr`, but for what `change` makes of the name and parameters of equations."""
    make = jax.make_jaxpr

    def rewritten(jaxpr):
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        if not hasattr(inner, "eqns"):
            return jaxpr
        eqns = []
        for eqn in inner.eqns:
            params = {
                key: type(value)(map(rewritten, value))
                if type(value) in (tuple, list)
                else rewritten(value)
                for key, value in eqn.params.items()
            }
            name, params = change(eqn.primitive.name, params, eqn)
            eqns.append(
                SimpleNamespace(
                    primitive=SimpleNamespace(name=name),
                    params=params,
                    invars=eqn.invars,
                    outvars=eqn.outvars,
                )
            )
        return SimpleNamespace(
            eqns=eqns,
            invars=inner.invars,
            outvars=inner.outvars,
            constvars=inner.constvars,
            consts=getattr(jaxpr, "consts", ()),
        )

    return lambda function: lambda *args: rewritten(make(function)(*args))


def read(monkeypatch, function, change, params=PARAMS):
    monkeypatch.setattr(jax, "make_jaxpr", as_written(change))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = infer_dimension_numbers(function, params, X, modulate_output=True)
    return by_leaf(found), " ".join(str(warning.message) for warning in said)


def reordered(p, x):
    return jnp.tanh(x @ p["w"].T.T) @ p["v"]


def scanned(p, x):
    h = lax.scan(lambda h, _: (jnp.tanh(x @ p["w"] + h), h), jnp.zeros((2, 7)), None, 3)[0]
    return h @ p["v"]


def looped(p, x):
    h = lax.while_loop(lambda h: h.sum() < 1, lambda h: jnp.tanh(x @ p["w"] + h), jnp.zeros((2, 7)))
    return h @ p["v"]


def chosen(p, x):
    return lax.cond(x.sum() > 0, lambda: x @ p["w"], lambda: jnp.zeros((2, 7))) @ p["v"]


def called(p, x):
    return jax.jit(lambda: jnp.tanh(x @ p["w"]))() @ p["v"]


def sliced(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"][:, :2]


def reshaped(p, x):
    return jnp.tanh(x @ p["w"].reshape(5, 7, 1)[..., 0]) @ p["v"]


def gathered(p, x):
    return jnp.tanh(x @ p["w"].reshape(1, 5, 7)[jnp.arange(1)][0]) @ p["v"]


def broadcast(p, x):
    return jnp.tanh(jnp.einsum("bi,bio->bo", x, jnp.broadcast_to(p["w"], (2, 5, 7)))) @ p["v"]


def convolved(p, x):
    kernel = p["w"].T.reshape(7, 5, 1)
    return jnp.tanh(lax.conv(x[:, :, None], kernel, (1,), "VALID")[..., 0]) @ p["v"]


def joined(p, x):
    both = jnp.concatenate([p["w"], jnp.zeros((5, 7))], 1)
    return jnp.tanh(x @ both)[:, :7] @ p["v"]


# A program for each operation, and the leaves that go through it.
FUNCTIONS = {
    "broadcast_in_dim": (broadcast, {"w"}),
    "concatenate": (joined, {"w"}),
    "cond": (chosen, {"w"}),
    "conv_general_dilated": (convolved, {"w"}),
    "dot_general": (reordered, {"w", "v"}),
    "gather": (gathered, {"w"}),
    "jit": (called, {"w"}),
    "reshape": (reshaped, {"w"}),
    "scan": (scanned, {"w"}),
    "slice": (sliced, {"v"}),
    "squeeze": (reshaped, {"w"}),
    "transpose": (reordered, {"w"}),
    "while": (looped, {"w"}),
}


def changed(name, what):
    def change(found, params, eqn):
        if found != name:
            return found, params
        return {
            "renamed": (found, {f"the_{key}": value for key, value in params.items()}),
            "removed": (found, {}),
            "added": (found, params | {"order": "F"}),
            "of another type": (found, {key: object() for key in params}),
            "unknown": ("new_primitive", params),
        }[what]

    return change


HOW = ["renamed", "removed", "added", "of another type", "unknown"]
# Bodies are known as such, and their inputs by their shapes.
READ = {(name, what) for name in ("cond", "jit", "scan") for what in ("renamed", "added")}
READ |= {("while", "added")}


@pytest.mark.parametrize("what", HOW)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equations_that_are_written_in_another_way(monkeypatch, name, what):
    """What is answered is right, and the rest is left alone because of the operation."""
    function, through = FUNCTIONS[name]
    right, nothing = read(monkeypatch, function, lambda name, params, eqn: (name, params))
    assert (right.keys(), nothing) == (PARAMS.keys(), "")
    found, said = read(monkeypatch, function, changed(name, what))
    lost = set() if (name, what) in READ else through
    assert found == {path: right[path] for path in right if path not in lost}
    for path in lost:
        new = "new_primitive" if what == "unknown" else rf"{name}, which JAX writes in an unknown"
        assert re.search(rf"{path} \(\d, \d\): goes through {new}", said), said


def test_counts_that_do_not_add_up(monkeypatch):
    def change(name, params, eqn):
        return name, params | {"num_consts": 7} if name == "scan" else params

    found, said = read(monkeypatch, scanned, change)
    assert found.keys() == {"v"}
    assert re.search(r"w .*: goes through scan, which JAX writes in an unknown way: counts", said)


def test_a_parameter_that_is_not_set_changes_nothing(monkeypatch):
    def change(name, params, eqn):
        return name, params | {"a": None, "b": False, "c": ()}

    found, said = read(monkeypatch, reordered, change)
    assert found.keys() == {"w", "v"}
    assert said == ""


def test_results_of_another_shape(monkeypatch):
    def change(name, params, eqn):
        return name, params | {"permutation": (0, 0)} if name == "transpose" else params

    found, said = read(monkeypatch, reordered, change)
    assert found.keys() == {"v"}
    assert "goes through transpose, which JAX writes in an unknown way: results of" in said


def test_a_body_of_other_shapes(monkeypatch):
    body = jax.make_jaxpr(jnp.sin)(1.0)

    def with_body(name, params, eqn):
        return name, params | {"jaxpr": body} if name == "jit" else params

    found, said = read(monkeypatch, called, with_body)
    assert found.keys() == {"v"}
    assert "goes through jit, which JAX writes in an unknown way: shapes" in said


def test_arrays_that_are_changed_in_place():
    def function(p, x):
        total = jax.new_ref(jnp.zeros((2, 7)))
        total[...] = jnp.tanh(x @ p["w"])
        return total[...] @ p["v"]

    found = by_leaf(infer_dimension_numbers(function, PARAMS, X, modulate_output=True))
    assert (found["w"][:2], found["v"][:2]) == (((0,), (1,)),) * 2


def test_a_kernel_in_an_array_that_is_changed_in_place():
    def function(p, x):
        kernel = jax.new_ref(p["w"])
        return jnp.tanh(x @ kernel[...]) @ p["v"]

    with pytest.warns(UserWarning, match=r"w \(5, 7\): goes through"):
        found = by_leaf(infer_dimension_numbers(function, PARAMS, X, modulate_output=True))
    assert found["v"][:2] == ((0,), (1,))
