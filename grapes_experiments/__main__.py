"""Runs the experiments of the paper with their controls, and reports what came out.

python -m grapes_experiments run accuracy --preset=smoke
python -m grapes_experiments report runs/paper/accuracy-digits-smoke
python -m grapes_experiments shorten runs/paper/accuracy-digits-smoke docs/results/accuracy-digits
"""

import argparse
import contextlib
import difflib
import errno
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.data import SETS, Data, load
from grapes_experiments import records
from grapes_experiments.cells import INITS, NETWORKS, OPTIMIZERS
from grapes_experiments.changes import CHANGES
from grapes_experiments.experiments import EXPERIMENTS, PRESETS, SAME_RUN, Choice, Plan, plan
from grapes_experiments.report import report
from grapes_experiments.run import run
from grapes_experiments.variants import RULES

ALL = "all"
FOLDER = Path("runs/paper")


def near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f": did you mean {found[0]}?" if found else ""


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"there is no {name!r}{near(name, known)} (there are {', '.join(known)})"
            )
        return name

    return check


def above(kind: Callable[[str], Any], low: float, most: float = math.inf) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        value = kind(text)
        if not low < value <= most or math.isinf(value):
            limit = f" and at most {most}" * (most < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is not above {low}{limit}")
        return value

    check.__name__ = kind.__name__  # as argparse calls it where the text is no number
    return check


# Options that change the set-up of all cells: what checks them, and what they are.
OWN = " (default: the experiment's own)"
SETUP: dict[str, tuple[Callable[[str], Any], str]] = {
    "network": (one_of(NETWORKS), ", ".join(NETWORKS) + OWN),
    "init": (one_of(INITS), (", ".join(INITS) + OWN).replace("%", "%%")),
    "width": (above(int, 0), "nodes of a hidden layer"),
    "depth": (above(int, 0), "hidden layers"),
    "keep": (above(float, 0, 1), "share of the nodes that dropout keeps"),
    "rate": (above(float, 0), "learning rate at which all are compared"),
    "batch": (above(int, 0), "images in a step"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m grapes_experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    metavar = "run | report | shorten"
    commands = parser.add_subparsers(dest="command", required=True, metavar=metavar)
    runs = commands.add_parser("run", help="train", allow_abbrev=False)
    reports = commands.add_parser("report", help="tables, figures, verdicts", allow_abbrev=False)
    reports.add_argument("out", type=Path, help="folder of one run, or of several")
    short = commands.add_parser(
        "shorten", help="copy of what a report needs, a tenth of the lines", allow_abbrev=False
    )
    short.add_argument("run", type=Path, help="folder of one run")
    short.add_argument("out", type=Path, help="another folder")

    listed = "; ".join(f"{name}: {e.question}" for name, e in EXPERIMENTS.items()) + f"; or {ALL}"
    names = [*EXPERIMENTS, *SAME_RUN, ALL]
    runs.add_argument("experiment", type=one_of(names), help=listed)
    options = []

    def option(name: str, **settings: Any) -> None:
        options.extend(runs.add_argument(name, **settings).option_strings)

    def choices(known: Iterable[str], default: object = None) -> str:
        text = f" (default: {default})" if default else ""
        return ", ".join(known).replace("%", "%%") + text

    standard, digits = "standard", "digits"
    option("--preset", type=one_of(PRESETS), default=standard, help=choices(PRESETS, standard))
    option("--dataset", type=one_of(SETS), default=digits, help=choices(SETS, digits))
    option("--data", type=Path, help="folder of the other sets, as Parquet files")
    option("--download", action="store_true", help="from the Hugging Face hub, if need be")
    option("--out", type=Path, help=f"folder; {FOLDER}/EXPERIMENT-DATASET-PRESET by default")
    option("--seeds", type=above(int, 1), help="networks, trained at once, instead of the preset's")
    option("--epochs", type=above(int, 0), help="instead of the preset's")
    option("--first-seed", type=above(int, -1), default=0, help="of a replication (default: 0)")
    option("--untuned", action="store_true", help="at the common rate alone")
    for name, known in ("--rules", RULES), ("--optimizers", OPTIMIZERS):
        text = choices(known, "all")
        option(name, nargs="+", type=one_of(known), default=tuple(known), metavar="NAME", help=text)
    option("--panels", nargs="+", default=(), metavar="NAME", help="of the experiment, not all")
    for name, (check, text) in SETUP.items():
        option(f"--{name}", type=check, help=text)
    option("--tensorboard", action="store_true", help="event files too; needs tensorboardX")
    seconds = "seconds between checkpoints (default: 60)"
    option("--save-every", type=above(float, -1), default=60.0, help=seconds)

    chosen, unknown = parser.parse_known_args(arguments)
    for text in unknown:
        if text.startswith("-"):
            runs.error(f"there is no option {text}{near(text.split('=')[0], options)}")
    if unknown:
        runs.error(f"what is {unknown[0]!r}?")
    return chosen


def recorded(arguments: list[str], chosen: argparse.Namespace) -> str:
    """The command without its folders, which do not settle the numbers and are somebody's own."""
    folders = {"--data": chosen.data, "--out": chosen.out}
    values = {str(value) for value in folders.values()}
    shown = [a for a in arguments if a.split("=")[0] not in folders and a not in values]
    return shlex.join(
        ["python", "-m", "grapes_experiments", *shown, *["--data=FOLDER"] * bool(chosen.data)]
    )


def train(chosen: argparse.Namespace, command: str) -> None:
    every = chosen.experiment == ALL
    setup = {name: getattr(chosen, name) for name in SETUP if getattr(chosen, name) is not None}
    choice = Choice(chosen.rules, chosen.optimizers, chosen.panels)
    plans = [
        plan(
            name,
            chosen.preset,
            chosen.dataset,
            choice,
            chosen.seeds,
            chosen.epochs,
            chosen.first_seed,
            not chosen.untuned,
            **setup,
        )
        for name in (EXPERIMENTS if every else [chosen.experiment])
    ]
    data = load(chosen.dataset, chosen.data, chosen.download)
    source = source_of(plans, chosen)
    named = every or not chosen.out  # folders of their own
    out = chosen.out or FOLDER
    for wanted in plans:
        own = "-".join((wanted.experiment, wanted.dataset, wanted.preset))
        print(f"{wanted.experiment}: {EXPERIMENTS[wanted.experiment].question}", file=sys.stderr)
        folder = out / own if named else out
        with writing_to(folder):
            trained = run(
                wanted,
                data,
                folder,
                command,
                source=source,
                save_every=chosen.save_every,
                tensorboard=chosen.tensorboard,
            )
        if not trained:
            print(f"{folder} is complete: nothing was left to train.")
    print(f"Done. Report it: python -m grapes_experiments report {out}")


# What networks are trained on before they are transferred; permuted pixels where there is none.
SOURCES = {"fashion_mnist": "mnist", "mnist": "fashion_mnist", "emnist": "mnist"}


def source_of(plans: Iterable[Plan], chosen: argparse.Namespace) -> Data | None:
    changes = {cell.setup.before for wanted in plans for cell in wanted.cells}
    transferred = any(not CHANGES[name][1] for name in changes if name)
    if not transferred or chosen.dataset not in SOURCES:
        return None
    return load(SOURCES[chosen.dataset], chosen.data, chosen.download)


def shorten(folder: Path, out: Path) -> None:
    lines = records.lines_of(folder / records.NAME)
    tasks = records.read(folder).plan.tasks
    out.mkdir(parents=True, exist_ok=True)
    short = "".join(map(records.compact, records.shortened(lines, tasks)))
    records.replace(out / records.NAME, short.encode())


def main(arguments: list[str]) -> None:
    chosen = parse(arguments)
    try:
        if chosen.command == "shorten":
            with writing_to(chosen.out):
                shorten(chosen.run, chosen.out)
        elif chosen.command == "report":
            with writing_to(chosen.out):
                report(chosen.out)
        else:
            train(chosen, recorded(arguments, chosen))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on with it.")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))


FULL = "Make room and give the same command again: it goes on"
CLOSED = "Choose another folder"
# What the system refuses, and the way out.
REFUSALS = {
    errno.ENOSPC: f"the disk is full. {FULL}",
    errno.EDQUOT: f"your share of the disk is full. {FULL}",
    errno.EROFS: f"it can only be read. {CLOSED}",
    errno.EACCES: f"permission denied. {CLOSED}",
}


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Says in one line where the system refuses to write, which it does not tell itself."""
    try:
        yield
    except (OSError, ValueError) as error:
        for code, text in REFUSALS.items():
            # Orbax has no kind of its own for it, only the words of the system.
            if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
                raise OSError(f"{folder}: {text}") from error
        raise


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises too
    main(sys.argv[1:])
