"""Fan-in, nodes, stacks, groups and gates, read from the program that uses the parameters.

How the reader works
--------------------

It is an abstract interpretation of the jaxpr: the program runs once, not on arrays but on what is
known of them. The modules stand in the order in which a program passes them.

`equations` is all that knows how JAX writes an equation. Constants, carried and scanned values are
told apart by the shapes of the body; of parameters only those in its table are read.

`flat` writes the program out as one list of operations on numbered values (:class:`Program`).
Calls are inlined. The body of a loop stands there once: `element` takes a slice of what is
scanned, `elements` stacks what is collected, and `carry` has two inputs, the value before the loop
and the one that the body leaves, so that edges between values close the loop. What no result
needs is dropped.

`values` says what a value can be. *Data* is anything. A *Weight* holds the entries of one leaf,
moved or changed one by one. A *Pre* is a pre-activation: a product with a kernel, or a sum of
such. A *OneHot* is zero but for one entry along an axis. The last three are *views*: each of their
axes is a row of *factors*, and a factor is an axis of a leaf, or a part of one (size, start,
stride), or data. A reshape deals the factors out anew, a transpose permutes them, a slice
shortens one; so wherever a product meets a kernel, the axes that it contracts are axes of the leaf.

`rules` has one rule for each operation, from the values that go in to those that come out. *A new
primitive is a row in one of its tables*: ELEMENTWISE if it acts entry by entry, IDENTITIES if it
changes nothing, MOVES with a function from view to view if it moves entries; and a row of
`equations.STRUCTURE` for the parameters that it reads. An operation without a rule makes data of
all, and its weights are *lost*: the leaf is reported as soon as an input meets them. A rule that
cannot follow a value raises `Unfollowed` with the reason, and `read` treats the operation like one
without a rule. `constants` answers what is known of entries: counts, zeros, what is the same along
an axis. A one-hot array is known by them.

`reader` notes what the rules see (:class:`Reader`): products (which axes are fan-in, which nodes),
kernels summed into one pre-activation, biases added to it, cuts of the nodes (gates), axes that run
along each other (:meth:`Reader.unite`), leaves that are looked up, and the first reason, if any, to
leave a leaf alone.

`layers` makes layers of the notes, and descriptions of layers. What contradicts itself (a kernel
used in two ways, a bias of two layers) is reported. `outputs` says which of them are output layers.

This module checks what the user gave, applies `where`, and puts the tree together.

Nothing is guessed: every path ends in axes that were followed, or in a reason.
"""

import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from grapes_optax._importance import DimensionNumbers, LeftAlone
from grapes_optax._layers import resolve_layers
from grapes_optax._names import check_labels, label_of
from grapes_optax._program.flat import Program
from grapes_optax._program.layers import described
from grapes_optax._program.outputs import outputs
from grapes_optax._program.reader import Reader
from grapes_optax._program.rules import read
from grapes_optax._tree import Leaf, path_names, path_string, without_collection
from grapes_optax._warn import warn


def _branches(leaf: Leaf) -> list[str]:
    """The path of a leaf, and those of the branches that hold it, from the closest on."""
    path = without_collection(leaf.path)
    return ["/".join(path[:n]) for n in range(len(path), -1, -1)]


def _hints(name: str, given: Mapping[str, Any], leaves: Sequence[Leaf]) -> dict[int, Any]:
    """What the user says of each leaf, or else of the closest branch."""
    if not isinstance(given, Mapping) or not all(isinstance(path, str) for path in given):
        raise TypeError(
            f"{name} must map paths to numbers, as {{'lstm/linear/w': 4}} does, got {given!r}."
        )
    for path, value in given.items():
        several = name == "stack" and isinstance(value, tuple | list)
        if not all(isinstance(n, int | np.integer) for n in (value if several else (value,))):
            what = "an int or a tuple of ints" if name == "stack" else "an int"
            raise TypeError(f"{name} of {path or '(root)'} must be {what}, got {value!r}.")
    known = sorted({path for leaf in leaves for path in _branches(leaf)})
    for path in given.keys() - set(known):
        near = difflib.get_close_matches(path, known, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} names {path!r}, where params have no leaf.{meant}")
    closest = [[path for path in _branches(leaf) if path in given] for leaf in leaves]
    return {leaf: given[paths[0]] for leaf, paths in enumerate(closest) if paths}


def _traced(apply_fn: Callable[..., Any], params: optax.Params, inputs: Any, count: int) -> Program:
    leaves, structure = jax.tree.flatten(inputs)
    # A scalar of NumPy may be a flag.
    is_array = [hasattr(leaf, "shape") and not isinstance(leaf, np.generic) for leaf in leaves]

    def results(params, arrays):
        arrays = iter(arrays)  # What is no array stays as it is: the function may branch on it.
        given = [next(arrays) if i else leaf for i, leaf in zip(is_array, leaves, strict=True)]
        returned = apply_fn(params, *jax.tree.unflatten(structure, given))
        return [leaf for leaf in jax.tree.leaves(returned) if hasattr(leaf, "shape")]

    return Program(
        jax.make_jaxpr(results)(params, list(itertools.compress(leaves, is_array))), count
    )


def _check_inputs(reader: Reader) -> None:
    """Raises where the kernels multiply nothing that was passed."""
    program = reader.program
    uses = [use for uses in reader.uses.values() for use in uses]
    multiplied = bool(uses) and not any(use.from_input for use in uses)
    used = any(program.consumers[n] and len(program.shapes[n]) > 1 for n in program.parameters)
    if multiplied or (used and not reader.from_input(program.results)):
        raise ValueError(
            "No kernel is multiplied by an input: what apply_fn computes from has to be passed as"
            " an argument, infer_dimension_numbers(apply_fn, params, x) with arrays (or shapes) x."
            " What apply_fn closes over, makes itself or is given as a Python number is a constant"
            " of the program, of which it cannot be told what belongs to the data. Give a function"
            " without inputs its constant as an argument, or describe its kernels by hand with"
            " DimensionNumbers."
        )


def _paths(leaves: Sequence[Leaf], numbers: Iterable[int]) -> str:
    paths = [path_string(leaves[number].path) for number in sorted(numbers)]
    return ", ".join(paths[:8] + ["..."] * (len(paths) > 8))


def _wanted(
    where: Callable[[str], bool], leaves: Sequence[Leaf], kernels: Iterable[int]
) -> set[int]:
    """The kernels that the user selects."""
    wanted = {leaf for leaf in kernels if where(path_string(leaves[leaf].path))}
    if kernels and not wanted:
        raise ValueError(f"where selects none of the kernels: {_paths(leaves, kernels)}.")
    return wanted


def _unsettled(reader: Reader, wanted: set[int] | None) -> str:
    """What is left alone for a reason, of the kernels that the user selects and their biases."""
    rows = []
    for number, reason in sorted(reader.unsettled().items()):
        leaf = reader.leaves[number]
        kernels = {number} if leaf.may_be_kernel else reader.added_to[number]
        if wanted is None or kernels & wanted:
            rows.append(f"{path_string(leaf.path)} {np.shape(leaf.array)}: {reason}")
    if not rows:
        return ""
    listed = "; ".join(rows[:8] + ["..."] * (len(rows) > 8))
    return (
        f"GRAPES leaves alone what the program does not settle: {listed}. Describe their fan-in"
        " and node axes in the tree that is returned, with DimensionNumbers."
    )


def infer_dimension_numbers(
    apply_fn: Callable[..., Any],
    params: optax.Params,
    *inputs: Any,
    gates: Mapping[str, int] | None = None,
    stack: Mapping[str, int | Sequence[int]] | None = None,
    where: Callable[[str], bool] | None = None,
    modulate_output: bool = False,
) -> optax.Params:
    """Describes the leaves of a parameter tree by what a program does with them.

    The program is traced once, outside of training, and says for any framework and any
    pure function which axes of a kernel are contracted (fan-in), which stay (nodes) and
    which are mapped or scanned over (stack), which kernels are summed into one
    pre-activation, which parameters are added to it (biases), and into how many gates
    the sum of several kernels is cut. Embeddings (also those looked up by a product with
    a one-hot array), norms and what is only added or multiplied are left alone, and so
    is, with a warning, what the program does not settle.

    The output layers, which GRAPES does not modulate, are found: those whose
    pre-activation reaches a result, through whatever nonlinearity or loss, and is read by
    no layer, neither another nor itself. Hidden activations and carries that are returned
    as well make no output layer.

    Two things are not in the program: that the nodes of a *single* kernel are the gates
    of a cell (Haiku's LSTM), and that an axis of a kernel is an ensemble mapped over by
    ``jax.vmap`` while the input is not. The user says these with `gates` and `stack`.

    Args:
      apply_fn: the forward pass, a pure function of the parameters and the inputs, such
        as ``model.apply``. (One that takes gradients uses the kernels in two ways.)
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs of the function, the same; other values, flags for instance,
        are handed on as they are. Inputs that `apply_fn` closes over are not seen.
      gates: number of gates of the kernels at a path, or of all in a branch (its names
        joined by ``/``), instead of that read from the program.
      stack: axis or axes, of each kernel and bias at a path or in a branch, that hold
        independent layers and not nodes.
      where: predicate on the path of a kernel, its names joined by ``/``; a kernel for
        which it is false is left alone, with its biases.
      modulate_output: whether to modulate the output layers too.

    Returns:
      A tree of the structure of `params` that holds a :class:`DimensionNumbers` for each
      leaf to modulate, ``LeftAlone("output")`` for the kernels and biases of the output
      layers and ``None`` for the others, to be passed to :func:`scale_by_grapes`.
      ``UserWarning`` tells of leaves that may be kernels and are not settled, with the
      reason, and of a program where no layer is an output layer (a recurrent cell or a
      stack without a readout) or every one is.

    Raises:
      ValueError: if no kernel is multiplied by an input; if `where` selects no kernel, or
        only some of those that are summed into one pre-activation; if `gates` or `stack`
        name a path without a kernel, an axis that does not exist or is fan-in, or a
        number of gates that does not divide the nodes.
      TypeError: if a leaf of `params` is not an array (of Equinox: partition the model,
        and combine it in `apply_fn`), or an argument is not of its type.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax import infer_dimension_numbers
      >>> def network(params, x, h):
      ...     z = x @ params["w"] + params["u"] @ h + params["b"]
      ...     return jax.nn.softmax(jnp.tanh(z) @ params["v"])
      >>> params = {"w": jnp.ones((5, 7)), "u": jnp.ones((7, 7)), "b": jnp.zeros(7),
      ...           "v": jnp.ones((7, 3))}
      >>> description = infer_dimension_numbers(network, params, jnp.ones(5), jnp.ones(7))
      >>> description["u"]
      DimensionNumbers(reduction_axis=(1,), output_axis=(0,), group='u', gates=1, spec=None)
      >>> description["w"]
      DimensionNumbers(reduction_axis=(0,), output_axis=(1,), group='u', gates=1, spec=None)
      >>> description["b"]
      DimensionNumbers(reduction_axis=(), output_axis=(0,), group='u', gates=1, spec=None)
      >>> description["v"]
      LeftAlone(reason='output')

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    for name, function in ("apply_fn", apply_fn), ("where", where or len):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {function!r}.")
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [Leaf(path_names(keys), array, "") for keys, array in flat]
    for leaf in leaves:
        if not hasattr(leaf.array, "shape"):
            raise TypeError(
                f"params hold {leaf.array!r} at {path_string(leaf.path)}: pass arrays alone, and"
                " let apply_fn combine them with the rest (eqx.partition, eqx.combine)."
            )
    given = {"gates": gates, "stack": stack}
    said = {name: {} if value is None else value for name, value in given.items()}
    hints = [_hints(name, value, leaves) for name, value in said.items()]
    reader = read(_traced(apply_fn, params, inputs, len(leaves)), leaves)
    _check_inputs(reader)
    layers = described(reader, *hints)
    settled = {leaf: numbers for layer in layers for leaf, numbers in layer.items()}
    kernels = {leaf for leaf, numbers in settled.items() if numbers.reduction_axis}
    for name, heeded in ("gates", kernels), ("stack", settled):
        paths = {path for leaf in heeded for path in _branches(leaves[leaf])}
        for path in said[name].keys() - paths:
            raise ValueError(f"{name} names {path!r}, where the program settles no layer.")

    wanted = kernels | {leaf for leaf in reader.unsettled() if leaves[leaf].may_be_kernel}
    if where is not None:
        wanted = _wanted(where, leaves, wanted)
    check_labels(leaves[leaf].path for leaf in kernels)
    final, read_again = outputs(reader)
    result: list[DimensionNumbers | LeftAlone | None] = [None] * len(leaves)
    for layer in layers:
        summed = sorted(kernels & layer.keys())
        chosen = [leaf for leaf in summed if leaf in wanted]
        if not modulate_output and final & set(summed):
            for leaf in layer:
                result[leaf] = LeftAlone("output")
        elif chosen == summed:
            members = [leaves[leaf].path for leaf in layer]
            label = label_of([leaves[leaf].path for leaf in summed], members)
            for leaf, numbers in layer.items():
                result[leaf] = numbers._replace(group=label)
        elif chosen:
            raise ValueError(
                f"where selects {_paths(leaves, chosen)}, but not"
                f" {_paths(leaves, set(summed) - set(chosen))}, which is summed into the same"
                " pre-activation: select all or none, or describe the one as a layer of its own"
                " in the tree that is returned."
            )
    modulated = any(isinstance(value, DimensionNumbers) for value in result)
    found = [_unsettled(reader, None if where is None else wanted)]
    if modulated and read_again and read_again <= wanted and not (final or modulate_output):
        found.append(
            "GRAPES finds no output layer, and modulates all: what reaches the results"
            f" ({_paths(leaves, read_again)}) is read by a layer again, as in a recurrent network"
            " or a stack of layers without a readout. Exclude the output layer with where=, or"
            " say modulate_output=True if there is none."
        )
    if kernels & wanted and not modulated:
        found.append(
            f"GRAPES modulates nothing: {_paths(leaves, kernels & wanted)} is read by no other"
            " layer, and output layers are left alone. Say modulate_output=True to modulate them."
        )
    for text in filter(None, found):
        warn(text)
    description = jax.tree.unflatten(structure, result)
    if modulated:
        resolve_layers(params, description)
    return description
