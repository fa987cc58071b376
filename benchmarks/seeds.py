"""What more seeds cost that train at once: an epoch of the authors' set-up, on a set like MNIST."""

import argparse

import jax
import numpy as np

from benchmarks.timing import markdown, seconds_side_by_side, versions
from examples.data import Data
from grapes_experiments.cells import AUTHORS, Cell, build
from grapes_experiments.training import epoch_of, seed_keys, start
from grapes_experiments.variants import PROPAGATED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6400, help="a hundred steps of 64")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    key = jax.random.key(0)
    images = jax.random.uniform(key, (options.images, 28, 28))
    labels = jax.random.randint(key, (options.images,), 0, 10)
    data = Data(images, labels, images[:1], labels[:1])
    model, method, _ = build(Cell("", PROPAGATED), "mnist")
    epoch = epoch_of(model, method, batch=AUTHORS.batch)

    def step(seeds: int):
        keys = seed_keys(range(seeds), 1)
        state = start(model, method, keys[:2], images[:1])
        return lambda: epoch(state, keys[2], data)[1]

    counts = 1, 2, 5, 10
    times = np.median(seconds_side_by_side([step(seeds) for seeds in counts], options.rounds), 0)
    ratios = [f"{time / times[0]:.2f}" for time in times]
    per_seed = [f"{time / times[0] / seeds:.2f}" for time, seeds in zip(times, counts, strict=True)]
    print(f"Median of {options.rounds} rounds; {versions('jax', 'optax', 'flax')}\n")
    seeds = [str(count) for count in counts]
    print(markdown({"seeds": seeds, "epoch, in epochs of one seed": ratios, "per seed": per_seed}))


if __name__ == "__main__":
    main()
