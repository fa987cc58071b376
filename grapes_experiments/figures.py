"""The pictures of a report, each as PNG and as SVG, the same to the byte for the same results."""

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from grapes_experiments.cells import Cell
from grapes_experiments.records import BEST, SAME, Record, Results, replace
from grapes_experiments.statistics import at, curve, ends, final, panels, slowness
from grapes_experiments.training import VARIANTS

# Colour, most of them by Okabe and Ito, and line style of every variant: what shares a colour with
# another differs in dashes.
LINES: dict[str, tuple[str, Any]] = {
    "plain": ("#000000", "-"),
    "local GRAPES": ("#0072B2", "-"),
    "local, mean factor": ("#E69F00", "--"),
    "local, neighbour's factor": ("#009E73", ":"),
    "propagated GRAPES": ("#D55E00", "-."),
    "propagated, mean factor": ("#CC79A7", (0, (4, 1, 1, 1, 1, 1))),
    "propagated, through time": ("#56B4E9", (0, (1, 3))),
    "local, not clipped": ("#56B4E9", (0, (7, 2))),
    "local, by the mean node": ("#0072B2", (0, (4, 1, 1, 1, 1, 1, 1, 1))),
    "local, before the optimizer": ("#56B4E9", (0, (5, 1, 1, 1))),
    "propagated, neighbour's factor": ("#8B3A62", (0, (3, 2))),
    "propagated, not clipped": ("#B8860B", (0, (8, 1, 2, 1))),
    "propagated, by the mean node": ("#D55E00", (0, (1, 1, 1, 4))),
    "authors' DFA": ("#56B4E9", (0, (6, 2, 1, 2, 1, 2))),
}
# Of bars, in place of the line style; of straight lines, for circles make large files.
HATCHES = {
    "local GRAPES": "//",
    "local, mean factor": "\\\\",
    "local, neighbour's factor": "xx",
    "propagated GRAPES": "--",
    "propagated, mean factor": "++",
    "propagated, neighbour's factor": "////",
    "propagated, not clipped": "||",
    "authors' DFA": "x-",
}
OBSERVED = "plain", "local GRAPES", "propagated GRAPES"
BAND = "Mean, and band of ± 1 standard deviation over seeds"
SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.hashsalt": "grapes",
    "svg.fonttype": "none",
    "hatch.linewidth": 0.6,
}
COLUMNS = 5
POINTS = 2000  # of all curves of a figure, so that an SVG stays small


# What pictures share.


def columns_for(count: int) -> int:
    """As few rows as there can be, all of about the same length."""
    return math.ceil(count / math.ceil(count / COLUMNS))


def grid(count: int, legend: int, width: float = 2.3, height: float = 2.1) -> tuple[Figure, Any]:
    """A figure with so many axes, at most five in a row, and room for the legend below."""
    columns = columns_for(count)
    rows = math.ceil(count / columns)
    size = max(4.6, 0.6 + width * columns), 0.8 + height * rows + 0.17 * math.ceil(legend / 2)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def variants_of(cells: Sequence[Cell]) -> list[str]:
    present = {cell.variant for cell in cells}
    return [variant for variant in VARIANTS if variant in present]


def legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    across = max(1, min(len(handles), int(figure.get_figwidth() // 2.1)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=across)


def noted(title: str, records: Iterable[Record]) -> str:
    return title + "; cross: a seed diverged" * any(r.diverged.any() for r in records)


def lines(variants: Sequence[str]) -> dict[str, Line2D]:
    return {v: Line2D([], [], color=LINES[v][0], linestyle=LINES[v][1], lw=1.6) for v in variants}


def log_errors(axis: Axes) -> None:
    """The error on a log axis, with as many ticks as there is room for."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1, 2, 5) if high / low > 8 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def thinned(length: int, curves: int) -> np.ndarray:
    """Which epochs are drawn: the first and the last always, and more of the early ones."""
    count = max(12, POINTS // curves)
    if length <= count:
        return np.arange(length)
    return np.unique(np.geomspace(1, length, count).round().astype(int)) - 1


def band(axes: Axes, x: np.ndarray, values: np.ndarray, variant: str, floor: float = 0) -> None:
    """Mean and standard deviation of values (x, seeds)."""
    color, style = LINES[variant]
    mean, deviation = values.mean(1), values.std(1, ddof=1) if values.shape[1] > 1 else 0
    low = np.maximum(mean - deviation, floor)
    high = np.maximum(mean + deviation, floor)
    axes.plot(x, np.maximum(mean, floor), lw=1.4, color=color, linestyle=style)
    few = thinned(len(x), POINTS // 12)
    axes.fill_between(x[few], low[few], high[few], color=color, alpha=0.12, lw=0)


def errors_of(record: Record) -> np.ndarray:
    return 100 - 100 * curve(record)


# Learning curves.


def learning_curves(results: Results, phase: str) -> Figure:
    records = at(results, phase)
    grouped = panels(records)
    variants = variants_of(list(records))
    figure, axes = grid(len(grouped), len(variants))
    for axis, (panel, cells) in zip(axes, grouped.items(), strict=True):
        for cell in cells:
            error = errors_of(records[cell])[1:]
            chosen = thinned(len(error), len(records))
            if records[cell].diverged.any():  # a band would hide all others
                error = error.mean(1, keepdims=True)
                axis.plot(len(error), error[-1], "x", color=LINES[cell.variant][0], ms=5)
            band(axis, 1 + chosen, error[chosen], cell.variant, floor=0.05)
        log_errors(axis)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
        axis.set_title(panel)
    title = noted(BAND, records.values())
    return labelled(figure, axes, "epoch", "test error (%)", lines(variants), title)


def labelled(
    figure: Figure, axes: Sequence[Axes], x: str, y: str, handles: Mapping[str, Any], title: str
) -> Figure:
    columns = columns_for(len(axes))
    for number, axis in enumerate(axes):
        axis.set_ylabel(y if number % columns == 0 else "")
        axis.set_xlabel(x if number + columns >= len(axes) else "")
    legend(figure, handles)
    figure.suptitle(title, fontsize=9)
    return figure


# Slowness.


def slowness_bars(results: Results) -> Figure:
    records = at(results, SAME)
    grouped, variants = panels(records), variants_of(list(records))
    figure, axes = grid(len(grouped), len(variants))
    for axis, (panel, cells) in zip(axes, grouped.items(), strict=True):
        for place, cell in enumerate(cells):
            color, record = LINES[cell.variant][0], records[cell]
            if record.diverged.any():
                mark(axis, place, color)
                continue
            values = slowness(record)
            deviation = values.std(ddof=1) if len(values) > 1 else 0
            axis.bar(place, values.mean(), 0.8, **filled(cell.variant))
            axis.errorbar(place, values.mean(), deviation, color="black", lw=1, capsize=2)
            dashes = place + np.array([[-0.3], [-0.12], [np.nan]]).repeat(len(values), 1)
            axis.plot(dashes.T.ravel(), values.repeat(3), lw=1, color="black")  # as one line
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axis.set(title=panel, xticks=[], xlim=(-0.7, len(cells) - 0.3), ylim=(0, None))
    handles = {v: Patch(**filled(v)) for v in variants}
    title = "Mean and standard deviation over seeds, and a dash for each seed"
    title = noted(title, records.values())
    return labelled(figure, axes, "", "slowness (epochs)", handles, title)


def filled(variant: str) -> dict[str, Any]:
    """Pale, so that points and hatches are seen."""
    color, hatch = LINES[variant][0], HATCHES.get(variant, "")
    pale = tuple(1 - 0.45 * (1 - part) for part in to_rgb(color))  # SVG hatches lack transparency
    return {"facecolor": pale, "edgecolor": color, "hatch": hatch, "lw": 0}


def mark(axis: Axes, x: float, color: str) -> None:
    """At the top of the axes: what diverged has no value."""
    axis.plot(x, 0.97, "x", color=color, ms=5, mew=1.5, transform=axis.get_xaxis_transform())


# Depth and width.


def both_rates(results: Results) -> tuple[dict[str, dict[Cell, Record]], list[str], Figure, Any]:
    """Axes for what was trained at the common rate, and for what was at own best ones."""
    phases = {SAME: "at the common learning rate", BEST: "each at its own best rate"}
    trained = {title: at(results, phase) for phase, title in phases.items()}
    trained = {title: records for title, records in trained.items() if records}
    variants = variants_of([cell for records in trained.values() for cell in records])
    return trained, variants, *grid(len(trained), len(variants), 3.2, 2.6)


def by_size(results: Results, field: str) -> Figure:
    trained, variants, figure, axes = both_rates(results)
    for axis, (title, records) in zip(axes, trained.items(), strict=True):
        sizes = sorted({vars(cell.setup)[field] for cell in records})
        axis.set_xscale("log", base=2)
        for number, variant in enumerate(variants):
            of = {vars(c.setup)[field]: r for c, r in records.items() if c.variant == variant}
            dodge = 1.025 ** (number - (len(variants) - 1) / 2)  # or error bars would overlap
            color, style = LINES[variant]
            x = [size for size in sizes if size in of and not of[size].diverged.any()]
            error = [100 - 100 * final(of[size]) for size in x]
            axis.errorbar(
                np.array(x) * dodge,
                [e.mean() for e in error],
                [e.std(ddof=1) if len(e) > 1 else 0 for e in error],
                color=color,
                linestyle=style,
                lw=1.4,
                elinewidth=0.8,
                capsize=1.5,
                marker="o",
                ms=2.5,
            )
            for size in of:
                if size not in x:
                    mark(axis, size * dodge**2, color)
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(0.08, 0.12)
        log_errors(axis)
        axis.set_title(title)
    names = {"depth": "hidden layers", "width": "nodes of a hidden layer"}
    every = [record for records in trained.values() for record in records.values()]
    title = noted("Mean ± 1 standard deviation over seeds", every)
    return labelled(figure, axes, names[field], "final test error (%)", lines(variants), title)


# Forgetting.

MATRICES = "plain", "local GRAPES", "local, mean factor", "propagated GRAPES"
MATRICES += ("propagated, mean factor",)


def matrices(results: Results) -> Figure | None:
    records = {c: r for c, r in at(results, SAME).items() if c.variant in MATRICES}
    if not records:
        return None
    columns = min(len(records), COLUMNS)
    figure = Figure((0.8 + 1.9 * columns, 2.6), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False).flat)
    for axis, (cell, record) in zip(axes, records.items(), strict=False):
        values = 100 * ends(record).mean(-1)
        shown = axis.imshow(values, cmap="cividis", vmin=0, vmax=100)
        for (row, column), value in np.ndenumerate(values):
            ink = "black" if value > 55 else "white"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink, size=7)
        tasks = range(len(values))
        names = [str(1 + task) for task in tasks]
        axis.set(title=cell.variant, xlabel="tested on task")
        axis.set(xticks=tasks, yticks=tasks, xticklabels=names, yticklabels=names)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        if axis is axes[-1]:
            figure.colorbar(shown, ax=axes, label="test accuracy (%)", shrink=0.8)
    axes[0].set_ylabel("after training on task")
    title = "Mean over seeds; right of the diagonal, tasks that are not learned yet"
    figure.suptitle(noted(title, records.values()), fontsize=9)
    return figure


def averages(results: Results) -> Figure:
    """The accuracy on the tasks so far, at the end of each."""
    trained, variants, figure, axes = both_rates(results)
    for axis, (title, records) in zip(axes, trained.items(), strict=True):
        for cell, record in records.items():
            values = 100 * ends(record)
            tasks = np.arange(1, 1 + len(values))
            seen = np.stack([values[task - 1, :task].mean(0) for task in tasks])
            band(axis, tasks, seen, cell.variant)
            if record.diverged.any():
                mark(axis, tasks[-1], LINES[cell.variant][0])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title)
    y = "test accuracy, tasks so far (%)"
    every = [record for records in trained.values() for record in records.values()]
    return labelled(figure, axes, "tasks learned", y, lines(variants), noted(BAND, every))


# Weights and factors.


def by_layer(results: Results) -> Iterator[tuple[str, str, dict[str, Record]]]:
    """Heading, name of the layer, and the records by their variant."""
    records = {c: r for c, r in at(results, SAME).items() if c.variant in OBSERVED and r.layers}
    grouped = panels(records)
    layers = list(dict.fromkeys(name for r in records.values() for name in r.layers[0]))
    for layer in layers:
        for panel, cells in grouped.items():
            short = layer.removeprefix("params/").removesuffix("/kernel")
            of = {c.variant: records[c] for c in cells if layer in records[c].layers[0]}
            yield f"{panel}: {short}", layer, of


def observed(
    results: Results,
    draw: Callable[[Axes, str, dict[str, Record]], None],
    x: str,
    y: str,
    title: str,
    handles: Mapping[str, Any] | None = None,
) -> Figure | None:
    found = list(by_layer(results))
    if not found:
        return None
    variants = [v for v in OBSERVED if any(v in records for *_, records in found)]
    shown = {**(handles or {}), **lines(variants)}
    figure, axes = grid(len(found), len(shown))
    for axis, (heading, layer, records) in zip(axes, found, strict=True):
        draw(axis, layer, records)
        axis.set_title(heading)
    return labelled(figure, axes, x, y, shown, title)


def draw_factors(axis: Axes, layer: str, records: dict[str, Record]) -> None:
    for variant, record in records.items():
        mean, deviation = (
            np.array([epoch[layer][key] for epoch in record.layers])
            for key in ("factor_mean", "factor_std")
        )
        color, style = LINES[variant]
        chosen = thinned(len(mean), POINTS // 20)
        axis.plot(chosen, mean[chosen], color=color, linestyle=style, lw=1.4)
        low, high = mean - deviation, mean + deviation
        axis.fill_between(chosen, low[chosen], high[chosen], color=color, alpha=0.12, lw=0)
    axis.set_ylim(0.95, 2.05)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))


def draw_histograms(axis: Axes, layer: str, records: dict[str, Record]) -> None:
    edges = np.linspace(0, 2, 41)

    def share(epoch: dict[str, Any]) -> np.ndarray:
        count = np.array(epoch[layer]["histogram"], float)
        return 100 * count / max(count.sum(), 1)

    first = next(iter(records.values())).layers[0]
    axis.stairs(share(first), edges, fill=True, color=BEFORE)
    for variant, record in records.items():
        color, style = LINES[variant]
        axis.stairs(share(record.layers[-1]), edges, color=color, linestyle=style, lw=1.2)
    axis.axvline(1, color="black", lw=0.6, linestyle=":")
    axis.set(xlim=(0, 2), ylim=(0, None))


BEFORE = "#c8c8c8"


def draw_incoming(axis: Axes, layer: str, records: dict[str, Record]) -> None:
    """Quantiles 0, 5, 25, 50, 75, 95 and 100 %, of which the outermost are left out."""
    for variant, record in records.items():
        quantiles = np.array([epoch[layer]["incoming"] for epoch in record.layers])
        color, style = LINES[variant]
        chosen = thinned(len(quantiles), POINTS // 20)
        for column, width in (1, 0.8), (3, 1.6), (5, 0.8):
            axis.plot(chosen, quantiles[chosen, column], color=color, linestyle=style, lw=width)
        middle = quantiles[chosen, 2], quantiles[chosen, 4]
        axis.fill_between(chosen, *middle, color=color, alpha=0.12, lw=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))


factors = partial(
    observed,
    draw=draw_factors,
    x="epoch",
    y="factor",
    title="Mean factor of the nodes, and band of ± 1 standard deviation over the nodes",
)
histograms = partial(
    observed,
    draw=draw_histograms,
    x="factor before clipping",
    y="nodes (%)",
    title="Nodes of all seeds; left of the dotted line, the factor is clipped to 1",
    handles={"before training": Patch(color=BEFORE)},
)
incoming = partial(
    observed,
    draw=draw_incoming,
    x="epoch",
    y="incoming weights / mean",
    title="Quantiles over the nodes: lines at 5, 50 and 95 %, band from 25 to 75 %",
)


# Which pictures an experiment has.


class Picture(NamedTuple):
    name: str
    caption: str
    draw: Callable[[Results], Figure | None]


CURVES = (
    Picture(
        "learning_curves",
        "Learning curves at the common learning rate.",
        partial(learning_curves, phase=SAME),
    ),
    Picture(
        "learning_curves_best_rates",
        "Learning curves, each at its own best learning rate.",
        partial(learning_curves, phase=BEST),
    ),
)
LAYERS = (
    Picture("factors", "The factors over training, at the common learning rate.", factors),
    Picture("histograms", "Factors before clipping, before and after training.", histograms),
    Picture("incoming", "Sum of the absolute incoming weights of the nodes.", incoming),
)
SIZE = "Final test error by {}: at the common learning rate, and at own best rates."
PICTURES: dict[str, tuple[Picture, ...]] = {
    "accuracy": (
        *CURVES,
        Picture("slowness", "Slowness at the common learning rate.", slowness_bars),
    ),
    "depth": (
        Picture("depth", SIZE.format("depth"), partial(by_size, field="depth")),
        *CURVES,
    ),
    "width": (
        Picture("width", SIZE.format("width"), partial(by_size, field="width")),
        *CURVES,
    ),
    "forgetting": (
        Picture("matrices", "Accuracy on each task after each task, common rate.", matrices),
        Picture("averages", "Average accuracy over the tasks learned so far.", averages),
    ),
    "memory": (),
    "distribution": (*CURVES, *LAYERS),
    "spread": (*CURVES, *LAYERS),
}


def smaller(svg: str) -> str:
    """Coordinates to a tenth of a point, without indents and what is so by default."""
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d)\d+", r"\1", d[0]), svg)
    svg = re.sub(r'(?<= )(x|y)="(-?\d+\.\d)\d*"', r'\1="\2"', svg)
    svg = re.sub(r"<!-- .*? -->|stroke-dashoffset: 0; |stroke-linejoin: miter; ?", "", svg)
    return re.sub(r"\n\s*", "\n", svg)


def save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    replace(path.with_suffix(".png"), picture.getvalue())
    figure.set_layout_engine("none")  # it is laid out
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    replace(path.with_suffix(".svg"), smaller(text.getvalue()).encode())


def draw(results: Results, folder: Path) -> dict[str, str]:
    """Draws what the experiment has, and returns the captions by the names of the files."""
    drawn = {}
    for name, caption, picture in PICTURES.get(results.plan.experiment, CURVES):
        phase = BEST if name.endswith("best_rates") else SAME
        if not at(results, phase):
            continue
        with mpl.rc_context(SETTINGS):
            if figure := picture(results):
                save(figure, folder / name)
                drawn[name] = caption
    return drawn
