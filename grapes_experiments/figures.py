"""The pictures of a report: the baseline first, and curves that merge drawn as differences to it.

One format: PNG of few colours. Colours are told apart by those who see few of them; a form of
GRAPES has one, and each control a line style.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image

from grapes_experiments.cells import Cell
from grapes_experiments.records import Record, Results, choice, replace
from grapes_experiments.statistics import (
    BEST,
    COMMON,
    Estimate,
    chosen,
    curve,
    ends,
    paired,
    panels,
    phases_of,
    random_effects,
)
from grapes_experiments.variants import PLAIN, Variant

SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
}
COLUMNS = 3
COLORS = {  # of Okabe and Ito
    "plain": "#000000",
    "local": "#0072B2",
    "before": "#CC79A7",
    "propagated": "#E69F00",
    "outgoing": "#009E73",
}
STYLES: dict[str, Any] = {
    "": "-",
    "mean": (0, (5, 2)),
    "norm": (0, (5, 1.5, 1, 1.5)),
    "roll": (0, (3, 1, 1, 1, 1, 1)),
    "reverse": (0, (1.2, 1.2)),
    "permutation": (0, (8, 2)),
    "frozen": (0, (1, 3)),
    "rate": (0, (4, 3)),
}


def style(variant: Variant) -> dict[str, Any]:
    odd = not variant.clipped or variant.normalization != "max" or variant.through_time
    odd = odd and variant.form != "outgoing"
    return {
        "color": COLORS[variant.form],
        "linestyle": STYLES[variant.control],
        "lw": 1.9 if not variant.control else 1.3,
        "marker": "^" if odd else "",
        "ms": 3,
    }


def grid(count: int, wide: float = 3.0, high: float = 2.3) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    size = max(wide * columns, 5.6), high * rows + 1.1
    figure = Figure(size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def labelled(
    figure: Figure, axes: Sequence[Axes], x: str, y: str, variants: Sequence[Variant], title: str
) -> Figure:
    columns = min(len(axes), COLUMNS)
    for number, axis in enumerate(axes):
        axis.set_ylabel(y if number % columns == 0 else "")
        axis.set_xlabel(x if number + columns >= len(axes) else "")
    handles = {v.name: Line2D([], [], **style(v)) for v in variants}
    across = max(1, min(len(handles), int(figure.get_figwidth() // 2.3)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=across)
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())), fontsize=9)
    return figure


def variants_of(cells: Sequence[Cell]) -> list[Variant]:
    """Plain training first, then as the plan has them."""
    found = list(dict.fromkeys(cell.variant for cell in cells))
    return sorted(found, key=lambda variant: variant != PLAIN)


def scales(title: str, axes: Sequence[Axes]) -> str:
    """Says that the panels have scales of their own, where there are several."""
    return title + ("; the panels differ in scale" if len(axes) > 1 else "")


# Accuracy against the rate.


def against_rates(results: Results) -> Figure | None:
    """What chose the rates: the accuracy on what was held out, at every rate that was tried."""
    if not results.tuning:
        return None
    grouped = panels(results.tuning)
    figure, axes = grid(len(grouped))
    for axis, (panel, cells) in zip(axes, grouped.items(), strict=True):
        tops = []
        for cell in cells:
            record, found = results.tuning[cell], choice(results.tuning[cell])
            scores = 100 * record.accuracy[-1].mean(1)
            mean = scores.mean(1)
            axis.plot(record.rates, mean, **style(cell.variant))
            best = record.rates.index(found.rate)
            color = COLORS[cell.variant.form]
            axis.plot(found.rate, mean[best], "o", ms=4.5, mfc="white", color=color)
            tops.append(mean[best])
        axis.set_xscale("log")
        tried = sorted({rate for cell in cells for rate in results.tuning[cell].rates})
        axis.xaxis.set_major_locator(FixedLocator(tried[:: -(-len(tried) // 6)]))
        axis.xaxis.set_major_formatter("{x:.2g}")
        axis.xaxis.set_minor_locator(NullLocator())
        reach = max(3.0, 3 * (max(tops) - min(tops)))
        axis.set_ylim(max(0, min(tops) - reach), max(tops) + 0.1 * reach)
        axis.set_title(panel)
    title = "Mean over the tuning seeds; circle: the rate that was chosen"
    return labelled(
        figure,
        axes,
        "learning rate",
        "held-out accuracy (%)",
        variants_of(list(results.tuning)),
        scales(title, axes) + ", cut below",
    )


# Learning curves, as differences.


def band(axis: Axes, x: np.ndarray, differences: np.ndarray, variant: Variant) -> None:
    """The mean over the seeds, and its 95 % interval; differences (x, seeds)."""
    mean = differences.mean(1)
    axis.plot(x, mean, **style(variant))
    if differences.shape[1] > 1 and not variant.control:
        pairs = np.array([paired(d).interval() if d.std() else (d[0],) * 2 for d in differences])
        axis.fill_between(x, *pairs.T, color=COLORS[variant.form], alpha=0.16, lw=0)


def differences(results: Results, phase: str) -> Figure | None:
    """Test accuracy less that of plain training, epoch by epoch."""
    grouped = {}
    for panel, cells in panels(results.report).items():
        trained = {c: t for c in cells if (t := chosen(results, c, phase))}
        plain = next((t for c, t in trained.items() if c.variant == PLAIN), None)
        if plain and len(trained) > 1:
            grouped[panel] = plain.record, trained
    if not grouped or results.plan.scale.epochs < 2:
        return None
    figure, axes = grid(len(grouped))
    shown = []
    for axis, (panel, (plain, trained)) in zip(axes, grouped.items(), strict=True):
        rows = plain.epochs > 0
        axis.axhline(0, color="black", lw=1.6)
        for cell, (record, _) in trained.items():
            if cell.variant == PLAIN:
                continue
            shown.append(cell)
            if record.diverged.all():
                text = f"{cell.name}: {record.diverged.size}/{record.diverged.size} diverged"
                lines = len(axis.texts)
                axis.annotate(
                    text,
                    (0.03, 0.03 + 0.075 * lines),
                    xycoords="axes fraction",
                    fontsize=6.5,
                    color=COLORS[cell.variant.form],
                )
                continue
            band(axis, plain.epochs[rows], 100 * (curve(record) - curve(plain))[rows], cell.variant)
        axis.set_title(panel)
        if plain.epochs[-1] > 40:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
        limit_to_the_end(axis)
    rates = {COMMON: "at the common rate", BEST: "each at its own best rate"}[phase]
    title = f"Test accuracy less that of plain training (zero), {rates}; band: 95 % interval"
    variants = [PLAIN, *variants_of(shown)]
    y = "difference (points)"
    return labelled(figure, axes, "epoch", y, variants, scales(title, axes))


def limit_to_the_end(axis: Axes) -> None:
    """Leaves room for what is seen in most of the curve, not for the first epoch alone."""
    drawn = [np.ravel(np.asarray(line.get_ydata(), float)) for line in axis.get_lines()]
    values = [y for y in drawn if len(y) > 2]
    if values:
        low, high = np.quantile(np.concatenate(values), (0.01, 0.98))
        room = max(0.15, 0.35 * (high - low))
        axis.set_ylim(min(low, 0) - room, max(high, 0) + room)


# Depth and width.


def by_size(results: Results, field: str) -> Figure | None:
    """Difference to plain training of the same size."""
    phases = {COMMON: "at the common rate", BEST: "each at its own best rate"}
    shown = [phase for phase in phases_of(results) if results.report]
    figure, axes = grid(len(shown), 3.4)
    grouped = panels(results.report)
    drawn: list[Cell] = []
    for axis, phase in zip(axes, shown, strict=True):
        found: dict[Variant, list[tuple[int, float, float]]] = {}
        for cells in grouped.values():
            trained = {c: t for c in cells if (t := chosen(results, c, phase))}
            plain = next((t for c, t in trained.items() if c.variant == PLAIN), None)
            for cell, (record, _) in trained.items():
                if plain and cell.variant != PLAIN:
                    d = 100 * (curve(record)[-1] - curve(plain.record)[-1])
                    e = paired(d) if d.std() else Estimate(float(d.mean()), 0.0, 1)
                    reach = e.mean - e.interval()[0] if e.error else 0.0
                    point = getattr(cell.setup, field), e.mean, reach
                    found.setdefault(cell.variant, []).append(point)
                    drawn.append(cell)
        axis.axhline(0, color="black", lw=1.6)
        for number, (variant, points) in enumerate(found.items()):
            x, mean, reach = (
                np.array(column, float) for column in zip(*sorted(points), strict=True)
            )
            x = x * 1.03 ** (number - (len(found) - 1) / 2)  # or intervals would overlap
            axis.errorbar(x, mean, reach, elinewidth=0.8, capsize=1.5, **style(variant))
        sizes = sorted({getattr(cell.setup, field) for cell in results.report})
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_yscale("symlog", linthresh=1)
        axis.yaxis.set_major_locator(FixedLocator([-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(phases[phase])
    names = {"depth": "hidden layers", "width": "nodes of a hidden layer"}
    title = "Mean difference to plain training (the zero line), 95 % interval over the seeds"
    y = "final test accuracy,\ndifference (points)"
    return labelled(figure, axes, names[field], y, [PLAIN, *variants_of(drawn)], title)


# Forgetting.


def by_task(results: Results) -> Figure | None:
    """What is left of every task at the end, less what plain training has left."""
    shown = [phase for phase in phases_of(results) if results.report]
    figure, axes = grid(len(shown), 3.4)
    drawn: list[Cell] = []
    for axis, phase in zip(axes, shown, strict=True):
        trained = {c: t for c in results.report if (t := chosen(results, c, phase))}
        plain = next((t for c, t in trained.items() if c.variant == PLAIN), None)
        axis.axhline(0, color="black", lw=1.6)
        for cell, (record, _) in trained.items():
            if plain and cell.variant != PLAIN:
                left = 100 * (ends(record)[-1] - ends(plain.record)[-1])
                band(axis, np.arange(1, 1 + len(left)), left, cell.variant)
                drawn.append(cell)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title({COMMON: "at the common rate", BEST: "each at its own best rate"}[phase])
    title = "Test accuracy after the last task, less that of plain training (zero); band: 95 %"
    y = "difference (points)"
    variants = [PLAIN, *variants_of(drawn)]
    return labelled(figure, axes, "task", y, variants, scales(title, axes))


# Factors.


def factors(results: Results) -> Figure | None:
    """Before clipping, over the nodes of all seeds, before and after training with GRAPES."""
    found: list[tuple[str, str, dict[Variant, Record]]] = []
    for panel, cells in panels(results.report).items():
        seen = {c.variant: results.report[c] for c in cells if results.report[c].layers}
        seen = {v: r for v, r in seen.items() if not v.control and v.clipped}
        layers = next(iter(seen.values())).layers[0] if seen else {}
        for layer in layers:
            name = layer.removeprefix("params/").removesuffix("/kernel")
            found.append((f"{panel}: {name}", layer, seen))
    if not found:
        return None
    figure, axes = grid(len(found), high=1.7)
    edges = np.linspace(0, 2, 41)
    for axis, (title, layer, seen) in zip(axes, found, strict=True):
        first = next(iter(seen.values())).layers[0][layer]["histogram"]
        axis.stairs(100 * np.array(first) / sum(first), edges, fill=True, color="#c8c8c8")
        for variant, record in seen.items():
            count = np.array(record.layers[-1][layer]["histogram"], float)
            looks = {k: v for k, v in style(variant).items() if k in ("color", "linestyle")}
            axis.stairs(100 * count / max(count.sum(), 1), edges, lw=1.3, **looks)
        axis.axvline(1, color="black", lw=0.6, linestyle=":")
        axis.set(title=title, xlim=(0, 2), ylim=(0, None))
    variants = list(dict.fromkeys(v for *_, seen in found for v in seen))
    title = "Nodes of all seeds, grey before training, lines after it; left of 1 they are clipped"
    return labelled(figure, axes, "factor before clipping", "nodes (%)", variants, title)


# Over data sets.


def forest(effects: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """One block for each effect: the data sets, and all of them together."""
    rows = sum(len(by_set) + 2 for by_set in effects.values())
    with mpl.rc_context(SETTINGS):
        figure = Figure((6.8, 0.16 * rows + 0.7), layout="constrained")
        axis = figure.subplots()
        ticks, place = [], 0.0
        for name, by_set in effects.items():
            axis.text(
                0.0,
                place,
                name,
                transform=axis.get_yaxis_transform(),
                fontweight="bold",
                va="center",
            )
            every, _ = random_effects(list(by_set.values()))
            for label, estimate in [*by_set.items(), ("all", every)]:
                place += 1
                ticks.append((place, label))
                low, high = estimate.interval()
                last = label == "all"
                color = COLORS["propagated" if name.startswith("propagated") else "local"]
                axis.plot((low, high), (place, place), color="black" if last else color, lw=1.6)
                marker = {"marker": "D" if last else "o", "ms": 4.5 if last else 4}
                axis.plot(estimate.mean, place, color="black" if last else color, **marker)
            place += 1.2
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks([p for p, _ in ticks], [label for _, label in ticks])
        axis.set_ylim(place - 0.4, -0.8)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("final test accuracy, difference (points); right of zero GRAPES is better")
        axis.set_title("95 % intervals; diamond: random effects over the data sets")
        save(figure, path)


# Which pictures an experiment has.


class Picture(NamedTuple):
    name: str
    caption: str
    draw: Callable[[Results], Figure | None]


RATES = Picture("rates", "Held-out accuracy against the learning rate.", against_rates)
CURVES = Picture(
    "differences",
    "Learning curves at the common rate, less that of plain training.",
    partial(differences, phase=COMMON),
)
OWN_CURVES = Picture(
    "differences_best_rates",
    "Learning curves, each at its own best rate, less that of plain training.",
    partial(differences, phase=BEST),
)
FACTORS = Picture("factors", "Factors before clipping.", factors)
USUAL = RATES, CURVES, OWN_CURVES
PICTURES: dict[str, tuple[Picture, ...]] = {
    "length": (CURVES,),
    "rates": (CURVES,),
    "depth": (RATES, Picture("depth", "By depth.", partial(by_size, field="depth"))),
    "width": (RATES, Picture("width", "By width.", partial(by_size, field="width"))),
    "forgetting": (RATES, Picture("tasks", "What is left of each task.", by_task)),
    "memory": (),
    "distribution": (FACTORS, CURVES),
    "spread": (RATES, CURVES, FACTORS),
    "finetuning": (RATES, CURVES, FACTORS),
}


def save(figure: Figure, path: Path) -> None:
    """Of 64 colours: a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110, metadata={"Software": None})
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    replace(path.with_suffix(".png"), small.getvalue())


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draws what the experiment has, and returns the captions by the names of the files."""
    drawn = {}
    for name, caption, picture in PICTURES.get(results.plan.experiment, USUAL):
        with mpl.rc_context(SETTINGS):
            if figure := picture(results):
                save(figure, folder / name)
                drawn[name] = caption
    return drawn
