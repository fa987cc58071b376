"""Reports a run, or all runs of a folder: tables, verdicts and pictures, all from the files alone.

No conclusion is written by hand: what a sentence says is computed.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from grapes_experiments import figures, records
from grapes_experiments.cells import AUTHORS, Setup
from grapes_experiments.experiments import EXPERIMENTS
from grapes_experiments.records import BEST, SAME, TUNING, Record, Results
from grapes_experiments.statistics import (
    BETTER,
    CLAIM,
    COVERAGE,
    DIVERGED,
    FEW,
    FEWEST,
    FORGETTING,
    KINDS,
    LEVEL,
    NO,
    NONE,
    OPEN,
    RATES,
    RESAMPLES,
    SLOWNESS,
    WORDS,
    WORSE,
    YES,
    Claim,
    Comparison,
    Metric,
    at,
    claims,
    comparisons,
    counts,
    final,
    highest,
    is_grapes,
    metrics_of,
    missing,
    own_rates,
    panels,
)

# Pieces of Markdown.


def table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(
        [[str(cell) for cell in row] for row in rows],
        headers,
        tablefmt="github",
        disable_numparse=True,
    )


def several(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))


def spread(values: np.ndarray, digits: int = 2) -> str:
    """Mean and sample standard deviation over the seeds."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def measured(record: Record | None, of: Callable[[Record], np.ndarray], scale=100.0, digits=2):
    if record is None:
        return "not yet"
    if record.diverged.any():
        return f"diverged ({record.diverged.sum()} of {record.diverged.size})"
    return spread(scale * of(record), digits)


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"


# The head of a report.


SETUP = {
    "network": "{} network",
    "width": "width {}",
    "depth": "hidden layers {}",
    "bias": "biases {}",
    "keep": "dropout that keeps {}",
    "init": "initial weights {}",
    "optimizer": "optimizer {}",
    "rate": "common learning rate {}",
    "batch": "batch {}",
}
OF_DENSE = "bias", "keep", "init"  # other networks have their own


def network(setups: Sequence[Setup]) -> str:
    """One line: every field, with all the values it takes."""
    dense = all(setup.network == "dense" for setup in setups)
    values = {field: listed(vars(setup)[field] for setup in setups) for field in SETUP}
    values["bias"] = values["bias"].replace("False", "no").replace("True", "yes")
    texts = [t.format(values[f]) for f, t in SETUP.items() if dense or f not in OF_DENSE]
    return "the authors' set-up: " * (set(setups) == {AUTHORS}) + "; ".join(texts)


def at_the_edge(results: Results) -> list[str]:
    """Contenders that might do better still outside the grid."""
    tuned = {r.cell: r.rates for r in results.records if r.phase == TUNING}
    return [
        f"{cell.panel}: {cell.variant} ({rate:.3g})"
        for cell, rate in own_rates(results).items()
        if rate in (min(tuned[cell]), max(tuned[cell]))
    ]


def tuning(results: Results) -> str:
    plan, scale = results.plan, results.plan.scale
    if not plan.grid:
        return "not tuned: all are compared at the common rate alone"
    seeds = several(scale.tuning_seeds, "seed")
    epochs = several(scale.tuning_epochs, "epoch") + " of every task" * (plan.tasks > 1)
    edge = at_the_edge(results)
    tuned = len(own_rates(results))
    return (
        f"the common rate times {listed(plan.grid)}; the best of them for each contender is the one"
        " with the highest accuracy at the end on a sixth of the training set, held out"
        f" ({seeds}, {epochs}; a rate at which a seed diverged is out). The best rate lies on the"
        f" edge of the grid for {len(edge)} of {several(tuned, 'contender')}"
        + (f": {'; '.join(edge)}" if edge else "")
    )


def head(results: Results) -> str:
    plan, run = results.plan, results.runs[-1]
    scale = plan.scale
    tasks = f" of each of {plan.tasks} tasks" * (plan.tasks > 1)
    resumed = f"; resumed {several(len(results.runs) - 1, 'time')}" * (len(results.runs) > 1)
    lines = {
        "Command": f"`{run['command']}`{resumed}",
        "Data set": plan.dataset,
        "Set-up": network([cell.setup for cell in plan.cells]),
        "Seeds and epochs": ", ".join(
            [several(scale.seeds, "seed"), several(scale.epochs, "epoch") + tasks]
        ),
        "Learning rates": tuning(results),
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "Commit": f"`{run['commit']}`",
        "Device": run["device"],
    }
    if left := missing(results):
        lines["Not finished"] = (
            f"{len(left)} of {several(len(plan.cells), 'cell')} are missing, in whole or in part:"
            f" {listed(f'{cell.panel}: {cell.variant}' for cell in left)}"
        )
    return "\n".join(f"* **{name}**: {text}." for name, text in lines.items())


# Tables.


def accuracies(results: Results) -> str:
    phases = {phase: at(results, phase) for phase in RATES}
    rates, parts = own_rates(results), []
    for panel, cells in panels(results.plan.cells).items():
        rows = []
        for cell in cells:
            same, best = (phases[phase].get(cell) for phase in (SAME, BEST))
            row = [cell.variant, measured(same, final), measured(same, highest)]
            if results.plan.grid:
                rate = f"{rates[cell]:.3g}" if cell in rates else "not yet"
                row += [rate, measured(best, final), measured(best, highest)]
            rows.append(row)
        headers = ["variant", f"at {cells[0].setup.rate:g}: final", "best"]
        headers += ["own best rate", "there: final", "best"] * bool(results.plan.grid)
        parts.append(f"### {panel}\n\n{table(rows, headers)}")
    over = ", the mean over all tasks" if results.plan.tasks > 1 else ""
    note = (
        f"Test accuracy in %{over}, mean ± sample standard deviation"
        f" (n = {results.plan.scale.seeds} seeds)."
        " *Final* is after the last epoch. *Best* is the highest of all epochs, seed by seed: it"
        " is chosen on the test set, and so of interest only beside the final one."
    )
    return "\n\n".join(["## Accuracy", note, *parts])


def metric_table(results: Results, metric: Metric) -> str:
    rows = [
        [
            cell.panel,
            cell.variant,
            *(
                measured(at(results, phase).get(cell), metric.of, metric.scale, metric.digits)
                for phase in phases_of(results)
            ),
        ]
        for cell in results.plan.cells
    ]
    return table(rows, ["panel", "variant", *(RATES[phase] for phase in phases_of(results))])


def phases_of(results: Results) -> list[str]:
    return [SAME, BEST] if results.plan.grid else [SAME]


def slowness(results: Results) -> str:
    note = (
        "The slowness is fitted by least squares to each seed's learning curve,"
        " `accuracy(epoch) = a * epoch / (slowness + epoch)` from epoch 1, with `a` fixed to the"
        f" best accuracy of the {several(results.plan.scale.epochs, 'epoch')}. A small slowness is"
        " a fast learner, by its own `a`: beside one that ends higher, one that stays low may seem"
        " fast."
    )
    return f"## Slowness\n\n{note}\n\n{metric_table(results, SLOWNESS)}"


def forgetting(results: Results) -> str:
    note = (
        "The best accuracy on a task at the end of any task before the last, minus the accuracy at"
        " the very end, in points, averaged over all tasks but the last. The average accuracy over"
        " all tasks after the last one is *final* above."
    )
    return f"## Forgetting\n\n{note}\n\n{metric_table(results, FORGETTING)}"


def seconds(results: Results) -> str:
    rows = []
    for panel in panels(results.plan.cells):
        of_panel = [
            np.median(r.seconds) / r.diverged.size
            for r in results.records
            if r.cell.panel == panel and r.phase != TUNING and len(r.seconds)
        ]
        if of_panel:
            rows.append([panel, *(f"{f(of_panel):.2g}" for f in (np.min, np.median, np.max))])
    if not rows:
        return ""
    note = (
        "Of training alone, by the clock: the median over the epochs, for one seed where all train"
        " at once; least, median and most of the variants of a panel. Other work on the same"
        " machine is not excluded."
    )
    title = "## Seconds per epoch and seed"
    return f"{title}\n\n{note}\n\n{table(rows, ['panel', 'min', 'median', 'max'])}"


def memory(results: Results) -> str:
    rows = [
        [r.cell.panel, r.cell.variant, f"{r.parameter_bytes:,}", f"{r.state_bytes:,}"]
        for r in at(results, SAME).values()
    ]
    headers = "optimizer", "variant", "bytes of parameters", "bytes of optimizer state"
    note = "Of one network, in float32, at a constant learning rate."
    return f"## Memory\n\n{note}\n\n{table(rows, headers)}"


def memory_verdict(results: Results) -> str:
    trained = at(results, SAME)
    plain = {r.cell.panel: r for r in trained.values() if r.cell.variant == "plain"}
    extra = [
        r.state_bytes - plain[r.cell.panel].state_bytes
        for r in trained.values()
        if is_grapes(r.cell.variant) and r.cell.panel in plain
    ]
    if not extra:
        return "Nothing to compare yet."
    free = sum(more == 0 for more in extra)
    text = (
        f"In {free} of {len(extra)} combinations of an optimizer and a form of GRAPES, the state of"
        " the optimizer takes as many bytes as in plain training"
    )
    return text + ("." if free == len(extra) else f"; at most it takes {max(extra):+,} bytes.")


def factor_table(results: Results) -> str:
    rows = []
    for cell, record in at(results, SAME).items():
        if cell.variant in figures.OBSERVED and record.layers:
            for layer in record.layers[0]:
                first, last = (record.layers[i][layer] for i in (0, -1))
                rows.append(
                    [cell.setup.init, cell.variant, layer.removeprefix("params/")]
                    + [
                        f"{of[key]:.3f}"
                        for key in ("factor_mean", "factor_std")
                        for of in (first, last)
                    ]
                    + [f"{100 * of['at_lower_bound']:.1f}" for of in (first, last)]
                )
    if not rows:
        return ""
    headers = ["initial weights", "variant", "layer", "mean: start", "end"]
    headers += ["deviation: start", "end", "at the lower bound in %: start", "end"]
    note = (
        "Mean and standard deviation over the nodes of a layer, and the share of the nodes whose"
        " factor is the lower bound 1; means over the seeds, at the common rate. In plain training"
        " they are what GRAPES would use."
    )
    return f"## Factors\n\n{note}\n\n{table(rows, headers)}"


# Verdicts.


def cell_of(c: Comparison | None) -> list[str]:
    if c is None:
        return ["", ""]
    if c.word == DIVERGED:
        who = zip(("variant", "control"), c.diverged, strict=True)
        seeds = ", ".join(f"{name} {count} of {c.seeds}" for name, count in who if count)
        return ["", f"{DIVERGED} ({seeds})"]
    digits = c.metric.digits
    mean, low, high = (signed(x, digits) if np.isfinite(x) else "" for x in (c.mean, c.low, c.high))
    return [f"{mean} [{low}, {high}]" if low else mean, c.word]


def comparison_table(results: Results, metric: Metric, found: list[Comparison]) -> str:
    by_rate = {(c.panel, c.variant, c.kind, c.phase): c for c in found if c.metric == metric}
    names = {(c.panel, c.variant, c.kind): c.control for c in found if c.metric == metric}
    rows = [
        [key[0], key[1], control]
        + [text for phase in phases_of(results) for text in cell_of(by_rate.get((*key, phase)))]
        for key, control in names.items()
    ]
    headers = ["panel", "variant", "against"]
    for phase in phases_of(results):
        headers += [f"{RATES[phase]}: {metric.unit} [95 %]", "verdict"]
    lower = " (lower is better)" if metric.sign < 0 else ""
    return f"### Difference in {metric.name}, in {metric.unit}{lower}\n\n{table(rows, headers)}"


def count_table(counted: dict[tuple[str, str, str], Counter[str]]) -> str:
    words = [w for w in WORDS if w != FEW or any(c[FEW] for c in counted.values())]
    rows = [
        [metric, kind, RATES[phase], *(count[word] for word in words)]
        for (metric, kind, phase), count in counted.items()
    ]
    return table(rows, ["metric", "against", "rates", *words])


def chance(found: Iterable[Comparison]) -> str:
    """How many comparisons would differ where there is nothing to be seen."""
    tested = [c for c in found if c.word in (BETTER, NONE, WORSE)]
    if not tested:
        return f"No comparison has the {FEWEST} seeds that a verdict takes."
    differ = sum(c.word != NONE for c in tested)
    expected = sum(1 - COVERAGE.get(c.seeds, LEVEL) for c in tested)
    return (
        f"Of {several(len(tested), 'comparison')} with an interval, {differ} came out as better or"
        f" worse. Where there is no difference at all, about {1 - LEVEL:.0%} would"
        f" ({1 - COVERAGE[FEWEST]:.1%} with {FEWEST} seeds), that is {expected:.1f}; comparisons"
        " that share a run come out alike."
    ).replace("%", " %")


def claim_sentence(found: list[Claim]) -> str:
    holds = Counter(c.holds for c in found)
    metric = found[0].metric
    text = (
        f"In {metric.name}, GRAPES is better than all its controls in {holds[YES]} of"
        f" {several(len(found), 'case')} (panels x variants), and in {holds[NO]} it is not"
    )
    if holds[OPEN]:
        text += (
            f"; in {holds[OPEN]} it is not known, for a control is missing, not trained yet or"
            " diverged, or the seeds are too few"
        )
    return text + "."


def claim_table(found: list[Claim]) -> str:
    rows = [
        [
            *(c.panel, c.variant, c.metric.name),
            *(c.words.get(kind, "no comparison") for kind in KINDS),
            c.holds,
        ]
        for c in found
    ]
    against = [f"{kind}, {RATES[CLAIM[kind]]}" for kind in KINDS]
    return table(rows, ["panel", "variant", "metric", *against, "better than all"])


def short_verdict(results: Results, found: list[Comparison]) -> str:
    if not results.records:
        return "Nothing is trained yet."
    if results.plan.experiment == "memory":
        return memory_verdict(results)
    all_claims = claims(results, found)
    sentences = []
    for metric in metrics_of(results.plan.experiment):
        if of_metric := [c for c in all_claims if c.metric == metric]:
            sentences.append(claim_sentence(of_metric))
    return " ".join([*sentences, chance(found)])


def verdicts(results: Results, found: list[Comparison]) -> str:
    if not found:
        return ""
    size = f"{RESAMPLES:,} resamples, or all there are with up to 6 seeds"
    note = (
        "Each form of GRAPES against its controls, paired by the seed: the mean difference, its"
        " 95 % interval, and what follows. The interval is Hesterberg's expanded percentile"
        f" interval of the bootstrap ({size}). On normal data it was measured to hold the truth in"
        f" {100 * COVERAGE[5]:.1f} % of cases with 5 seeds, and in {100 * COVERAGE[10]:.1f} % with"
        " 10. The controls: plain training; every"
        " node with the mean factor of its layer; every node with its neighbour's factor."
    )
    if any(c.variant == "authors' DFA" for c in found):
        note += " The authors' form for DFA has none of its own: those of the local form stand in."
    parts = [comparison_table(results, m, found) for m in metrics_of(results.plan.experiment)]
    rule = (
        "GRAPES counts as better only if it is better than plain training, each at its own best"
        " rate, and than the mean factor and the neighbour's factor at the common rate."
    )
    return "\n\n".join(
        [
            "## Verdicts",
            note,
            *parts,
            "### How often",
            count_table(counts(found)),
            chance(found),
            "### Better than all controls",
            rule,
            claim_table(claims(results, found)),
        ]
    )


# A whole report.


# Of the experiments that have other tables than that of the accuracies.
PARTS: dict[str, tuple[Callable[[Results], str], ...]] = {
    "accuracy": (accuracies, slowness),
    "forgetting": (accuracies, forgetting),
    "memory": (memory,),
}


def pictures(results: Results, folder: Path) -> str:
    drawn = figures.draw(results, folder)
    texts = [f"![{text}]({name}.png)\n\n{text} ([SVG]({name}.svg))" for name, text in drawn.items()]
    note = "Where a picture has many curves of many epochs, it shows some of the epochs only."
    return "\n\n".join(["## Figures", note, *texts]) if texts else ""


def write(folder: Path) -> tuple[Results, list[Comparison]]:
    """Writes the report of one run beside its file."""
    results = records.read(folder)
    found = comparisons(results)
    experiment, trained = results.plan.experiment, bool(results.records)
    parts = [
        f"# {EXPERIMENTS[experiment].question}",
        f"**Verdict** (computed): {short_verdict(results, found)}",
        head(results),
    ]
    if trained:
        parts += [part(results) for part in PARTS.get(experiment, (accuracies,))]
        parts += [factor_table(results), verdicts(results, found)]
        parts += [pictures(results, folder), seconds(results)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    records.replace(folder / "report.md", text.encode())
    return results, found


# The index of several.


def outcome(found: Iterable[Comparison]) -> str:
    words = Counter(c.word for c in found)
    return ", ".join(f"{words[word]} {word}" for word in WORDS if words[word])


def index(reports: dict[str, tuple[Results, list[Comparison]]]) -> str:
    rows = []
    for name, (results, found) in reports.items():
        plan, left = results.plan, len(missing(results))
        came_out = memory_verdict(results) if plan.experiment == "memory" else outcome(found)
        rows.append(
            [
                f"[{name}]({name}/report.md)",
                EXPERIMENTS[plan.experiment].question,
                plan.dataset,
                plan.scale.seeds,
                plan.scale.epochs * plan.tasks,
                (came_out or "none yet") + f" ({several(left, 'cell')} missing)" * bool(left),
            ]
        )
    found = [c for _, of_run in reports.values() for c in of_run]
    parts = [
        "# Experiments",
        table(rows, ["run", "question", "data set", "seeds", "epochs", "verdicts"]),
    ]
    if found:
        parts += ["## Verdicts over all runs", count_table(counts(found)), chance(found)]
        all_claims = [c for results, of_run in reports.values() for c in claims(results, of_run)]
        for metric in dict.fromkeys(c.metric for c in all_claims):
            parts.append(claim_sentence([c for c in all_claims if c.metric == metric]))
    return "\n\n".join(parts) + "\n"


def report(out: Path) -> None:
    """Writes `report.md` beside the file of a run, or of every run below and then an index."""
    if (out / records.NAME).exists():
        write(out)
        print(f"Report: {out / 'report.md'}")
        return
    folders = sorted(path.parent for path in out.glob(f"*/{records.NAME}"))
    if not folders:
        raise FileNotFoundError(
            f"There is nothing to report in {out}: neither it nor a folder in it has {records.NAME}"
        )
    reports = {folder.name: write(folder) for folder in folders}
    records.replace(out / "README.md", index(reports).encode())
    print(f"Reports of {several(len(reports), 'run')}: {out / 'README.md'}")
