"""scale_by_grapes and the aliases as citizens of Optax."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from grapes_optax import (
    DimensionNumbers,
    by_path,
    grapes_rmsprop,
    grapes_sgd,
    scale_by_grapes,
    scale_by_outgoing_importance,
)

RNG = np.random.default_rng(0)


def layer(inputs, nodes, dtype=np.float32):
    kernel = RNG.normal(size=(inputs, nodes)) * np.exp(RNG.normal(size=nodes))
    return {
        "kernel": jnp.asarray(kernel, dtype),
        "bias": jnp.asarray(RNG.normal(size=nodes), dtype),
    }


PARAMS = {"hidden": layer(5, 7), "output": layer(7, 3)}
GRADS = {"hidden": layer(5, 7), "output": layer(7, 3)}
HIDDEN = by_path(where=lambda path: path.startswith("hidden"))


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def modulated(grads, params, layers=("hidden", "output"), **options):
    """The local form by the reference, on trees of dense layers."""
    result = {name: dict(leaves) for name, leaves in grads.items()}
    for name in layers:
        kernel = params[name]["kernel"]
        result[name]["kernel"] = reference.scale(grads[name]["kernel"], kernel, 0, 1, **options)
        factor = reference.factor(reference.node_importance(kernel, 0, 1), 1, **options)
        result[name]["bias"] = np.asarray(grads[name]["bias"]) * factor
    return result


def run(tx, params=PARAMS, grads=GRADS, steps=1):
    """Updates of the last of several steps with the same gradient."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(grads, state, params)
        if step < steps - 1:
            params = optax.apply_updates(params, updates)
    return updates


def assert_close(actual, desired, rtol=2e-6):
    chex.assert_trees_all_close(actual, jax.tree.map(jnp.asarray, desired), rtol=rtol)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gain": 3.0, "bounds": None},
        {"gain": 1.0, "bounds": None, "normalization": "mean"},
        {"control": "mean"},
        {"control": "roll", "bounds": (0.5, 1.5)},
        {"control": "reverse"},
    ],
)
def test_agrees_with_the_reference(options):
    assert_close(run(scale_by_grapes(**options)), modulated(GRADS, PARAMS, **options))


def test_state_is_empty_and_parameters_are_read_at_every_step():
    transformation = scale_by_grapes()
    state = transformation.init(PARAMS)
    assert state == optax.EmptyState()
    for params in PARAMS, GRADS:
        updates, state = transformation.update(GRADS, state, params)
        assert state == optax.EmptyState()
        assert_close(updates, modulated(GRADS, params))


def test_parameters_are_required():
    transformation = scale_by_grapes()
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        transformation.update(GRADS, transformation.init(PARAMS))


KERNELS = {name: jnp.ones((5, 5)) for name in "abc"}


@pytest.mark.parametrize("form", ["incoming", "outgoing"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree | {"b": jnp.ones((1, 5))}, r"b has the shape \(1, 5\) .*, and \(5, 5\)"),
        (lambda tree: tree | {"b": jnp.ones((3, 5, 5))}, r"b has the shape \(3, 5, 5\)"),
        (lambda tree: {"params": {"net": tree}}, "missing among the parameters"),
        (
            lambda tree: {"a": tree["a"], "b": tree["b"]},
            "c has the shape missing among the updates",
        ),
        (lambda tree: tree | {"d": jnp.ones(3)}, "d has the shape .*missing among the parameters"),
    ],
)
def test_updates_of_another_tree(form, change, message):
    tx = {
        "incoming": scale_by_grapes(DimensionNumbers()),
        "outgoing": scale_by_outgoing_importance(["a", "b", "c"]),
    }[form]
    for update in tx.update, jax.jit(tx.update):
        with pytest.raises(ValueError, match=message):
            update(change(KERNELS), tx.init(KERNELS), KERNELS)


@pytest.mark.parametrize("torn", ["i", "h"])
def test_a_part_of_a_layer_in_another_partition(torn):
    params = {"cell": {"i": layer(5, 7), "h": layer(7, 7)}, "Dense_0": layer(7, 7)}
    labels = {"cell": {"i": "on", "h": "on"} | {torn: "off"}, "Dense_0": "on"}
    descriptions = [
        None,
        by_path(),
        by_path()(params),
        {"cell": DimensionNumbers(group="z"), "Dense_0": None},
    ]
    if torn == "i":  # a bias is none of the kernels of rank 2 that the last one describes
        descriptions.pop()
    for description in descriptions:
        tx = optax.partition(
            {"on": scale_by_grapes(description), "off": optax.set_to_zero()}, labels
        )
        with pytest.raises(ValueError, match=rf"cell/{torn}(/kernel)? is masked or in another"):
            tx.init(params)


@pytest.mark.parametrize("make", [scale_by_grapes, lambda **kw: grapes_sgd(0.1, **kw)])
@pytest.mark.parametrize(
    "options",
    [
        {"bounds": (2, 1)},
        {"bounds": (-1, 1)},
        {"normalization": "sum"},
        {"control": "shuffle"},
        {"gain": -1},
    ],
)
def test_wrong_options_are_refused_at_once(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


@pytest.mark.parametrize(
    "dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128]
)
@pytest.mark.parametrize("same", [True, False])
def test_updates_keep_their_dtype(dtype, same):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        params = {"hidden": layer(5, 7, dtype if same else np.float32)}
        grads = {"hidden": layer(5, 7, dtype)}
        updates = run(scale_by_grapes(), params, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        wide = jax.tree.map(lambda x: np.asarray(x, np.complex128), (grads, params))
        expected = modulated(*wide, layers=["hidden"])
        for name in "kernel", "bias":
            actual = np.asarray(updates["hidden"][name], np.complex128)
            tolerance = max(float(jnp.finfo(dtype).eps), 2e-7 if not same else 0)
            np.testing.assert_allclose(actual, expected["hidden"][name], rtol=2 * tolerance)


# Optax's wrappers and combinators


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.named_chain(("grapes", tx), ("nothing", optax.identity())),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.with_extra_args_support(tx),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.partition({"a": tx, "b": optax.set_to_zero()}, "a"),
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    ],
)
def test_under_the_wrappers_of_optax(wrap):
    expected = jax.tree.map(lambda x: -0.1 * x, modulated(GRADS, PARAMS, ["hidden"]))
    tx = wrap(optax.chain(scale_by_grapes(HIDDEN), optax.sgd(0.1)))
    assert_close(run(tx), expected)


def test_multisteps_modulates_the_mean():
    tx = optax.MultiSteps(scale_by_grapes(), 2).gradient_transformation()
    assert_close(run(tx, steps=2), modulated(GRADS, PARAMS))


def test_masked_output_layer():
    mask = {"hidden": True, "output": False}
    assert_close(run(optax.masked(scale_by_grapes(), mask)), modulated(GRADS, PARAMS, ["hidden"]))


@pytest.mark.parametrize("description", [None, HIDDEN, HIDDEN(PARAMS), DimensionNumbers(0, 1)])
def test_bias_whose_kernel_is_in_another_partition_passes_through(description):
    kernels = jax.tree.map(lambda x: x.ndim == 2, PARAMS)
    biases = jax.tree.map(lambda x: x.ndim == 1, PARAMS)
    transformation = scale_by_grapes(description)
    with pytest.warns(UserWarning, match=r"biases whose kernels are masked .*hidden/bias \(7,\)"):
        assert_close(run(optax.masked(transformation, biases)), GRADS)
    layers = ["hidden"] if description in (HIDDEN, HIDDEN(PARAMS)) else ["hidden", "output"]
    expected = modulated(GRADS, PARAMS, layers)
    for name in expected:
        expected[name]["bias"] = GRADS[name]["bias"]
    assert_close(run(optax.masked(transformation, kernels)), expected)


def test_flatten_leaves_no_layers():
    assert_close(run(optax.flatten(scale_by_grapes())), GRADS)


def test_inject_a_schedule_of_the_gain():
    schedule = optax.linear_schedule(1.0, 3.0, 2)
    tx = optax.inject_hyperparams(scale_by_grapes)(gain=schedule, bounds=None)
    state = tx.init(PARAMS)
    for gain in 1.0, 2.0, 3.0, 3.0:
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        assert state.hyperparams["gain"] == gain
        assert_close(updates, modulated(GRADS, PARAMS, gain=gain, bounds=None))


def test_inject_into_the_aliases():
    make = optax.inject_hyperparams(grapes_sgd, static_args="weight_dimension_numbers")
    tx = make(optax.linear_schedule(0.1, 0.2, 1), weight_dimension_numbers=HIDDEN)
    state = tx.init(PARAMS)
    for rate in 0.1, 0.2:
        updates, state = tx.update(GRADS, state, PARAMS)
        expected = modulated(GRADS, PARAMS, ["hidden"])
        assert_close(updates, jax.tree.map(lambda x, r=rate: -r * x, expected))


def test_learning_rate_schedule():
    tx = grapes_sgd(optax.linear_schedule(0.0, 1.0, 2))
    chex.assert_trees_all_equal(run(tx), jax.tree.map(lambda x: -0 * x, GRADS))
    assert float(jnp.abs(run(tx, steps=2)["hidden"]["kernel"]).max()) > 0


def test_map_params_and_extra_arguments():
    tx = optax.chain(scale_by_grapes(), optax.adam(0.1))
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
    transformation = scale_by_grapes()
    assert isinstance(transformation, optax.GradientTransformationExtraArgs)
    updates, _ = transformation.update(GRADS, optax.EmptyState(), PARAMS, value=1.0, other="x")
    assert_close(updates, modulated(GRADS, PARAMS))


@pytest.mark.parametrize("tree", [{}, (), [], jnp.ones(()), 1.0, {"a": None, "b": 2.0}])
def test_trees_without_layers(tree):
    transformation = scale_by_grapes()
    updates, _ = transformation.update(tree, transformation.init(tree), tree)
    chex.assert_trees_all_equal(updates, tree)


def test_none_and_masked_leaves():
    params = {"hidden": PARAMS["hidden"], "frozen": None, "masked": optax.MaskedNode()}
    grads = {"hidden": {"kernel": None, "bias": GRADS["hidden"]["bias"]}} | {
        "frozen": None,
        "masked": optax.MaskedNode(),
    }
    for description in (
        None,
        DimensionNumbers(),
        {"hidden": DimensionNumbers(), "frozen": None, "masked": DimensionNumbers()},
    ):
        updates, _ = scale_by_grapes(description).update(grads, optax.EmptyState(), params)
        chex.assert_trees_all_equal_structs(updates, grads)
        expected = modulated(GRADS, PARAMS)["hidden"]["bias"]
        np.testing.assert_allclose(updates["hidden"]["bias"], expected, rtol=2e-6)


# Transforms of JAX


def test_vmap_over_seeds():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), PARAMS, GRADS)
    transformation = scale_by_grapes()
    updates, _ = jax.vmap(transformation.update)(stacked, optax.EmptyState(), stacked)
    for i, params in enumerate((PARAMS, GRADS)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], updates), modulated(params, params))


def test_scan_and_one_trace():
    tx = grapes_sgd(0.1, momentum=0.9)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(5):
        params, state = step(params, state)
    scanned, _ = jax.lax.scan(
        lambda carry, _: (step(*carry), None), (PARAMS, tx.init(PARAMS)), length=5
    )
    assert_close(scanned[0], params)


def test_eval_shape_and_donation():
    tx = grapes_sgd(0.1)
    state = tx.init(PARAMS)
    shapes, _ = jax.eval_shape(tx.update, GRADS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, GRADS)
    step = jax.jit(
        lambda params, grads: optax.apply_updates(params, tx.update(grads, state, params)[0]),
        donate_argnums=0,
    )
    params = jax.tree.map(jnp.copy, PARAMS)
    result = step(params, GRADS)
    assert params["hidden"]["kernel"].is_deleted()
    assert_close(result, jax.tree.map(lambda p, u: p - 0.1 * u, PARAMS, modulated(GRADS, PARAMS)))


def test_non_finite_layer_stays_apart():
    params = {"hidden": {"kernel": PARAMS["hidden"]["kernel"].at[0, 0].set(jnp.nan)}} | {
        "output": PARAMS["output"]
    }
    grads = {"hidden": {"kernel": GRADS["hidden"]["kernel"]}, "output": GRADS["output"]}
    updates = run(scale_by_grapes(), params, grads)
    assert jnp.isnan(updates["hidden"]["kernel"]).all()
    assert_close(updates["output"], modulated(grads, params, ["output"])["output"])


def test_non_finite_gradient_is_skipped():
    grads = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADS)
    updates = run(optax.apply_if_finite(scale_by_grapes(), 3), grads=grads)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads))


# The aliases


@pytest.mark.parametrize(
    ("alias", "optimizer"), [(grapes_sgd, optax.sgd), (grapes_rmsprop, optax.rmsprop)]
)
def test_drop_in_for_optax(alias, optimizer):
    ours = list(inspect.signature(alias).parameters.values())
    theirs = list(inspect.signature(optimizer).parameters.values())
    for mine, its in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (its.name, its.default, its.kind)
    extra = ours[len(theirs) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)
    options = inspect.signature(scale_by_grapes).parameters
    assert {p.name: p.default for p in extra} == {p: options[p].default for p in options} | {
        "modulate": "gradients"
    }
    assert inspect.signature(alias).parameters["learning_rate"].annotation == (
        optax.ScalarOrSchedule
    )


ALIASES = [
    (grapes_sgd, optax.sgd, {"momentum": 0.9, "nesterov": True, "accumulator_dtype": jnp.float16}),
    (grapes_sgd, optax.sgd, {}),
    (grapes_rmsprop, optax.rmsprop, {}),
    (
        grapes_rmsprop,
        optax.rmsprop,
        {
            "decay": 0.7,
            "eps": 1e-3,
            "initial_scale": 1.0,
            "eps_in_sqrt": False,
            "centered": True,
            "momentum": 0.5,
            "nesterov": True,
            "bias_correction": True,
        },
    ),
]


@pytest.mark.parametrize("modulate", ["gradients", "updates"])
@pytest.mark.parametrize(("alias", "optimizer", "options"), ALIASES)
def test_aliases_are_chains(alias, optimizer, options, modulate):
    grapes = scale_by_grapes(HIDDEN, gain=1.5, bounds=(0.5, 1.5), control="roll")
    order = [grapes, optimizer(0.1, **options)]
    chain = optax.chain(*(order if modulate == "gradients" else reversed(order)))
    tx = alias(
        0.1,
        **options,
        weight_dimension_numbers=HIDDEN,
        gain=1.5,
        bounds=(0.5, 1.5),
        control="roll",
        modulate=modulate,
    )
    assert_close(run(tx, steps=3), run(chain, steps=3))
    assert_close(
        run(alias(0.1, **options, gain=0.0, modulate=modulate), steps=3),
        run(optimizer(0.1, **options), steps=3),
    )


def test_factor_before_rmsprop_almost_cancels():
    plain = run(optax.rmsprop(0.1, decay=0.5), steps=20)["hidden"]["kernel"]
    before, after = (
        run(grapes_rmsprop(0.1, decay=0.5, modulate=order, gain=2, bounds=(2, 2)), steps=20)
        for order in ("gradients", "updates")
    )
    np.testing.assert_allclose(before["hidden"]["kernel"], plain, rtol=1e-4)
    np.testing.assert_allclose(after["hidden"]["kernel"], 2 * plain, rtol=1e-4)


def test_unknown_order():
    with pytest.raises(ValueError, match="Unknown modulate 'both': choose one of"):
        grapes_sgd(0.1, modulate="both")


# Cost


@pytest.mark.parametrize("shape", [(1024, 1024), (3, 3, 256, 256)])
def test_bytes_accessed(shape):
    def traffic(tx):
        params = {"conv": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
        state = jax.eval_shape(tx.init, params)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        assert jax.tree.leaves(state) == [] or tx is not GRAPES
        return compiled.cost_analysis()["bytes accessed"] / (4 * np.prod(shape))

    GRAPES = grapes_sgd(0.1)  # noqa: N806
    assert traffic(optax.sgd(0.1)) == pytest.approx(3, abs=0.01)  # the ruler itself
    assert traffic(GRAPES) <= 4.05


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("options", [{}, {"normalization": "mean"}, {"control": "mean"}])
def test_sharded_kernels_are_not_gathered(axis, options):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = [None, None]
    spec[axis] = "x"
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    kernel = jax.device_put(jnp.asarray(RNG.normal(size=(512, 256)), jnp.float32), sharding)
    params = {"kernel": kernel}
    tx = grapes_sgd(0.1, **options)
    step = jax.jit(lambda p, g: optax.apply_updates(p, tx.update(g, tx.init(p), p)[0]))
    compiled = step.lower(params, params).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text  # the ruler itself: something does travel
    result = compiled(params, params)
    assert result["kernel"].sharding.is_equivalent_to(sharding, 2)
    expected = kernel - 0.1 * reference.scale(np.asarray(kernel), kernel, 0, 1, **options)
    np.testing.assert_allclose(result["kernel"], expected, rtol=1e-5)


def test_updates_keep_their_explicit_sharding():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):

        def put(shape, *axes):
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
            return jax.device_put(jnp.asarray(RNG.normal(size=shape), jnp.float32), sharding)

        params = {"kernel": put((4, 16), None, "x"), "bias": put(16, None)}
        for control in None, "mean", "roll", "reverse", "norm":
            updates = run(scale_by_grapes(control=control), params, params)
            assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
            if control == "norm":
                continue
            expected = reference.scale(params["kernel"], params["kernel"], 0, 1, control=control)
            np.testing.assert_allclose(updates["kernel"], expected, rtol=2e-6)
