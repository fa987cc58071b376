"""What GRAPES adds to a compiled step: memory traffic, state, time and compilations."""

import argparse
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import markdown, seconds_side_by_side, versions
from grapes_optax import grapes_sgd, scale_by_grapes

RATE = 1e-3
# The first row is the unit of time.
OPTIMIZERS = {
    "sgd": optax.sgd(RATE),
    "grapes_sgd": grapes_sgd(RATE),
    "sgd, momentum 0.9": optax.sgd(RATE, momentum=0.9),
    "grapes_sgd, momentum 0.9": grapes_sgd(RATE, momentum=0.9),
    "adam": optax.adam(RATE),
    "chain(scale_by_grapes, adam)": optax.chain(scale_by_grapes(), optax.adam(RATE)),
}


# Trees of shapes, with the names that Flax gives the leaves.


def dense(inputs: int, nodes: int) -> dict[str, Any]:
    return {"kernel": (inputs, nodes), "bias": (nodes,)}


def conv(size: int, inputs: int, nodes: int) -> dict[str, Any]:
    return {"kernel": (size, size, inputs, nodes)}


def norm(nodes: int) -> dict[str, Any]:
    return {"scale": (nodes,), "bias": (nodes,)}


def resnet18() -> dict[str, Any]:
    tree = {"conv_init": conv(7, 3, 64), "bn_init": norm(64)}
    inputs = 64
    for i, nodes in enumerate((64, 64, 128, 128, 256, 256, 512, 512)):
        tree[f"ResNetBlock_{i}"] = {
            "Conv_0": conv(3, inputs, nodes),
            "BatchNorm_0": norm(nodes),
            "Conv_1": conv(3, nodes, nodes),
            "BatchNorm_1": norm(nodes),
        }
        if inputs != nodes:
            tree[f"ResNetBlock_{i}"] |= {
                "conv_proj": conv(1, inputs, nodes),
                "norm_proj": norm(nodes),
            }
        inputs = nodes
    return tree | {"Dense_0": dense(512, 1000)}


TREES = {
    "large": {"dense": dense(4096, 4096)},
    "small": {f"Dense_{i}": dense(64, 64) for i in range(200)},
    "resnet": resnet18(),
}


def random_tree(shapes: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.array(rng.standard_normal(shape, np.float32)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# Measurements.


class Run:
    """One optimizer with parameters and state of its own, which every step donates."""

    def __init__(self, tx: optax.GradientTransformation, params: Any, grads: Any) -> None:
        self.params = jax.tree.map(jnp.copy, params)
        self.state = tx.init(self.params)
        self.grads = grads
        self.traces = 0

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            self.traces += 1  # Python comes here only where JAX traces, to compile anew.
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def bytes_accessed(self) -> float:
        costs = self.step.lower(self.params, self.state, self.grads).compile().cost_analysis()
        assert costs is not None
        return costs["bytes accessed"]

    def __call__(self) -> Any:
        self.params, self.state = self.step(self.params, self.state, self.grads)
        return self.params, self.state


def table(params: Any, grads: Any, rounds: int) -> str:
    runs = [Run(tx, params, grads) for tx in OPTIMIZERS.values()]
    traffic = [run.bytes_accessed() / nbytes(params) for run in runs]
    state = [nbytes(run.state) for run in runs]
    seconds = seconds_side_by_side(runs, rounds)
    columns = {
        "optimizer": list(OPTIMIZERS),
        "bytes accessed / parameters": [f"{x:.3f}" for x in traffic],
        "state (bytes)": [f"{x:,}" for x in state],
        "time / sgd": [f"{x:.2f}" for x in np.median(seconds / seconds[:, :1], axis=0)],
        "compilations": [str(run.traces) for run in runs],
    }
    # The time of a shared CPU says little; its ratios say more.
    if jax.default_backend() != "cpu":
        columns["time (µs)"] = [f"{x * 1e6:.1f}" for x in np.median(seconds, axis=0)]
    return markdown(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing (default 20)")
    parser.add_argument("--tree", choices=(*TREES, "all"), default="all")
    options = parser.parse_args()

    print(versions("jax", "jaxlib", "optax"))
    for name in TREES if options.tree == "all" else [options.tree]:
        params, grads = (random_tree(TREES[name], seed) for seed in range(2))
        leaves = len(jax.tree.leaves(params))
        print(f"\n### {name}: {leaves} leaves, {nbytes(params):,} bytes\n")
        print(table(params, grads, options.rounds), flush=True)

    print(flush=True)
    # A process of its own: eight CPU devices enlarge XLA's thread pools and change timings.
    subprocess.run([sys.executable, "-m", "benchmarks.collectives"], check=True)


if __name__ == "__main__":
    main()
