"""Spiking networks on digits by the rate of their inputs, for the page on spiking networks.

Accuracy after the last epoch, one figure a seed. Run as ``python -m benchmarks.rates``.
"""

import argparse
from functools import partial

import optax

from examples import data
from examples.paper import networks, training

VARIANTS = [
    "plain",
    "local GRAPES",
    "local, mean factor",
    "propagated GRAPES",
    "propagated, mean factor",
    "propagated, through time",
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 6 / 20])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args(arguments)
    adam, sets = optax.adam(2e-3), data.load()

    def show(what, model, method, prepare):
        run = training.train(
            model, method, sets, seeds=options.seeds, epochs=options.epochs, prepare=prepare
        )
        print(what, run.accuracy[-1], flush=True)

    for rate in options.rates:
        spikes = partial(networks.spikes, rate=rate)
        for layers in options.layers:
            for name in VARIANTS:
                what = f"rate {rate}, {layers} layers, {name}:"
                method = training.method(adam, name)
                show(what, networks.Spiking(layers=layers), method, spikes)
        plain = training.Method(adam)
        show(f"rate {rate}, no H:", networks.Spiking(recurrent=False), plain, spikes)

        def counts(key, images, spikes=spikes):
            return spikes(key, images).mean(axis=1)

        show(f"rate {rate}, spike counts:", networks.MLP(), plain, counts)


if __name__ == "__main__":
    main()
