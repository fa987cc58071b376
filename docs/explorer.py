"""Draws the committed results as one page to explore, which needs no other host."""

import textwrap
import warnings
from pathlib import Path

import altair as alt
import numpy as np

from grapes_experiments import records
from grapes_experiments.figures import COLORS
from grapes_experiments.records import Results
from grapes_experiments.statistics import (
    chosen,
    comparisons,
    curve,
    paired,
    panels,
    phases_of,
)
from grapes_experiments.variants import PLAIN

# The choice of results above what is chosen.
STYLE = """<style>
body { margin: 0 70px 0 8px; }  /* plots are as wide as the page: room for their axes */
.vega-embed { display: flex; flex-direction: column; font-family: sans-serif; }
form.vega-bindings { order: -1; margin-bottom: 1em; }
form.vega-bindings select { max-width: 100%; font-size: 1em; }
</style>"""


def curves(name: str, results: Results) -> list[dict]:
    """Accuracy by epoch, and what it is more than that of plain training, with 95 % intervals."""
    rows = []
    for panel, cells in panels(results.report).items():
        for phase in phases_of(results):
            trained = {c: t for c in cells if (t := chosen(results, c, phase))}
            plain = next((t.record for c, t in trained.items() if c.variant == PLAIN), None)
            for cell, (record, _) in trained.items():
                for row, epoch in enumerate(record.epochs):
                    if not epoch:  # untrained: its accuracy would set the scale
                        continue
                    values = 100 * curve(record)[row]
                    more = values - 100 * curve(plain)[row] if plain else values * np.nan
                    around = [interval(values), interval(more)]
                    rows.append(
                        {
                            "shown": f"{name}: {panel}, {phase}",
                            "variant": cell.name,
                            "epoch": int(epoch),
                            "rate": record.rates[0],
                            "accuracy": round(values.mean(), 3),
                            "low": around[0][0],
                            "high": around[0][1],
                            "more": None if np.isnan(more).any() else round(more.mean(), 3),
                            "more_low": around[1][0],
                            "more_high": around[1][1],
                        }
                    )
    return rows


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    if np.isnan(values).any():
        return None, None
    if len(values) < 2 or not values.std():
        return (round(values.mean(), 3),) * 2
    low, high = paired(values).interval()
    return round(low, 3), round(high, 3)


def differences(name: str, results: Results) -> list[dict]:
    """Every comparison of the report."""
    rows = []
    for c in comparisons(results):
        if c.estimate:
            low, high = c.estimate.interval()
            rows.append(
                {
                    "shown": f"{name}: {c.cell.panel}, {c.phase}",
                    "comparison": f"{c.cell.name} against {c.control.name}",
                    "metric": f"{c.metric.name} ({c.metric.unit})",
                    "difference": round(c.estimate.mean, 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "outcome": c.outcome,
                }
            )
    return rows


def write(folder: Path, page: Path) -> None:
    found = {
        path.parent.name: records.read(path.parent)
        for path in sorted(folder.glob(f"*/{records.NAME}"))
    }
    found = {name: r for name, r in found.items() if r.plan.scale.epochs and r.report}
    drawn = [row for name, r in found.items() for row in curves(name, r)]
    compared = [row for name, r in found.items() for row in differences(name, r)]
    command_of = {name: r.runs[-1]["command"] for name, r in found.items()}
    commands = [
        {"shown": shown, "command": "\n".join(textwrap.wrap(command_of[shown.split(": ")[0]], 48))}
        for shown in dict.fromkeys(row["shown"] for row in drawn)
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # parameters of the whole are told to each of its parts
        warnings.filterwarnings("ignore", "Automatically deduplicated selection parameter")
        whole = chart(drawn, compared, commands)
        html = whole.to_html(inline=True, embed_options={"actions": False})
    page.write_text(html.replace("</head>", f"{STYLE}</head>"))


def chart(drawn: list[dict], compared: list[dict], commands: list[dict]) -> alt.VConcatChart:
    options = sorted({row["shown"] for row in drawn})
    start = next((o for o in options if o.startswith("accuracy-mnist: BP")), options[0])
    select = alt.param(
        name="shown", value=start, bind=alt.binding_select(options=options, name="Results: ")
    )
    legend = alt.selection_point(name="variant", fields=["variant"], bind="legend")
    only = "datum.shown === shown"
    names = list(dict.fromkeys(row["variant"] for row in drawn))
    colors = [COLORS.get(name.split(",")[0].split()[0], "#000000") for name in names]
    dashes = [
        [1, 0] if "GRAPES" in name or name == "plain" else dash(number)
        for number, name in enumerate(names)
    ]
    palette = alt.Scale(domain=names, range=colors)
    key = alt.Legend(
        orient="bottom",
        columns=2,
        labelLimit=260,
        titleLimit=400,
        symbolType="stroke",
        symbolSize=500,
        symbolStrokeWidth=2,
        symbolOpacity=1,
        title="Click to single out, shift and click for more",
    )
    dashing = alt.Scale(domain=names, range=dashes)
    faint = alt.condition(legend, alt.value(1.0), alt.value(0.06))

    def lines(y: str, low: str, high: str, title: str, key: alt.Legend | None) -> alt.LayerChart:
        color = alt.Color("variant:N", scale=palette, legend=key)
        base = alt.Chart(alt.Data(values=drawn)).transform_filter(only)
        scale = alt.Scale(zero=False)
        tooltip = ["variant:N", "epoch:Q", "rate:Q", f"{y}:Q", f"{low}:Q", f"{high}:Q"]
        line = base.mark_line(point=alt.OverlayMarkDef(size=18)).encode(
            x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y(f"{y}:Q", title=title, scale=scale),
            color=color,
            strokeDash=alt.StrokeDash("variant:N", scale=dashing, legend=key),
            opacity=faint,
            tooltip=tooltip,
        )
        band = base.mark_area().encode(
            x="epoch:Q",
            y=alt.Y(f"{low}:Q", title=title, scale=scale),
            y2=f"{high}:Q",
            color=color,
            opacity=alt.condition(legend, alt.value(0.10), alt.value(0.0)),
        )
        return (band + line).properties(width="container", height=300)

    accuracy = lines("accuracy", "low", "high", "test accuracy (%), mean of the seeds", None)
    more = lines("more", "more_low", "more_high", "less that of plain training (points)", key)
    base = alt.Chart().encode(
        y=alt.Y("comparison:N", sort=None, axis=None),
        tooltip=["comparison:N", "metric:N", "difference:Q", "low:Q", "high:Q", "outcome:N"],
    )
    interval = base.mark_rule(strokeWidth=2).encode(
        x=alt.X("low:Q", title="difference, 95 % interval"),
        x2="high:Q",
        color=alt.Color(
            "outcome:N",
            scale=alt.Scale(
                domain=["better", "equivalent", "worse", "inconclusive"],
                range=["#009E73", "#0072B2", "#D55E00", "#999999"],
            ),
        ).legend(orient="bottom", columns=2),
    )
    middle = base.mark_point(filled=True, color="black", size=25).encode(x="difference:Q")
    label = base.mark_text(align="left", dy=-9, fontSize=10).encode(
        x=alt.value(2), text="comparison:N"
    )
    zero = alt.Chart().mark_rule(strokeDash=[2, 2]).encode(x=alt.datum(0))
    outcomes = (
        alt.layer(zero, interval, middle, label)
        .properties(width=300, height=alt.Step(30))
        .facet(row=alt.Row("metric:N", title=None), data=alt.Data(values=compared))
        .transform_filter(only)
        .resolve_scale(x="independent", y="independent")
    )
    command = (
        alt.Chart(alt.Data(values=commands))
        .transform_filter(only)
        .mark_text(align="left", baseline="top", font="monospace", lineBreak="\n", x=0, y=0)
        .encode(text="command:N")
        .properties(height=40, width="container")
    )
    return (
        alt.vconcat(command, accuracy, more, outcomes)
        .add_params(select, legend)
        .resolve_scale(color="independent", strokeDash="independent")
        .configure_view(stroke=None)
    )


def dash(number: int) -> list[int]:
    return [[6, 3], [2, 2], [6, 2, 2, 2], [1, 3], [8, 2], [4, 1]][number % 6]
