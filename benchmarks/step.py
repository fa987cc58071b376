"""What a step costs, GRAPES beside other optimizers: the optimizer alone, and all of training.

Writes step.json and step.png. Times are ratios to plain SGD, taken in turn in one run: median and
quartiles of the rounds.
"""

import argparse
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tqdm import tqdm

from benchmarks import hlo
from benchmarks.networks import NETWORKS, Network
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.timing import markdown, seconds, seconds_side_by_side, versions
from grapes_optax import modulate_error

PROPAGATED = "propagated grapes + sgd"
KINDS = {"optimizer": tuple(OPTIMIZERS), "training": (*OPTIMIZERS, PROPAGATED)}
DTYPES = ("float32", "bfloat16")
COPIED = 2**28  # bytes


def random_tree(shapes: Any, dtype: str, seed: int) -> Any:
    """Weights of the size that layers begin with."""
    rng = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        size = np.sqrt(2 / np.prod(shape[-4:-1])) if len(shape) > 1 else 0.1
        return jnp.asarray(rng.standard_normal(shape, np.float32) * np.float32(size), dtype)

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    x = jnp.ones(COPIED // 4)
    copy = jax.jit(jnp.negative, donate_argnums=0)  # as the steps do; a copy proper is elided

    def step() -> jax.Array:
        nonlocal x
        x = copy(x)
        return x

    seconds(step, 2)
    return 2 * COPIED / min(seconds(step, 3) for _ in range(5))


class Shared:
    """Parameters that go from step to step of all contenders, each of which donates them."""

    def __init__(self, params: Any) -> None:
        self.params = params


class Run:
    """One compiled step, with an optimizer state of its own."""

    def __init__(self, network: Network, kind: str, name: str, shared: Shared, batch: Any) -> None:
        tx = OPTIMIZERS["sgd" if name == PROPAGATED else name](None)
        node = modulate_error if name == PROPAGATED else lambda z, kernel: z
        self.shared, self.batch = shared, batch
        self.state = tx.init(shared.params)

        def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
            logits = network.forward(params, inputs, node).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            grads = batch if kind == "optimizer" else jax.grad(loss)(params, *batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(shared.params, self.state, batch)
        middle = time.perf_counter()
        self.step = traced.lower().compile()
        self.trace_seconds = middle - start
        self.compile_seconds = time.perf_counter() - middle

    def __call__(self) -> Any:
        self.shared.params, self.state = self.step(self.shared.params, self.state, self.batch)
        return self.shared.params

    def costs(self, kind: str) -> dict[str, float]:
        memory = self.step.memory_analysis()
        assert memory is not None
        held = nbytes(self.shared.params)
        found = {
            "state": nbytes(self.state) / held,
            "temporary": memory.temp_size_in_bytes / held,
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
        }
        if kind == "optimizer":
            text = self.step.as_text()
            assert text is not None
            backend = jax.default_backend()
            program = hlo.read(text, "cuda" if backend == "gpu" else backend)
            found |= {"bytes": program.nbytes / held, "kernels": program.kernels}
        return found


def batch_of(network: Network, kind: str, dtype: str, size: int) -> Any:
    """Gradients for the optimizer alone; inputs and labels for training."""
    if kind == "optimizer":
        return random_tree(network.shapes, dtype, 1)
    rng = np.random.default_rng(2)
    shape = network.inputs(size)
    if network.tokens:
        return tuple(jnp.asarray(rng.integers(network.tokens, size=shape)) for _ in range(2))
    inputs = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    return inputs, jnp.asarray(rng.integers(10, size=shape[0]))


def measured(name: str, kind: str, dtype: str, options: argparse.Namespace) -> Iterator[dict]:
    """A record for each contender."""
    network = NETWORKS[name]()
    shared = Shared(random_tree(network.shapes, dtype, 0))
    batch = batch_of(network, kind, dtype, options.batch)
    names = [each for each in KINDS[kind] if each in ("sgd", *options.optimizers)]
    runs = [Run(network, kind, each, shared, batch) for each in names]
    table = seconds_side_by_side(runs, options.rounds, options.limit)
    ratios = table / table[:, :1]
    for i, (each, run) in enumerate(zip(names, runs, strict=True)):
        low, middle, high = np.nanpercentile(ratios[:, i], (25, 50, 75))
        yield {
            "network": name,
            "kind": kind,
            "dtype": dtype,
            "optimizer": each,
            "parameters": nbytes(shared.params),
            "time": middle,
            "quartiles": [low, high],
            "rounds": int(np.isfinite(ratios[:, i]).sum()),
            "seconds": float(np.nanmedian(table[:, i])),
            **run.costs(kind),
        }


def show(records: list[dict], copy: float) -> str:
    first = records[0]
    columns = {
        "optimizer": [r["optimizer"] for r in records],
        "time / sgd": [
            f"{r['time']:.2f} [{r['quartiles'][0]:.2f}, {r['quartiles'][1]:.2f}]" for r in records
        ],
        "state": [f"{r['state']:.2f}" for r in records],
        "temporary": [f"{r['temporary']:.2f}" for r in records],
        "compile / sgd": [
            f"{r['compile_seconds'] / first['compile_seconds']:.1f}" for r in records
        ],
    }
    if first["kind"] == "optimizer":
        columns |= {
            "bytes": [f"{r['bytes']:.2f}" for r in records],
            "kernels": [f"{r['kernels']:,}" for r in records],
            "bandwidth / copy": [
                f"{r['bytes'] * r['parameters'] / r['seconds'] / copy:.2f}" for r in records
            ],
        }
    if jax.default_backend() != "cpu":  # the time of a shared CPU says little
        columns["time (µs)"] = [f"{r['seconds'] * 1e6:,.1f}" for r in records]
    return markdown(columns)


def overview(records: list[dict], kind: str) -> str:
    """Time over that of SGD, with quartiles: a row for each network and type."""
    chosen = [r for r in records if r["kind"] == kind and r["optimizer"] != "sgd"]
    columns: dict[str, list[str]] = {"network": [], "type": []}
    columns |= {r["optimizer"]: [] for r in chosen}
    for key, row in groupby(chosen, lambda r: (r["network"], r["dtype"])):
        for name, cell in zip(columns, key, strict=False):
            columns[name].append(cell)
        for r in row:
            low, high = (f"{x:.2f}" if x < 10 else f"{x:,.0f}" for x in r["quartiles"])
            time = f"{r['time']:.2f}" if r["time"] < 10 else f"{r['time']:,.0f}"
            columns[r["optimizer"]].append(f"{time} [{low}, {high}]")
    return markdown(columns)


TICKS = (1, 2, 5, 10, 100, 1000)
COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00"}
TITLES = {"optimizer": "optimizer step", "training": "training step"}


def draw(records: list[dict], path: Path, device: str, batch: int) -> None:
    """Time over that of SGD, with quartiles: a row for each kind of step, a column a network."""
    names = list(dict.fromkeys(r["network"] for r in records))
    kinds = [kind for kind in KINDS if any(r["kind"] == kind for r in records)]
    figure, axes = plt.subplots(
        len(kinds),
        len(names),
        figsize=(2.6 * len(names) + 1.6, 2.1 * len(kinds) + 0.8),
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    for kind, row in zip(kinds, axes, strict=True):
        labels = [n for n in KINDS[kind] if any(n == r["optimizer"] for r in records)]
        for name, ax in zip(names, row, strict=True):
            for dtype, marker, shift in zip(DTYPES, "os", (-0.15, 0.15), strict=True):
                here = [
                    r
                    for r in records
                    if (r["network"], r["kind"], r["dtype"]) == (name, kind, dtype)
                    and r["optimizer"] != "sgd"
                ]
                x = np.array([r["time"] for r in here])
                spread = np.abs(np.array([r["quartiles"] for r in here]).reshape(-1, 2).T - x)
                y = [labels.index(r["optimizer"]) + shift for r in here]
                ax.errorbar(
                    x, y, xerr=spread, fmt=marker, ms=4, lw=1, color=COLOURS[dtype], label=dtype
                )
            ax.axvline(1, color="black", lw=0.8, ls="--")
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(FixedLocator(TICKS))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.xaxis.set_minor_locator(NullLocator())
            first = ax is row[0]
            ax.set_yticks(range(1, len(labels)), labels[1:] if first else [""] * (len(labels) - 1))
            ax.set_ylim(len(labels) - 0.5, 0.5)
            ax.grid(axis="x", lw=0.3)
            if kind == kinds[0]:
                ax.set_title(name, fontsize=9)
        row[0].set_ylabel(TITLES[kind])
    figure.supxlabel("time / plain SGD (logarithmic; lines: quartiles)", fontsize=9)
    figure.suptitle(f"{device}, batch {batch}", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    contenders = list(KINDS["training"])[1:]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--optimizers", nargs="+", choices=contenders, default=contenders)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, default=128, help="examples, or tokens, of a step")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timing")
    parser.add_argument(
        "--limit", type=float, default=5.0, help="seconds for each, but for one round"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder")
    options = parser.parse_args(arguments)

    device, copy = versions("jax", "jaxlib", "optax"), bandwidth()
    print(
        f"{device}; batch {options.batch}; bytes, state and temporary memory over the parameters\n"
    )
    records: list[dict] = []
    cells = [(n, d, k) for n in options.networks for d in options.dtypes for k in options.kinds]
    for name, dtype, kind in tqdm(cells, "cells", disable=None):
        of_cell = list(measured(name, kind, dtype, options))
        records += of_cell
        size = of_cell[0]["parameters"] / 1e6
        tqdm.write(f"### {name}, {dtype} ({size:,.0f} MB): {TITLES[kind]}\n")
        tqdm.write(show(of_cell, copy) + "\n")
    for kind in options.kinds:
        print(f"### {TITLES[kind].capitalize()}: time / plain SGD, median [quartiles]\n")
        print(overview(records, kind) + "\n")
    options.output.mkdir(parents=True, exist_ok=True)
    packages = ("jax", "jaxlib", "optax")
    result = {
        "device": device,
        "versions": {package: version(package) for package in packages},
        "batch": options.batch,
        "copy_bytes_per_second": copy,
        "records": records,
    }
    (options.output / "step.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(records, options.output / "step.png", device, options.batch)
    print(f"Wrote {options.output}/step.json and step.png")


if __name__ == "__main__":
    main()
