"""What the examples share: training of all seeds at once, table, picture, options.

`train` stands alone: a model, a method and data sets in, arrays out. `main` trains every
contender of an example, prints the table and draws the picture.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

import grapes_optax
from examples.data import SETS, Data, load
from grapes_optax import linen as grapes

Array = jax.Array
Prepare = Callable[[Array, Array], Array]


# What is trained.


class Method(NamedTuple):
    """An optimizer, and what makes a learning rule of a forward function."""

    optimizer: optax.GradientTransformation
    rule: Callable[[Callable], Callable] = lambda forward: forward
    feedback: bool = False  # whether the rule has feedback weights


class State(NamedTuple):
    """What an epoch starts from; the seeds are the first axis of every leaf."""

    params: Any
    optimizer: Any
    feedback: Any = None  # weights of FA and DFA


class Run(NamedTuple):
    """The seeds are the last axis of the accuracy, and the first one of every parameter."""

    accuracy: np.ndarray  # on the test set, (epochs, seeds)
    first: Any  # parameters before training
    last: Any  # parameters after training


def hidden(path: str) -> bool:
    """As in the paper, the output layer is not modulated."""
    return "output" not in path


# Learning rules with feedback weights, as transformations of the forward function.
RULES: dict[str, Any] = {
    "BP": None,
    "FA": grapes.feedback_alignment,
    "DFA": grapes.direct_feedback_alignment,
}
# GRAPES and its controls: the form, and the options of the factor.
VARIANTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "local GRAPES": ("local", {}),
    "local, mean factor": ("local", {"control": "mean"}),
    "local, neighbour's factor": ("local", {"control": "roll"}),
    "local, not clipped": ("local", {"bounds": None}),
    "local, by the mean node": ("local", {"normalization": "mean"}),
    "local, before the optimizer": ("before", {}),
    "propagated GRAPES": ("propagated", {}),
    "propagated, mean factor": ("propagated", {"control": "mean"}),
    "propagated, neighbour's factor": ("propagated", {"control": "roll"}),
    "propagated, not clipped": ("propagated", {"bounds": None}),
    "propagated, by the mean node": ("propagated", {"normalization": "mean"}),
    "propagated, through time": ("propagated", {"through_time": True}),
    "authors' DFA": ("outgoing", {}),
}


def method(
    optimizer: optax.GradientTransformation,
    variant: str = "plain",
    rule: str = "BP",
    layers: Sequence[str] = (),
) -> Method:
    """One of the variants under a learning rule.

    The local form acts on the updates, after the optimizer, where no division by a running
    size of the gradient cancels it, unless the variant says otherwise. The propagated form can
    only act before the optimizer. The authors' form for DFA needs the paths of all kernels.
    """
    align = RULES[rule]
    form, options = VARIANTS[variant]

    def transform(forward):
        forward = forward if align is None else align(forward)
        return grapes.propagated(forward, hidden, **options) if form == "propagated" else forward

    described = grapes_optax.by_path(where=hidden)
    chain = {
        "local": lambda: (optimizer, grapes_optax.scale_by_grapes(described, **options)),
        "before": lambda: (grapes_optax.scale_by_grapes(described, **options), optimizer),
        "outgoing": lambda: (grapes_optax.scale_by_outgoing_importance(layers), optimizer),
    }
    if form in chain:
        optimizer = optax.chain(*chain[form]())
    return Method(optimizer, transform, align is not None)


def methods(optimizer: optax.GradientTransformation) -> dict[str, Method]:
    """Plain training, GRAPES in both forms, and the control of each."""
    forms = "plain", "local GRAPES", "local, mean factor"
    forms += "propagated GRAPES", "propagated, mean factor"
    return {variant: method(optimizer, variant) for variant in forms}


# Training.


def as_it_is(key: Array, images: Array) -> Array:
    del key
    return images


@partial(jax.jit, static_argnums=0)
def initial_params(model: nn.Module, keys: Array, images: Array) -> Any:
    """One seed after another, for batches of orthogonal matrices can hang on CPUs.

    Their QR factorisations wait for each other's threads (jaxlib 0.10.2).
    """
    return jax.lax.map(lambda key: model.init(key, images), keys)


@partial(jax.jit, static_argnums=(0, 1))
def accuracy(model: nn.Module, prepare: Prepare, params: Any, data: Data) -> Array:
    """Accuracy of every seed on the test set, in parts that fit into the memory."""

    def correct(params, test):
        key, image, label = test
        logits: Any = model.apply(params, prepare(key, image[None]))
        return jnp.argmax(logits) == label

    keys = jax.random.split(jax.random.key(1), len(data.test_labels))
    tests = keys, data.test_images, data.test_labels
    of_seeds = jax.vmap(correct, in_axes=(0, None))
    return jax.lax.map(partial(of_seeds, params), tests, batch_size=1000).mean(0)


def start(model: nn.Module, method: Method, keys: Array, example: Array) -> State:
    """Draws the weights of all seeds: the first row of keys is for the forward ones."""
    params = initial_params(model, keys[0], example)
    state = State(params, jax.vmap(method.optimizer.init)(params))
    if not method.feedback:
        return state
    forward: Any = method.rule(model.apply)

    def draw(key, params):
        return grapes.init_feedback(key, forward, params, example)

    return state._replace(feedback=jax.vmap(draw)(keys[1], params))


def epoch_of(
    model: nn.Module, method: Method, *, batch: int, prepare: Prepare = as_it_is
) -> Callable[[State, Array, Data], tuple[State, Array]]:
    """One pass over the training set for all seeds, in one call that stays on the device.

    It takes the state, a key for each seed and the data, and returns the next state and the
    mean loss of every seed.
    """

    forward = method.rule(model.apply)

    def loss(params, x, y, key, feedback):
        given = {} if feedback is None else {"feedback": feedback}
        logits: Any = forward(params, x, rngs={"dropout": key}, **given)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, None))
    def epoch(state, key, data):
        def step(carry, chosen):
            params, optimizer = carry
            indices, key = chosen
            x, y = prepare(key, data.train_images[indices]), data.train_labels[indices]
            key = jax.random.fold_in(key, 1)
            value, gradient = jax.value_and_grad(loss)(params, x, y, key, state.feedback)
            updates, optimizer = method.optimizer.update(gradient, optimizer, params)
            return (optax.apply_updates(params, updates), optimizer), value

        steps = len(data.train_labels) // batch
        order = jax.random.permutation(key, len(data.train_labels))[: steps * batch]
        keys = jax.random.split(jax.random.fold_in(key, 0), steps)
        chosen = order.reshape(steps, batch), keys
        (params, optimizer), losses = jax.lax.scan(step, (state.params, state.optimizer), chosen)
        return State(params, optimizer, state.feedback), losses.mean()

    return epoch


def seed_keys(seeds: int, epochs: int) -> Array:
    """Keys (2 + epochs, seeds): for the weights, the feedback weights, and every epoch."""
    return jax.random.split(jax.random.key(0), (2 + epochs, seeds))


def train(
    model: nn.Module,
    method: Method,
    data: Data,
    *,
    seeds: int,
    epochs: int,
    batch: int = 32,
    prepare: Prepare = as_it_is,
    after_epoch: Callable[[], object] = lambda: None,
) -> Run:
    """Trains all seeds at once.

    Every method sees the same initial weights and the same batches, seed by seed. The model
    gets what `prepare(key, images)` makes of a batch: with another key in every step of the
    training, and with the same keys whenever it is tested.
    """
    keys, accuracies = seed_keys(seeds, epochs), []
    state = start(model, method, keys[:2], prepare(keys[0, 0], data.train_images[:1]))
    first, epoch = state.params, epoch_of(model, method, batch=batch, prepare=prepare)
    for key in keys[2:]:
        state, _ = epoch(state, key, data)
        accuracies.append(np.asarray(accuracy(model, prepare, state.params, data)))
        after_epoch()
    return Run(np.stack(accuracies), first, state.params)


# What is reported.


def mean_and_spread(accuracy: np.ndarray) -> str:
    return f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std(ddof=1):.2f}"


def table(results: Mapping[str, Run]) -> str:
    rows = [
        (name, mean_and_spread(accuracy[0]), mean_and_spread(accuracy[-1]))
        for name, (accuracy, *_) in results.items()
    ]
    epochs, seeds = next(iter(results.values())).accuracy.shape
    headers = "method", "after epoch 1", f"after epoch {epochs}"
    title = f"Test accuracy in %, mean and standard deviation over {seeds} seeds:"
    return f"{title}\n\n{tabulate(rows, headers, tablefmt='github')}"


def verdict(differences: np.ndarray) -> tuple[str, str, str]:
    """Mean of paired differences, its 95 % interval by Student's t, and what follows from it."""
    mean, low, high = differences.mean(), differences.mean(), differences.mean()
    if np.ptp(differences) > 0:
        low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    words = "better" if low > 0 else "worse" if high < 0 else "no difference seen"
    mean, low, high = (f"{round(float(x), 2) + 0.0:+.2f}" for x in (mean, low, high))
    return mean, f"{low} to {high}", words


def verdicts(results: Mapping[str, Run]) -> str:
    """GRAPES against its control and against plain training, paired by the seed."""
    rows = []
    for heading, runs in panels(results).items():
        prefix = f"{heading}: " if heading else ""
        for name in runs:
            form = name.removesuffix(" GRAPES")
            for other in f"{form}, mean factor", f"{prefix}plain":
                if form != name and other in runs:
                    differences = 100 * (runs[name].accuracy[-1] - runs[other].accuracy[-1])
                    rows.append((name, other.removeprefix(prefix), *verdict(differences)))
    headers = "method", "against", "points", "95 % interval", "verdict"
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


# Colours of Okabe and Ito, each with a line style of its own, to be told apart in grey.
STYLES = {
    "plain": ("#000000", "-"),
    "plain, twice the learning rate": ("#999999", (0, (9, 2))),
    "local GRAPES": ("#0072B2", "-"),
    "local, mean factor": ("#E69F00", "--"),
    "local, neighbour's factor": ("#009E73", ":"),
    "propagated GRAPES": ("#D55E00", "-."),
    "propagated, mean factor": ("#CC79A7", (0, (4, 1, 1, 1, 1, 1))),
    "propagated, through time": ("#56B4E9", (0, (1, 3))),
}
LOOK: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 3,
}
BAND = "Mean, and band of ± 1 standard deviation over seeds"


def draw_errors(axes: Axes, results: Mapping[str, Run], title: str) -> None:
    """Curves of the test error; what stands before the colon of a name is not in the legend."""
    for name, (accuracy, *_) in results.items():
        variant = name.split(": ")[-1]
        color, linestyle = STYLES[variant]
        error = 100 - 100 * accuracy
        epochs = 1 + np.arange(len(error))
        mean, spread = error.mean(1), error.std(1, ddof=1)
        axes.plot(epochs, mean, lw=1.6, label=variant, color=color, linestyle=linestyle)
        axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.1, lw=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="test error (%)", title=title)


def panels(results: Mapping[str, Run]) -> dict[str, dict[str, Run]]:
    """The results by what stands before the colon of their names, or all under one heading."""
    sorted_out: dict[str, dict[str, Run]] = {}
    for name, run in results.items():
        sorted_out.setdefault(name.rpartition(": ")[0], {})[name] = run
    return sorted_out


def draw(results: Mapping[str, Run], path: Path) -> None:
    """The learning curves, a panel for each heading, with one legend beside them."""
    grouped = panels(results)
    with plt.rc_context(LOOK):
        figure, rows = plt.subplots(
            1,
            len(grouped),
            figsize=(2.2 + 2.8 * len(grouped), 3.4),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axes, (title, runs) in zip(rows[0], grouped.items(), strict=True):
            draw_errors(axes, runs, title)
            axes.label_outer()
        handles = {str(line.get_label()): line for axes in rows[0] for line in axes.lines}
        figure.legend(handles.values(), handles, loc="outside right center")
        figure.suptitle(BAND, fontsize=9)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)


# The command line.

OPTIONS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "seeds": (int, lambda n: n >= 2, "networks, trained at once (>= 2, for the deviation)"),
    "epochs": (int, lambda n: n >= 1, "passes over the training set (>= 1)"),
    "learning_rate": (float, lambda rate: 0 < rate < math.inf, "of every method (> 0)"),
    "width": (int, lambda n: n >= 1, "nodes of the narrowest layer (>= 1)"),
}


def command_line(description: str | None, name: str, defaults: dict[str, Any]) -> tuple[Any, Data]:
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for option, default in defaults.items():
        kind, _, explanation = OPTIONS[option]
        flag = "--" + option.replace("_", "-")
        parser.add_argument(flag, type=kind, default=default, help=explanation)
    parser.add_argument("--dataset", choices=SETS, default="digits", help="what it learns")
    parser.add_argument("--data", type=Path, help="folder of the other sets, as Parquet files")
    parser.add_argument("--download", action="store_true", help="from the Hugging Face hub")
    parser.add_argument("--out", type=Path, default=f"runs/{name}", help="folder of the picture")
    chosen = parser.parse_args()
    for option in defaults:
        _, holds, explanation = OPTIONS[option]
        if not holds(value := getattr(chosen, option)):
            parser.error(f"argument --{option.replace('_', '-')}: {value}: {explanation}")
    try:
        sets = load(chosen.dataset, chosen.data, chosen.download)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    return chosen, sets


def main(
    description: str | None,
    name: str,
    contenders: Callable[[Any, int], Mapping[str, tuple[nn.Module, Method]]],
    *,
    prepare: Prepare = as_it_is,
    picture: Callable[[Mapping[str, Run], Path], None] = draw,
    **defaults: Any,
) -> None:
    """Trains the contenders, which follow from the options and the classes, and reports."""
    options, sets = command_line(description, name, defaults)
    compared, results = contenders(options, SETS[options.dataset].classes), {}
    with tqdm(total=len(compared) * options.epochs, unit="epoch") as progress:
        for title, (model, method) in compared.items():
            progress.set_description(title)
            results[title] = train(
                model,
                method,
                sets,
                seeds=options.seeds,
                epochs=options.epochs,
                prepare=prepare,
                after_epoch=progress.update,
            )
    print(table(results))
    print(
        "\nDifference of the test accuracy after the last epoch, in points, paired by the seed:\n"
    )
    print(verdicts(results))
    options.out.mkdir(parents=True, exist_ok=True)
    picture(results, options.out / "learning_curves.png")
    print(f"\nLearning curves: {options.out / 'learning_curves.png'}")
