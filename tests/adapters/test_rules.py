"""What holds for the rules in every framework alike."""

import asyncio
import copy
import functools
import gc
import inspect
import pickle
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import FRAMEWORKS, KEY, SIZES, factor, gradients_by_hand, value

from grapes_optax import alignment

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

X = jax.random.normal(jax.random.key(1), (4, 5))
ONE = X[0]
B = [np.asarray(jax.random.normal(jax.random.key(i), shape)) for i, shape in enumerate(
    [(5, 7), (7, 6), (6, 3)])]  # fmt: skip
DIRECT = [np.asarray(jax.random.normal(jax.random.key(i), (n, 3))) for i, n in enumerate(SIZES)]


@pytest.fixture(params=FRAMEWORKS, scope="module")
def run(request):
    return FRAMEWORKS[request.param]


@pytest.fixture(scope="module")
def model(run):
    return run.make()


def hidden(run):
    return lambda path: path in run.paths[:2]


def feedback_of(run, matrices=B):
    """Matrices, (inputs, nodes), as the feedback weights of the framework."""
    turned = run.grapes is FRAMEWORKS["equinox"].grapes and matrices is B
    return {p: jnp.asarray(b.T if turned else b) for p, b in zip(run.paths, matrices, strict=False)}


def loss(run, forward, **kwargs):
    def summed(arrays, x):
        return jnp.square(value(run, forward, run.build(arrays), x, **kwargs)).sum()

    return summed


def gradients(run, forward, model, x=X, transform=lambda f: f, **kwargs):
    grads = transform(jax.grad(loss(run, forward, **kwargs)))(run.arrays(model), x)
    return run.weights(run.build(grads))


def assert_close(actual, expected):
    for pair, desired in zip(actual, expected, strict=True):
        for leaf, by_hand in zip(pair, desired, strict=True):
            scale = np.abs(by_hand).max()
            np.testing.assert_allclose(leaf, by_hand, rtol=1e-4, atol=1e-5 * scale)


def expected(run, model, rule, x=X):
    weights = run.weights(model)
    factors = [*(factor(w) for w, _ in weights[:2]), 1.0]
    return {
        "plain": lambda: gradients_by_hand(weights, x),
        "propagated": lambda: gradients_by_hand(weights, x, factors),
        "aligned": lambda: gradients_by_hand(weights, x, back=B),
        "both": lambda: gradients_by_hand(weights, x, factors, back=B),
        "direct": lambda: gradients_by_hand(weights, x, direct=DIRECT),
        "direct and propagated": lambda: gradients_by_hand(weights, x, factors, direct=DIRECT),
    }[rule]()


def transformed(run, rule, forward=None):
    """A forward function under a rule, and the feedback weights that it takes."""
    grapes, forward = run.grapes, forward or run.forward
    propagated = functools.partial(grapes.propagated, where=hidden(run))
    aligned, direct = grapes.feedback_alignment, grapes.direct_feedback_alignment
    return {
        "plain": lambda: (forward, {}),
        "propagated": lambda: (propagated(forward), {}),
        "aligned": lambda: (aligned(forward), {"feedback": feedback_of(run)}),
        "both": lambda: (propagated(aligned(forward)), {"feedback": feedback_of(run)}),
        "direct": lambda: (direct(forward), {"feedback": feedback_of(run, DIRECT)}),
        "direct and propagated": lambda: (
            direct(propagated(forward)),
            {"feedback": feedback_of(run, DIRECT)},
        ),
    }[rule]()


RULES = ("plain", "propagated", "aligned", "both", "direct", "direct and propagated")
three_rules = pytest.mark.parametrize("rule", ["propagated", "aligned", "direct"])


# Gradients and values.


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_those_by_hand(run, model, rule):
    forward, kwargs = transformed(run, rule)
    assert_close(gradients(run, forward, model, **kwargs), expected(run, model, rule))
    values = (value(run, f, model, X, **k) for f, k in ((forward, kwargs), (run.forward, {})))
    np.testing.assert_array_equal(*values)


def test_composition_has_no_order(run, model):
    grapes, kwargs = run.grapes, {"feedback": feedback_of(run)}
    forward = grapes.feedback_alignment(grapes.propagated(run.forward, hidden(run)))
    assert_close(gradients(run, forward, model, **kwargs), expected(run, model, "both"))


def test_of_two_rules_of_a_kind_the_last_one_holds(run, model):
    forward = run.grapes.propagated(run.forward, hidden(run), control="mean")
    forward = run.grapes.propagated(forward, hidden(run))
    assert_close(gradients(run, forward, model), expected(run, model, "propagated"))


def test_the_outer_rule_holds_over_one_in_a_function_that_it_calls(run, model):
    inner = run.grapes.propagated(run.forward, hidden(run), control="mean")
    outer = run.grapes.propagated(lambda model, x: inner(model, x), hidden(run))
    assert_close(gradients(run, outer, model), expected(run, model, "propagated"))


def test_feedback_weights_with_two_arrays_for_one_layer(run, model):
    forward, kwargs = transformed(run, "aligned")
    doubled = {**kwargs["feedback"], "params": kwargs["feedback"]}
    with pytest.raises(ValueError, match=f"two arrays for {run.paths[0]}"):
        forward(model, ONE, feedback=doubled)


def test_feedback_weights_are_donated_by_their_name(run, model):
    forward, _ = transformed(run, "aligned")
    jax.jit(forward, donate_argnames=("feedback",))
    feedback = inspect.signature(forward).parameters["feedback"]
    assert feedback.kind == feedback.KEYWORD_ONLY


def test_feedback_weights_are_let_go(run, model):
    forward, kwargs = transformed(run, "aligned")
    forward(model, ONE, **kwargs)
    gone = [weakref.ref(leaf) for leaf in kwargs["feedback"].values()]
    del kwargs
    gc.collect()
    assert not any(ref() is not None for ref in gone)


def test_an_empty_batch(run, model):
    for rule in "aligned", "direct":
        forward, kwargs = transformed(run, rule)
        grads = gradients(run, forward, model, X[:0], **kwargs)
        assert all(not np.any(leaf) for pair in grads for leaf in pair)


@pytest.mark.parametrize("inner", ["propagated", "aligned"])
def test_transformed_function_that_is_called_by_another(run, model, inner):
    # The whole loss may be the forward function, and call one that is transformed already.
    forward, kwargs = transformed(run, inner)
    outer = run.grapes.propagated(lambda model, x: forward(model, x, **kwargs), hidden(run))
    rule = {"propagated": "propagated", "aligned": "both"}[inner]
    assert_close(gradients(run, outer, model), expected(run, model, rule))


def test_direct_feedback_within_another_rule(run, model):
    forward, kwargs = transformed(run, "direct")

    def square(model, x):
        return forward(model, x, **kwargs)

    outer = run.grapes.propagated(square, hidden(run))
    assert_close(gradients(run, outer, model), expected(run, model, "direct and propagated"))


def test_a_layer_has_one_kind_of_feedback(run, model):
    grapes = run.grapes
    forward = grapes.direct_feedback_alignment(grapes.feedback_alignment(run.forward))
    with pytest.raises(ValueError, match="choose one of them with `where`"):
        forward(model, ONE, feedback=feedback_of(run))


def test_logits_are_the_first_of_what_is_returned(run, model):
    forward, kwargs = transformed(
        run, "direct", lambda model, x: ((run.forward(model, x), {"x": x}), jnp.ones(2))
    )
    _, one = forward(model, ONE, **kwargs)
    np.testing.assert_array_equal(one, jnp.ones(2))
    first = lambda *args, **kwargs: forward(*args, **kwargs)[0][0]  # noqa: E731
    assert_close(gradients(run, first, model, **kwargs), expected(run, model, "direct"))
    forward, kwargs = transformed(run, "direct", lambda model, x: run.forward(model, x).sum())
    with pytest.raises(ValueError, match="must return one array with the classes on its last"):
        forward(model, ONE, **kwargs)


# Transformations of JAX.


@pytest.mark.parametrize("rule", ["both", "direct and propagated"])
@pytest.mark.parametrize("transform", ["jit", "checkpoint", "scan", "vmap", "shard_map"])
def test_transformations(run, model, rule, transform):
    forward, kwargs = transformed(run, rule)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    batch, whole = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()

    def each(gradient):
        return lambda arrays, x: jax.tree.map(
            lambda leaf: leaf.sum(0),
            jax.vmap(gradient, in_axes=(None, 0))(arrays, x[:, None]),
        )

    def sharded(gradient):
        # The gradient of what is whole on all devices is summed over them.
        specs = {"mesh": mesh, "in_specs": (whole, batch), "out_specs": whole}
        return jax.jit(jax.shard_map(gradient, **specs))

    def scanned(gradient):
        return lambda arrays, x: jax.tree.map(
            lambda leaf: leaf[0],
            jax.lax.scan(lambda carry, x: (carry, gradient(arrays, x)), 0, x[None])[1],
        )

    transforms = {
        "jit": jax.jit,
        "checkpoint": jax.checkpoint,
        "scan": scanned,
        "vmap": each,
        "shard_map": sharded,
    }
    actual = gradients(run, forward, model, transform=transforms[transform], **kwargs)
    assert_close(actual, expected(run, model, rule))


@pytest.mark.parametrize("rule", ["both", "direct and propagated"])
def test_checkpoint_around_the_function(run, model, rule):
    forward, kwargs = transformed(run, rule)
    summed = jax.checkpoint(loss(run, forward, **kwargs))
    grads = jax.jit(jax.grad(summed))(run.arrays(model), X)
    assert_close(run.weights(run.build(grads)), expected(run, model, rule))


def test_export(run, model):
    forward, kwargs = transformed(run, "both")
    arrays, tree = jax.tree.flatten(run.arrays(model))

    def gradient(leaves, x):
        arrays = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(jax.grad(loss(run, forward, **kwargs))(arrays, x))

    leaves = jax.export.export(jax.jit(gradient))(arrays, X).call(arrays, X)
    grads = run.build(jax.tree.unflatten(tree, leaves))
    assert_close(run.weights(grads), expected(run, model, "both"))


@three_rules
def test_one_trace_for_all_steps(run, model, rule):
    forward, kwargs = transformed(run, rule)

    traces = []

    @jax.jit
    def step(arrays, x, kwargs):
        traces.append(rule)
        return jax.grad(loss(run, forward, **kwargs))(arrays, x)

    same = run.arrays(model), X, kwargs
    for _ in range(5):
        step(*same)
    for _ in range(5):
        fresh = jax.tree.map(lambda leaf: leaf + 0, same)
        grads = step(*fresh)
    assert len(traces) == 1
    assert_close(run.weights(run.build(grads)), expected(run, model, rule))


@three_rules
def test_no_tracer_leaks(run, model, rule):
    forward, kwargs = transformed(run, rule)
    with jax.checking_leaks():
        actual = gradients(run, forward, model, transform=jax.jit, **kwargs)
    assert_close(actual, expected(run, model, rule))


# Nothing outlives a call, and nobody else sees it.


@three_rules
def test_plain_calls_before_and_after(run, model, rule):
    forward, kwargs = transformed(run, rule)
    step = jax.jit(jax.grad(loss(run, run.forward)))
    other = jax.jit(jax.grad(loss(run, forward, **kwargs)))
    for _ in range(2):
        plain, modulated = (run.weights(run.build(f(run.arrays(model), X))) for f in (step, other))
        assert_close(plain, expected(run, model, "plain"))
        assert_close(modulated, expected(run, model, rule))
        assert_close(gradients(run, run.forward, model), expected(run, model, "plain"))


@three_rules
def test_asyncio_tasks(run, model, rule):
    forward, kwargs = transformed(run, rule)

    async def train(forward, kwargs):
        for _ in range(3):
            result = gradients(run, forward, model, **kwargs)
            await asyncio.sleep(0)
        return result

    async def both():
        return await asyncio.gather(train(forward, kwargs), train(run.forward, {}))

    modulated, plain = asyncio.run(both())
    assert_close(modulated, expected(run, model, rule))
    assert_close(plain, expected(run, model, "plain"))


@three_rules
def test_threads_that_meet_within_the_call(run, model, rule):
    # Each thread stops within its call until the other is there too, on the same model.
    barrier, results = threading.Barrier(2, timeout=60), {}

    def meeting(model, x):
        barrier.wait()
        value = run.forward(model, x)
        barrier.wait()
        return value

    def work(name):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            forward, kwargs = transformed(run, name, meeting)
            one = value(run, forward, model, X, **kwargs)
            results[name] = one, gradients(run, forward, model, **kwargs)

    threads = [threading.Thread(target=work, args=(name,)) for name in (rule, "plain")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in (rule, "plain"):
        one, grads = results[name]
        np.testing.assert_array_equal(one, value(run, run.forward, model, X))
        assert_close(grads, expected(run, model, name))


@three_rules
def test_exceptions(run, model, rule):
    def raises(model, x):
        run.forward(model, x)
        raise RuntimeError("mine")

    forward, kwargs = transformed(run, rule, raises)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mine"):
            forward(model, ONE, **kwargs)
        assert_close(gradients(run, run.forward, model), expected(run, model, "plain"))
    forward, kwargs = transformed(run, rule)
    assert_close(gradients(run, forward, model, **kwargs), expected(run, model, rule))


@three_rules
def test_pickle_before_during_and_after(run, rule):
    model, within = run.make(), []

    def pickles(model, x):
        within.append(pickle.dumps(model))
        return run.forward(model, x)

    before = pickle.dumps(model)
    forward, kwargs = transformed(run, rule, pickles)
    forward(model, ONE, **kwargs)
    for data in before, *within, pickle.dumps(model):
        other = pickle.loads(data)
        assert [type(m) for m in jax.tree.leaves(other)] == [
            type(m) for m in jax.tree.leaves(model)
        ]
        assert_close(gradients(run, run.forward, other), expected(run, model, "plain"))


def test_transformed_functions_are_pickled(run, model):
    forward = run.grapes.feedback_alignment(run.grapes.propagated(run.forward))
    try:
        pickle.dumps(run.forward)
    except (pickle.PicklingError, AttributeError):
        pytest.skip("this forward function is not pickled itself")
    other = run.grapes.propagated(pickle.loads(pickle.dumps(forward)))
    assert len(other.rules) == 3
    kwargs = {"feedback": feedback_of(run)}
    values = (value(run, f, model, X, **kwargs) for f in (forward, other))
    np.testing.assert_array_equal(*values)


def test_the_function_bears_the_name_of_its_forward(run):
    def forward(model, x):
        """Mine."""
        return run.forward(model, x)

    for wrapped in run.grapes.propagated(forward), run.grapes.feedback_alignment(forward):
        assert (wrapped.__name__, wrapped.__doc__) == ("forward", "Mine.")
    assert str(inspect.signature(run.grapes.propagated(forward))) == "(model, x)"
    assert str(inspect.signature(wrapped)) == "(model, x, *, feedback)"


# Feedback weights.


def test_feedback_weights_are_drawn_for_the_layers(run, model):
    forward = run.grapes.feedback_alignment(run.forward)
    feedback = run.grapes.init_feedback(KEY, forward, model, ONE)
    assert tuple(feedback) == run.paths
    for path, (weight, _) in zip(run.paths, run.weights(model), strict=True):
        assert sorted(feedback[path].shape) == sorted(weight.shape)
        fan_in = weight.shape[0]
        assert 0.7 * np.sqrt(6 / fan_in) < jnp.abs(feedback[path]).max() <= np.sqrt(6 / fan_in)
    forward(model, ONE, feedback=feedback)

    direct = run.grapes.direct_feedback_alignment(run.forward)
    shapes = jax.tree.map(jnp.shape, run.grapes.init_feedback(KEY, direct, model, ONE))
    assert shapes == {run.paths[1]: (7, 3), run.paths[2]: (6, 3)}
    some = run.grapes.feedback_alignment(run.forward, hidden(run))
    assert set(run.grapes.init_feedback(KEY, some, model, ONE)) == set(run.paths[:2])

    small = jax.nn.initializers.variance_scaling(1e-6, "fan_in", "normal")
    scaled = run.grapes.init_feedback(KEY, forward, model, ONE, initializer=small)
    assert max(jnp.abs(leaf).max() for leaf in scaled.values()) < 0.01
    with pytest.raises(TypeError, match="made by feedback_alignment or"):
        run.grapes.init_feedback(KEY, run.forward, model, ONE)
    with pytest.raises(TypeError, match="made by feedback_alignment or"):
        run.grapes.init_feedback(forward, KEY, model, ONE)


def test_flags_are_handed_on_as_they_are(run, model):
    def flagged(model, x, train, *, mode):
        assert train is True
        assert mode == "fast"
        return run.forward(model, x)

    forward = run.grapes.feedback_alignment(flagged)
    assert len(run.grapes.init_feedback(KEY, forward, model, ONE, True, mode="fast")) == 3


def test_ones_own_matrix_for_one_layer(run, model):
    forward = run.grapes.feedback_alignment(run.forward)
    drawn = run.grapes.init_feedback(KEY, forward, model, ONE)
    mine = drawn | {path: feedback_of(run)[path] for path in run.paths[2:]}
    turned = {path: leaf.T if "weight" in path else leaf for path, leaf in mine.items()}
    actual = gradients(run, forward, model, feedback=mine)
    back = [np.asarray(turned[path]) for path in run.paths]
    assert_close(actual, gradients_by_hand(run.weights(model), X, back=back))


def test_feedback_weights_that_do_not_fit(run, model):
    forward, kwargs = transformed(run, "aligned")
    whole, last = kwargs["feedback"], run.paths[2]
    rest = {path: leaf for path, leaf in whole.items() if path != last}
    with pytest.raises(ValueError, match=f"no feedback weights for {run.paths[0]}"):
        forward(model, ONE)
    with pytest.raises(ValueError, match=f"no feedback weights for {last}"):
        forward(model, ONE, feedback=rest)
    typo = last.replace("2", "9").replace("layers/1", "layers/9")
    for wrong in rest | {typo: whole[last]}, whole | {typo: whole[last]}:
        with pytest.raises(ValueError, match=rf"for {typo},.*did you mean|for {last} .did you"):
            forward(model, ONE, feedback=wrong)
    with pytest.raises(ValueError, match=f"no feedback weights for {run.paths[0]}"):
        forward(model, ONE, feedback={"feedback": whole})  # one level too deep
    deep = rest | {"extra": whole}
    with pytest.raises(ValueError, match=f"no feedback weights for {last} .did you mean extra/"):
        forward(model, ONE, feedback=deep)
    with pytest.raises(ValueError, match=f"of {last} have shape"):
        forward(model, ONE, feedback=whole | {last: jnp.ones((2, 2))})


def test_trees_of_the_library_are_feedback_weights(run, model):
    # What has the paths of the kernels will do: another set of parameters without biases.
    forward = run.grapes.feedback_alignment(run.forward)
    other = run.make(seed=1)
    feedback = {path: leaf for path, leaf in leaves(run, other).items() if path in run.paths}
    back = [np.asarray(w) for w, _ in run.weights(other)]
    actual = gradients(run, forward, model, feedback=feedback)
    assert_close(actual, gradients_by_hand(run.weights(model), X, back=back))


def leaves(run, model):
    """Leaves by path, as `alignment` names them."""
    same = alignment(model, model)
    flat = [leaf for leaf in jax.tree.leaves(model) if hasattr(leaf, "dtype")]
    assert len(same) == len(flat)
    return dict(zip(same, flat, strict=True))


def test_alignment_takes_the_trees_of_the_framework(run, model):
    forward = run.grapes.feedback_alignment(run.forward)
    feedback = run.grapes.init_feedback(KEY, forward, model, ONE)
    result = alignment(feedback, model)
    assert set(result) == set(run.paths)
    for path, (weight, _) in zip(run.paths, run.weights(model), strict=True):
        b = feedback[path].T if "weight" in path else feedback[path]
        cosine = (b * weight).sum() / jnp.linalg.norm(b) / jnp.linalg.norm(weight)
        np.testing.assert_allclose(result[path].angle, np.degrees(np.arccos(cosine)), rtol=1e-4)


def test_kolen_pollack_gives_the_feedback_the_gradient_of_the_kernel(run, model):
    forward = run.grapes.feedback_alignment(run.forward, rule="kolen_pollack")
    feedback = feedback_of(run)

    def summed(arrays, feedback):
        return loss(run, forward, feedback=feedback)(arrays, X)

    grads, of_feedback = jax.grad(summed, argnums=(0, 1))(run.arrays(model), feedback)
    for path, (kernel, _) in zip(run.paths, run.weights(run.build(grads)), strict=True):
        leaf = of_feedback[path].T if "weight" in path else of_feedback[path]
        np.testing.assert_allclose(leaf, kernel, rtol=1e-6)


def test_unknown_rules(run):
    with pytest.raises(ValueError, match="Unknown rule 'sign': choose one of"):
        run.grapes.feedback_alignment(run.forward, rule="sign")
    with pytest.raises(ValueError, match="rule='fixed_sign' with feedback weights drawn anew"):
        run.grapes.feedback_alignment(run.forward, rule="random_sign")


# What is refused.


def test_what_is_no_forward_function(run, model):
    for wrong in "forward", jax.jit(lambda x: x):
        with pytest.raises(TypeError, match="A learning rule transforms a forward function"):
            run.grapes.propagated(wrong)
    with pytest.raises(TypeError, match="`where` must be a function of a path"):
        run.grapes.propagated(run.forward, "output")
    with pytest.raises(ValueError, match="Unknown control"):
        run.grapes.propagated(run.forward, control="shuffle")


@three_rules
def test_no_layer_reached(run, model, rule):
    rules = {
        "propagated": run.grapes.propagated,
        "aligned": run.grapes.feedback_alignment,
        "direct": run.grapes.direct_feedback_alignment,
    }
    nowhere = rules[rule](run.forward, lambda path: "nowhere" in path)
    with pytest.raises(ValueError, match=rf"No layer was reached.*called {run.paths[0]}"):
        nowhere(model, ONE)
    with pytest.raises(ValueError, match=r"No layer was reached.*called none"):
        rules[rule](lambda model, x: x)(model, ONE)


def test_several_models_of_which_one_has_no_layers(run, model):
    def both(model, temperature, x):
        return run.forward(model, x) * temperature["t"]

    forward = run.grapes.propagated(both, hidden(run))

    def summed(arrays):
        models = run.build(arrays), {"t": jnp.ones(())}
        return jnp.square(jax.vmap(functools.partial(forward, *models))(X)).sum()

    grads = jax.grad(summed)(run.arrays(model))
    assert_close(run.weights(run.build(grads)), expected(run, model, "propagated"))


def test_two_models_in_one_call(run, model):
    other = run.make(seed=1)

    def both(one, two, x):
        return run.forward(one, x), run.forward(two, x)

    forward = run.grapes.propagated(both, hidden(run))

    def summed(arrays):
        models = map(run.build, arrays)
        outs = jax.vmap(functools.partial(forward, *models))(X)
        return sum(jnp.square(out).sum() for out in outs)

    grads = jax.grad(summed)((run.arrays(model), run.arrays(other)))
    for gradient, one in zip(grads, (model, other), strict=True):
        assert_close(run.weights(run.build(gradient)), expected(run, one, "propagated"))


def test_gain_may_be_an_array(run, model):
    @jax.jit
    def step(arrays, gain):
        forward = run.grapes.propagated(run.forward, hidden(run), gain=gain)
        return jax.grad(loss(run, forward))(arrays, X)

    for gain in 2.0, 1.5:
        grads = step(run.arrays(model), jnp.float32(gain))
        weights = run.weights(model)
        factors = [*(factor(w, gain=gain) for w, _ in weights[:2]), 1.0]
        assert_close(run.weights(run.build(grads)), gradients_by_hand(weights, X, factors))


def test_copies_within_the_call_keep_the_rule(run, model):
    forward, kwargs = transformed(run, "both", lambda model, x: run.forward(copy.copy(model), x))
    assert_close(gradients(run, forward, model, **kwargs), expected(run, model, "both"))


# The modules.


def test_names(run):
    cells = ["SNU", "SoftSNU"] if hasattr(run.grapes, "SNU") else []
    names = ["direct_feedback_alignment", "feedback_alignment", "init_feedback", "propagated"]
    public = [name for name in dir(run.grapes) if not name.startswith("_")]
    assert public == cells + names


def test_one_signature_in_all_frameworks():
    for name in "propagated", "feedback_alignment", "direct_feedback_alignment", "init_feedback":
        functions = [getattr(run.grapes, name) for run in FRAMEWORKS.values()]
        assert len({str(inspect.signature(f)) for f in functions}) == 1
        assert len({f.__doc__ for f in functions}) == 1
