"""Reports a run, or all runs of a folder: tables, outcomes and pictures, all from the files alone.

No conclusion is written by hand: what a sentence says is computed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from grapes_experiments import figures, records
from grapes_experiments.cells import AUTHORS, Cell, Setup
from grapes_experiments.experiments import EXPERIMENTS
from grapes_experiments.records import Record, Results, choice
from grapes_experiments.statistics import (
    APART,
    BEST,
    BETTER,
    COMMON,
    DIVERGED,
    EDGE,
    EQUIVALENT,
    FEW,
    FEWEST,
    FINAL,
    IDENTICAL,
    MARGIN,
    MARGINS,
    NO,
    OPEN,
    OUTCOMES,
    SLOWNESS,
    UNKNOWN,
    WORSE,
    YES,
    Claim,
    Comparison,
    Estimate,
    Metric,
    Primary,
    chosen,
    claims,
    comparisons,
    counts,
    metrics_of,
    panels,
    phases_of,
    primary,
    random_effects,
)
from grapes_experiments.variants import CONTROLS, LOCAL, PROPAGATED

# Pieces of Markdown.


def table(rows: Iterable[Sequence[object]], headers: Sequence[str]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    return tabulate(cells, headers, tablefmt="github", disable_numparse=True)


def several(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values))


def signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def with_interval(estimate: Estimate, digits: int) -> str:
    low, high = (signed(x, digits) for x in estimate.interval())
    return f"{signed(estimate.mean, digits)} [{low}, {high}]"


def summed_up(results: Results, cell: Cell, phase: str, metric: Metric) -> str:
    """Mean and standard deviation over the seeds; how many diverged."""
    trained = chosen(results, cell, phase)
    if trained is None:
        return "not yet"
    values, lost = trained.values(metric), int(trained.record.diverged.sum())
    text = f"{values.mean():.{metric.digits}f}"
    text += f" ± {values.std(ddof=1):.{metric.digits}f}" * (len(values) > 1)
    return text + f" ({lost}/{len(values)} diverged)" * bool(lost)


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
    "before": "before the run {}",
}
OF_DENSE = "bias", "keep", "init"  # other networks have their own


def network(setups: Sequence[Setup]) -> str:
    """One line: every field, with all the values it takes."""
    dense = all(setup.network == "dense" for setup in setups)
    values = {field: listed(vars(setup)[field] for setup in setups) for field in SETUP}
    values["bias"] = values["bias"].replace("False", "no").replace("True", "yes")
    fields = [f for f in SETUP if values[f] and (dense or f not in OF_DENSE)]
    texts = [SETUP[f].format(values[f]) for f in fields]
    return "the authors' set-up: " * (set(setups) == {AUTHORS}) + "; ".join(texts)


def at_the_edge(results: Results) -> list[str]:
    found = {cell: choice(record) for cell, record in results.tuning.items()}
    return [f"{c.panel}: {c.name} ({f.rate:.3g})" for c, f in found.items() if not f.inside]


def tuning(results: Results) -> str:
    plan, scale = results.plan, results.plan.scale
    if not plan.grid:
        return "not tuned: all are compared at the common rate alone"
    edge = at_the_edge(results)
    return (
        f"the common rate times {listed(plan.grid)}, and two more at a time where the best of"
        " this variant lies on the edge, or that of another beyond it. The best is the one with the"
        " highest accuracy at the end, on a sixth of the training set that is held out, over"
        f" {several(scale.tuning_seeds, 'seed')} that the report does not use, after as many"
        " epochs. It lies on the edge for"
        f" {len(edge)} of {len(results.tuning)}" + f": {'; '.join(edge)}" * bool(edge)
    )


def head(results: Results) -> str:
    plan, runs = results.plan, results.runs
    scale, first = plan.scale, plan.first_seed
    tasks = f" of each of {plan.tasks} tasks" * (plan.tasks > 1)
    resumed = f"; resumed {several(len(runs) - 1, 'time')}" * (len(runs) > 1)
    before = f"; {several(scale.before, 'epoch')} of plain training before" * bool(scale.before)
    versions = {
        name: listed(run["versions"][name] for run in runs) for name in runs[-1]["versions"]
    }
    lines = {
        "Command": f"`{runs[-1]['command']}`{resumed}",
        "Data set": plan.dataset,
        "Set-up": network([cell.setup for cell in plan.cells]),
        "Seeds and epochs": f"seeds {first} to {first + scale.seeds - 1},"
        f" {several(scale.epochs, 'epoch')}{tasks}{before}",
        "Learning rates": tuning(results),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Commit": listed(f"`{run['commit']}`" for run in runs),
        "Device": listed(run["device"] for run in runs),
    }
    if left := results.missing:
        lines["Not finished"] = (
            f"{len(left)} of {several(len(plan.cells), 'cell')} are missing:"
            f" {listed(f'{cell.panel}: {cell.name}' for cell in left)}"
        )
    return "\n".join(f"* **{name}**: {text}." for name, text in lines.items())


# Tables.


def values(results: Results) -> str:
    """Every metric of every cell, and the rates that were chosen."""
    metrics, tuned = metrics_of(results), bool(results.plan.grid)
    parts = []
    for panel, cells in panels(results.plan.cells).items():
        headers, rows = ["variant"], []
        for metric in metrics:
            headers += [f"{metric.name}, {phase}" for phase in phases_of(results)]
        for cell in cells:
            row = [cell.name]
            row += [summed_up(results, cell, p, m) for m in metrics for p in phases_of(results)]
            if tuned and cell in results.tuning:
                found = choice(results.tuning[cell])
                shares = ", ".join(f"{r:.3g}: {s:.0%}" for r, s in found.shares.items() if s > 0.05)
                row += [f"{found.rate:.3g}" + " (edge)" * (not found.inside), shares]
            rows.append(row)
        headers += ["own best rate", "chosen by resamples"] * tuned
        parts.append(f"### {panel}\n\n{table(rows, headers)}")
    note = (
        "In % (slowness in epochs), mean ± sample standard deviation over"
        f" {several(results.plan.scale.seeds, 'seed')}, after the last epoch. A seed whose loss is"
        " no longer finite counts with the accuracy of chance; one that ends at the level of"
        " chance counts as diverged too."
    )
    return "\n\n".join(["## What came out", note, *parts])


def steps(results: Results) -> str:
    """Length of the updates of each kernel, relative to GRAPES of the same form."""
    rows, kernels = [], lengths_of(results)
    for cells in panels(results.plan.cells).values():
        trained = {c.variant: chosen(results, c, COMMON) for c in cells}
        lengths = {v: mean_steps(t.record) for v, t in trained.items() if t and t.record.steps}
        for variant, of in lengths.items():
            base = lengths.get(LOCAL if variant.form in ("local", "plain") else PROPAGATED)
            if base and variant not in (LOCAL, PROPAGATED):
                ratios = [ratio(of[k], base[k]) if k in of else "" for k in kernels]
                rows.append([cells[0].panel, variant.name, *ratios])
    if not rows:
        return ""
    names = [name.removeprefix("params/").removesuffix("/kernel") for name in kernels]
    headers = ["panel", "variant", *names]
    note = (
        "Mean length of the update of each kernel over the whole run at the common rate, divided by"
        " that of GRAPES: of the local form for plain training and the local controls, of the"
        " propagated one for its own."
    )
    return f"## Length of the steps\n\n{note}\n\n{table(rows, headers)}"


def ratio(length: float, base: float) -> str:
    return f"{length / base:.3f}" if np.isfinite(length / base) else "diverged"


def lengths_of(results: Results) -> list[str]:
    """From the input to the output."""
    names = {name for record in results.report.values() for name in record.steps}
    return sorted(names, key=lambda name: ("output" in name, name))


def mean_steps(record: Record) -> dict[str, float]:
    """Over the epochs in which a seed at least was finite."""
    lengths = {name: of[np.isfinite(of[:, 0]), 0] for name, of in record.steps.items()}
    return {name: float(of.mean()) if len(of) else np.nan for name, of in lengths.items()}


def factor_table(results: Results) -> str:
    rows = []
    for cell, record in results.report.items():
        if cell.variant.control == "" and record.layers:
            for layer, first in record.layers[0].items():
                last = record.layers[-1][layer]
                keys = "factor_mean", "factor_std"
                row = [f"{of[key]:.3f}" for key in keys for of in (first, last)]
                row += [f"{100 * of['at_lower_bound']:.1f}" for of in (first, last)]
                rows.append([cell.panel, cell.name, layer.removeprefix("params/"), *row])
    if not rows:
        return ""
    headers = ["panel", "variant", "layer", "mean: start", "end"]
    headers += ["deviation: start", "end", "at the lower bound in %: start", "end"]
    note = (
        "Mean and standard deviation over the nodes of a layer, and the share of the nodes whose"
        " factor is the lower bound 1, at the common rate. In plain training they are what GRAPES"
        " would use."
    )
    return f"## Factors\n\n{note}\n\n{table(rows, headers)}"


def memory(results: Results) -> str:
    rows = [
        [r.cell.panel, r.cell.name, f"{r.parameter_bytes:,}", f"{r.state_bytes:,}"]
        for r in results.report.values()
    ]
    headers = "optimizer", "variant", "bytes of parameters", "bytes of optimizer state"
    note = "Of one network, in float32, at a constant learning rate."
    return f"## Memory\n\n{note}\n\n{table(rows, headers)}"


# Outcomes.


def difference(c: Comparison | None) -> list[str]:
    if c is None:
        return ["", "", ""]
    lost = zip(("GRAPES", "control"), c.diverged, strict=True)
    note = ", ".join(f"{name} {count}/{c.seeds} diverged" for name, count in lost if count)
    word = c.outcome + f" ({note})" * bool(note and c.outcome != DIVERGED)
    if c.estimate is None:
        return ["", word, ""]
    digits = c.metric.digits
    return [with_interval(c.estimate, digits), word, f"{c.estimate.detectable:.{digits}f}"]


def comparison_table(results: Results, metric: Metric, found: list[Comparison]) -> str:
    by_phase = {(c.cell, c.control, c.phase): c for c in found if c.metric == metric}
    rows = []
    for cell, control in dict.fromkeys(key[:2] for key in by_phase):
        at = [by_phase.get((cell, control, phase)) for phase in phases_of(results)]
        texts = [text for c in at for text in difference(c)]
        rows.append([cell.panel, cell.name, control.name, *texts])
    headers = ["panel", "variant", "against"]
    for phase in phases_of(results):
        headers += [f"{phase}: {metric.unit} [95 %]", "outcome", "detectable"]
    lower = " (lower is better)" if metric.sign < 0 else ""
    return f"### Difference in {metric.name}, in {metric.unit}{lower}\n\n{table(rows, headers)}"


def count_table(counted: dict[tuple[str, str, str], Counter[str]]) -> str:
    words = [w for w in OUTCOMES if any(count[w] for count in counted.values())]
    names = {"plain": "plain", **CONTROLS}
    rows = [
        [metric, names[kind], phase, *(count[word] for word in words)]
        for (metric, kind, phase), count in counted.items()
    ]
    return table(rows, ["metric", "against", "rates", *words])


def primary_table(found: Sequence[Primary]) -> str:
    rows = [
        [
            *(c.cell.panel, c.cell.name, c.control.name, c.metric.name, c.phase, c.outcome),
            *(f"{p:.2g}", f"{adjusted:.2g}"),
        ]
        for c, p, adjusted in found
    ]
    return table(rows, ["panel", "variant", "against", "metric", "rates", "outcome", "p", "Holm"])


def claim_table(found: list[Claim]) -> str:
    rows = []
    for claim in found:
        against = f"{claim.plain.outcome} ({claim.plain.phase})" if claim.plain else "none"
        words = Counter(c.outcome for c in claim.controls)
        others = ", ".join(f"{count} {word}" for word, count in words.items()) or "none"
        row = [claim.cell.panel, claim.cell.name, claim.metric.name, against, others, claim.holds]
        rows.append(row)
    headers = ["panel", "variant", "metric", "against plain", "against the controls", "helps"]
    return table(rows, headers)


def claim_sentence(found: list[Claim]) -> str:
    holds = Counter(c.holds for c in found)
    return (
        f"In {found[0].metric.name}, GRAPES is better than plain training and than every control"
        f" in {holds[YES]} of {several(len(found), 'case')} (a variant in a panel); in {holds[NO]}"
        f" plain training or a control is as good or better, {holds[UNKNOWN]}"
        f" {'is' if holds[UNKNOWN] == 1 else 'are'} open."
    )


def memory_sentence(results: Results) -> str:
    plain = {r.cell.panel: r for r in results.report.values() if r.cell.variant.form == "plain"}
    extra = [
        r.state_bytes - plain[r.cell.panel].state_bytes
        for r in results.report.values()
        if r.cell.variant.is_grapes and r.cell.panel in plain
    ]
    if not extra:
        return "Nothing to compare yet."
    free = sum(more == 0 for more in extra)
    text = (
        f"In {free} of {len(extra)} combinations of an optimizer and a form of GRAPES, the state of"
        " the optimizer takes as many bytes as in plain training"
    )
    return text + ("." if free == len(extra) else f"; at most it takes {max(extra):+,} bytes.")


def verdict(results: Results, found: list[Comparison]) -> str:
    if not results.report:
        return "Nothing is trained yet."
    if results.plan.experiment == "memory":
        return memory_sentence(results)
    if results.plan.scale.seeds < FEWEST:
        seeds = several(results.plan.scale.seeds, "seed")
        return f"**Too few seeds**: {seeds}, and no outcome is told of fewer than {FEWEST}."
    by_metric: dict[Metric, list[Claim]] = {}
    for claim in claims(found):
        by_metric.setdefault(claim.metric, []).append(claim)
    sentences = [claim_sentence(of_metric) for of_metric in by_metric.values()]
    return " ".join(sentences) or "There is no form of GRAPES to compare."


def outcomes(results: Results, found: list[Comparison]) -> str:
    if not found:
        return ""
    margin = MARGINS.get(results.plan.dataset, MARGIN)
    note = (
        "Each form of GRAPES against plain training and against its controls, paired by the seed:"
        " mean difference, 95 % interval of Student's t, and outcome. *Better* and *worse*: the"
        f" interval is off zero. *Equivalent*: the 90 % interval lies within ± {margin:g} points, a"
        " tenth of the control's slowness (two one-sided tests at 5 %, margins written down before"
        " the runs); a difference that is better or worse may lie within the margin too."
        " *Inconclusive*: neither. *Detectable* is the difference that would have been seen with a"
        " probability of 80 %. At own best rates the variance of the choice of the rates is added,"
        " over the rates that resamples of the tuning seeds choose; where a best rate lies on the"
        " edge of those tried, or beyond those tried for the other, there is no outcome. No"
        " correction for the number of rows but in the primary ones."
    )
    parts = [comparison_table(results, m, found) for m in metrics_of(results)]
    parts += ["### How often", "Numbers that are those of the common rate again count once."]
    parts += [count_table(counts(found))]
    if first := primary(found):
        note_of = (
            "What the claim rests on: both forms against plain training at own best rates (at the"
            " common one where rates are not tuned), and against the mean factor and the equal step"
            " at the common rate. *Holm* is the p-value corrected for their number."
        )
        parts += ["### Primary comparisons", note_of, primary_table(first)]
    rule = (
        "*Yes* only if GRAPES is better than plain training, each at its own best rate, and than"
        " every control at the common rate; *no* if one of them is equivalent, identical or better;"
        " *open* otherwise: what is not seen refutes nothing."
    )
    parts += ["### Does it help?", rule, claim_table(claims(found))]
    return "\n\n".join(["## Outcomes", note, *parts])


# A whole report.


def pictures(results: Results, folder: Path) -> str:
    drawn = figures.draw(results, folder)
    texts = [f"![{text}]({name}.png)\n\n{text}" for name, text in drawn.items()]
    return "\n\n".join(["## Pictures", *texts]) if texts else ""


class Report(NamedTuple):
    results: Results
    found: list[Comparison]


def write(folder: Path) -> Report:
    """Writes the report of one run beside its file."""
    results = records.read(folder)
    found = comparisons(results)
    parts = [f"# {EXPERIMENTS[results.plan.experiment].question}", verdict(results, found)]
    parts += [head(results)]
    if results.plan.experiment == "memory":
        parts += [memory(results)]
    elif results.report:
        parts += [pictures(results, folder), outcomes(results, found), values(results)]
        parts += [steps(results), factor_table(results)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    records.replace(folder / "report.md", text.encode())
    return Report(results, found)


# The index of several: claims by data sets.


class Question(NamedTuple):
    """A claim of the paper, or a question of our own: where its answer is found."""

    text: str
    experiment: str
    panel: str | None = None  # None: all of them
    metric: str = FINAL.name  # one: differences in other units do not compare


CLAIMS = (
    Question("higher accuracy, backpropagation", "accuracy", "BP, sgd", FINAL.name),
    Question("faster, backpropagation", "accuracy", "BP, sgd", SLOWNESS.name),
    Question("after the paper's 200 epochs", "length", "BP, sgd", FINAL.name),
    Question("with feedback alignment", "accuracy", "FA, sgd", FINAL.name),
    Question("with direct feedback alignment", "accuracy", "DFA, sgd", FINAL.name),
    Question("with RMSprop", "accuracy", "BP, rmsprop"),
    Question("with Adam", "accuracy", "BP, adam"),
    Question("deeper networks: 8 layers", "depth", "depth 8"),
    Question("narrow networks: width 16", "width", "width 16"),
    Question("less forgetting", "forgetting", None, "forgetting"),
    Question("recurrent: LSTM", "recurrent", "LSTM"),
    Question("recurrent: GRU", "recurrent", "GRU"),
    Question("spiking: SNU", "spiking", "SNU"),
    Question("convolutional", "convolutional"),
    Question("weights 95 % pruned", "spread", "pruned 95 %"),
    Question("heavy-tailed weights", "spread", "heavy tails"),
    Question("fine-tuning, 80 % pruned", "finetuning", "pruned 80 %"),
    Question("fine-tuning, widened", "finetuning", "widened"),
    Question("fine-tuning, dead nodes", "finetuning", "dead nodes"),
    Question("transfer", "finetuning", "transferred"),
    Question("small rate: 0.003", "rates", "rate 0.003"),
)


SIGNS = {
    BETTER: "▲",
    EQUIVALENT: "=",
    IDENTICAL: "=",
    WORSE: "▼",
    OPEN: "?",
    DIVERGED: "×",
    EDGE: "–",
    APART: "–",
    FEW: "–",
}


SETS_CALLED = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "emnist": "EMNIST"}


def answers(question: Question, name: str, report: Report) -> str:
    """Of both forms: against plain training and the strongest control, at both rates."""
    lines = []
    for variant in (PROPAGATED, LOCAL):
        of = [
            c
            for c in report.found
            if c.cell.variant == variant
            and question.panel in (None, c.cell.panel)
            and question.metric == c.metric.name
        ]
        pairs = []
        for phase in phases_of(report.results):
            plain = [c for c in of if c.phase == phase and c.kind == "plain"]
            others = [c for c in of if c.phase == phase and c.kind not in ("plain", "rate")]
            pair = [*plain[:1], *([min(others, key=lead)] if others else [])]
            pairs.append("\N{NO-BREAK SPACE}".join(SIGNS[c.outcome] for c in pair))
        if any(pairs):
            signs = "\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}".join(pairs)
            lines.append(f"{variant.form}:\N{NO-BREAK SPACE}{signs}")
    return "<br>".join([*lines, f"[report]({name}/report.md)"]) if lines else ""


def lead(c: Comparison) -> float:
    """By how much GRAPES is better; of what has no estimate, nothing."""
    return c.metric.sign * c.estimate.mean if c.estimate else 0.0


def matrix(reports: dict[str, Report]) -> str:
    """Claims by data sets."""
    sets = list(dict.fromkeys(r.results.plan.dataset for r in reports.values()))
    rows = []
    for question in CLAIMS:
        row = [question.text]
        for dataset in sets:
            found = [
                answers(question, name, report)
                for name, report in reports.items()
                if (report.results.plan.experiment, report.results.plan.dataset)
                == (question.experiment, dataset)
            ]
            row.append("<br>".join(filter(None, found)))
        if any(row[1:]):
            rows.append(row)
    return table(rows, ["", *(SETS_CALLED.get(name, name) for name in sets)])


EFFECTS = {  # what the data sets are put together for: variant, control, rates
    "propagated against plain, common rate": (PROPAGATED, "plain", COMMON),
    "propagated against plain, own best rates": (PROPAGATED, "plain", BEST),
    "propagated against its mean factor, common rate": (PROPAGATED, "mean", COMMON),
    "propagated against its reversed factors, common rate": (PROPAGATED, "reverse", COMMON),
    "local against plain, common rate": (LOCAL, "plain", COMMON),
    "local against plain, own best rates": (LOCAL, "plain", BEST),
    "local against an equal step, common rate": (LOCAL, "norm", COMMON),
    "local against its reversed factors, common rate": (LOCAL, "reverse", COMMON),
}


def effects(reports: dict[str, Report]) -> dict[str, dict[str, Estimate]]:
    """Of the authors' set-up (backpropagation, SGD), by data set."""
    found: dict[str, dict[str, Estimate]] = {}
    for name, (variant, kind, phase) in EFFECTS.items():
        for report in reports.values():
            plan = report.results.plan
            for c in report.found:
                usual = plan.experiment == "accuracy" and c.cell.setup == AUTHORS
                same = (c.cell.rule, c.cell.variant, c.kind, c.phase) == (
                    "BP",
                    variant,
                    kind,
                    phase,
                )
                if usual and same and c.metric is FINAL and c.estimate:
                    found.setdefault(name, {})[plan.dataset] = c.estimate
    return {name: by_set for name, by_set in found.items() if len(by_set) > 1}


def effect_table(found: dict[str, dict[str, Estimate]]) -> str:
    rows = []
    for name, by_set in found.items():
        mean, between = random_effects(list(by_set.values()))
        rows.append([name, len(by_set), with_interval(mean, 2), f"{between:.2f}"])
    headers = ["", "data sets", "points [95 %]", "standard deviation between sets"]
    return table(rows, headers)


def outcome_counts(report: Report) -> str:
    words = Counter(c.outcome for c in report.found if not c.repeated)
    return ", ".join(f"{words[word]} {word}" for word in OUTCOMES if words[word])


def index(reports: dict[str, Report], folder: Path) -> str:
    rows = []
    for name, report in reports.items():
        plan, left = report.results.plan, len(report.results.missing)
        memory_run = plan.experiment == "memory"
        came_out = memory_sentence(report.results) if memory_run else outcome_counts(report)
        rows.append(
            [
                f"[{name}]({name}/report.md)",
                EXPERIMENTS[plan.experiment].question,
                plan.dataset,
                plan.scale.seeds,
                plan.scale.epochs * plan.tasks,
                (came_out or "none") + f" ({several(left, 'cell')} missing)" * bool(left),
            ]
        )
    parts = ["# Results"]
    if questions := matrix(reports):
        note = (
            "Claims by data sets. Of each form of GRAPES the outcome against plain training and"
            " against the strongest control, the one against which it does worst: first at the"
            " common learning rate, then, after the stroke, each at its own best one. ▲ better,"
            " = equivalent, ▼ worse, ? inconclusive, × both diverged, – no outcome (best rates on"
            " the edge of those tried or not tried for both, or too few seeds). An empty field was"
            " not run."
        )
        parts += [note, questions]
    if found := effects(reports):
        figures.forest(found, folder / "forest")
        note = (
            "Over data sets: backpropagation with SGD in the authors' set-up, random effects (Paule"
            " and Mandel; interval by Hartung and Knapp)."
        )
        text = "Effects by data set, and over all"
        parts += ["## Over data sets", note, effect_table(found), f"![{text}](forest.png)"]
    headers = ["run", "question", "data set", "seeds", "epochs", "outcomes"]
    parts += ["## Runs", table(rows, headers)]
    counted = counts(c for report in reports.values() for c in report.found)
    if counted:
        parts += ["## Outcomes over all runs", count_table(counted)]
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
    records.replace(out / "README.md", index(reports, out).encode())
    print(f"Reports of {several(len(reports), 'run')}: {out / 'README.md'}")
