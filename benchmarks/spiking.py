"""Spiking networks on digits, by their units and by the rate of their inputs: docs/spiking.md.

Test accuracies in % after the last epoch. Run as ``python -m benchmarks.spiking``.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import optax
from tqdm import tqdm

from benchmarks.timing import markdown
from examples import data
from grapes_experiments import networks, training
from grapes_experiments.variants import (
    LOCAL,
    PLAIN,
    PROPAGATED,
    Variant,
    method,
    with_controls,
)

THROUGH_TIME = Variant("propagated", through_time=True)
VARIANTS = {
    variant.name: variant
    for variant in (
        PLAIN,
        *with_controls(LOCAL, "mean"),
        *with_controls(PROPAGATED, "mean"),
        THROUGH_TIME,
    )
}
Accuracies = Callable[..., np.ndarray]  # of a network and a variant, one for each seed


def by_unit(accuracies: Accuracies, options: argparse.Namespace) -> dict[str, list[str]]:
    """Mean and standard deviation over the seeds."""
    columns = {"method": options.variants}
    for name in tqdm(options.units, "units", disable=None):
        cell, recurrent = networks.SPIKING[name]
        columns[name] = []
        for variant in options.variants:
            if VARIANTS[variant] == THROUGH_TIME and not recurrent:
                columns[name].append("")
                continue
            last = accuracies(networks.Spiking(cell, recurrent), variant)
            columns[name].append(f"{last.mean():.2f} ± {last.std(ddof=1):.2f}")
    return columns


def by_rate(accuracies: Accuracies, options: argparse.Namespace) -> dict[str, list[str]]:
    """Recurrent units; every seed."""

    def counts(key, images, rate):
        return networks.spikes(key, images, rate).mean(axis=1)

    columns = {"method": [*options.variants, "plain, no H", "plain, perceptron on the counts"]}
    cells = [(rate, layers) for rate in options.rates for layers in options.layers]
    for rate, layers in tqdm(cells, "rates", disable=None):
        spikes = partial(networks.spikes, rate=rate)
        runs = [accuracies(networks.Spiking(layers=layers), v, spikes) for v in options.variants]
        if layers == 1:
            runs.append(accuracies(networks.Spiking(recurrent=False), "plain", spikes))
            runs.append(accuracies(networks.MLP(), "plain", partial(counts, rate=rate)))
        shown = [", ".join(f"{x:.1f}" for x in run) for run in runs]
        heading = f"rate {rate:.1f}, {layers} layer" + "s" * (layers > 1)
        columns[heading] = shown + [""] * (len(columns["method"]) - len(shown))
    return columns


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    units = list(networks.SPIKING)
    parser.add_argument("--units", nargs="+", choices=units, default=units)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 6 / 20])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    adam, sets = optax.adam(2e-3), data.load()

    def accuracies(network, variant, prepare=networks.spikes):
        accuracy = training.train(
            network,
            method(adam, VARIANTS[variant]),
            sets,
            seeds=options.seeds,
            epochs=options.epochs,
            prepare=prepare,
        )
        return 100 * accuracy[-1]

    print(markdown(by_unit(accuracies, options)) + "\n")
    print(markdown(by_rate(accuracies, options)))


if __name__ == "__main__":
    main()
