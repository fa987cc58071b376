"""What another backward pass costs: a training step of an MLP and of a small conv net."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from benchmarks.timing import markdown, seconds_side_by_side, versions
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.linen import (
    direct_feedback_alignment,
    feedback_alignment,
    init_feedback,
    propagated,
)

RATE = 1e-3
CLASSES = 10


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(CLASSES, name="output")(x)


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(CLASSES, name="output")(x)


# Each net with the shape of its inputs.
NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (MLP(), (128, 784)),
    "conv": (ConvNet(), (64, 28, 28, 1)),
}


def hidden(path: str) -> bool:
    return "output" not in path


# Methods.


class Method(NamedTuple):
    """What makes a learning rule of a forward function, and an optimizer."""

    rule: Callable[[Callable[..., Any]], Callable[..., Any]]
    tx: optax.GradientTransformation = optax.sgd(RATE)
    feedback: bool = False  # whether the rule has feedback weights


def unchanged(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


# The first row is the unit of everything.
METHODS = {
    "backpropagation": Method(unchanged),
    "propagated GRAPES": Method(lambda forward: propagated(forward, hidden)),
    "feedback alignment (FA)": Method(feedback_alignment, feedback=True),
    "FA + propagated GRAPES": Method(
        lambda forward: propagated(feedback_alignment(forward), hidden), feedback=True
    ),
    "direct feedback alignment": Method(direct_feedback_alignment, feedback=True),
    "local GRAPES": Method(
        unchanged, optax.chain(scale_by_grapes(by_path(where=hidden)), optax.sgd(RATE))
    ),
}


# Measurements.


class Run:
    """Training of a net by one method, with parameters of its own that every step donates."""

    def __init__(self, net: str, method: Method) -> None:
        model, shape = NETS[net]
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape, np.float32)
        self.variables = model.init(jax.random.key(0), x)
        self.state = method.tx.init(self.variables)
        forward: Any = method.rule(model.apply)
        feedback = {}
        if method.feedback:
            feedback["feedback"] = init_feedback(jax.random.key(1), forward, self.variables, x)
        # Arguments of the step, not constants of it: as constants, feedback weights could be
        # transposed at compile time.
        self.data = jax.device_put((x, rng.integers(CLASSES, size=len(x)), feedback))

        def step(variables: Any, state: Any, data: Any) -> tuple[Any, Any]:
            x, labels, feedback = data

            def loss(variables: Any) -> jax.Array:
                logits = forward(variables, x, **feedback)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            grads = jax.grad(loss)(variables)
            updates, state = method.tx.update(grads, state, variables)
            return optax.apply_updates(variables, updates), state

        self.step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self.variables, self.state, self.data)
            .compile()
        )

    def cost(self, name: str) -> float:
        costs = self.step.cost_analysis()
        assert costs is not None
        return costs[name]

    def __call__(self) -> Any:
        self.variables, self.state = self.step(self.variables, self.state, self.data)
        return self.variables


def table(net: str, rounds: int) -> str:
    runs = [Run(net, method) for method in METHODS.values()]
    seconds = seconds_side_by_side(runs, rounds)
    quartiles = np.percentile(seconds / seconds[:, :1], (25, 50, 75), axis=0).T
    columns = {
        "backward pass": list(METHODS),
        "time / backpropagation": [f"{q2:.3f} [{q1:.3f}, {q3:.3f}]" for q1, q2, q3 in quartiles],
    }
    for name in ("flops", "bytes accessed"):
        columns[name] = [f"{run.cost(name) / runs[0].cost(name):.3f}" for run in runs]
    return markdown(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timing (default 30)")
    parser.add_argument("--net", choices=(*NETS, "all"), default="all")
    options = parser.parse_args()

    print(versions("jax", "jaxlib", "flax", "optax"))
    for net in NETS if options.net == "all" else [options.net]:
        _, shape = NETS[net]
        print(f"\n### {net}: inputs {shape}; median [quartiles] of {options.rounds} rounds\n")
        print(table(net, options.rounds), flush=True)


if __name__ == "__main__":
    main()
