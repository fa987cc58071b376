"""What the benchmarks of steps share: the clock, the line of versions and the tables."""

import math
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from tabulate import tabulate

Step = Callable[[], Any]  # takes one step, from where the last one ended; returns its results


def seconds(step: Step, times: int) -> float:
    """Seconds per step, over a burst of steps with one wait at its end."""
    out = None
    start = time.perf_counter()
    for _ in range(times):
        out = step()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def seconds_side_by_side(steps: Sequence[Step], rounds: int, limit: float = math.inf) -> np.ndarray:
    """Seconds per step, rounds x steps: in turn, so that a busy machine slows all alike.

    A step that has taken `limit` seconds sits out, and has NaN, from the second round on.
    """
    for step in steps:
        seconds(step, 1)  # compiles, and warms up
    # Bursts of 50 ms: the clock and the wait vanish, and rounds stay short.
    bursts = [max(1, round(0.05 / seconds(step, 1))) for step in steps]
    table = np.full((rounds, len(steps)), np.nan)
    for done in range(rounds):
        for i, (step, times) in enumerate(zip(steps, bursts, strict=True)):
            if not done or np.nansum(table[:, i]) * times < limit:
                table[done, i] = seconds(step, times)
    return table


def versions(*packages: str) -> str:
    listed = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{jax.default_backend()} ({jax.devices()[0].device_kind}), {listed}"


def markdown(columns: dict[str, list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    align = ("left", *["right"] * (len(columns) - 1))
    return tabulate(
        columns, headers="keys", tablefmt="github", disable_numparse=True, colalign=align
    )
