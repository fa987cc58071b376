"""Spiking networks on digits by the rate of their inputs, for the page on spiking networks.

Accuracy after the last epoch, one figure a seed. Run as ``python -m benchmarks.rates``.
"""

import argparse
from functools import partial

import optax

from examples import data, digits, spiking, training


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
        spikes = partial(spiking.spikes, rate=rate)
        for layers in options.layers:
            for name, method in spiking.methods(adam, recurrent=True).items():
                what = f"rate {rate}, {layers} layers, {name}:"
                show(what, spiking.Spiking(layers=layers), method, spikes)
        plain = training.Method(adam)
        show(f"rate {rate}, no H:", spiking.Spiking(recurrent=False), plain, spikes)

        def counts(key, images, spikes=spikes):
            return spikes(key, images).mean(axis=1)

        show(f"rate {rate}, spike counts:", digits.MLP(), plain, counts)


if __name__ == "__main__":
    main()
