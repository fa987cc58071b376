"""Runs the experiments of the paper with their controls, and reports what came out.

python -m examples.paper run accuracy --preset=smoke
python -m examples.paper report runs/paper/accuracy-digits-smoke
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

from examples.data import SETS, load
from examples.paper.cells import INITS, NETWORKS, OPTIMIZERS
from examples.paper.experiments import EXPERIMENTS, PRESETS, SAME_RUN, Choice, plan
from examples.paper.report import report
from examples.paper.run import run
from examples.paper.training import RULES

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
SETUP: dict[str, tuple[Callable[[str], Any], str]] = {
    "network": (one_of(NETWORKS), "instead of the experiment's own"),
    "init": (one_of(INITS), "initial weights of dense networks"),
    "width": (above(int, 0), "nodes of a hidden layer"),
    "depth": (above(int, 0), "hidden layers"),
    "keep": (above(float, 0, 1), "share of the nodes that dropout keeps"),
    "rate": (above(float, 0), "learning rate at which all are compared"),
    "batch": (above(int, 0), "images in a step"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report")
    runs = commands.add_parser("run", help="train", allow_abbrev=False)
    reports = commands.add_parser("report", help="tables, figures, verdicts", allow_abbrev=False)
    reports.add_argument("out", type=Path, help="folder of one run, or of several")

    listed = "; ".join(f"{name}: {e.question}" for name, e in EXPERIMENTS.items()) + f"; or {ALL}"
    names = [*EXPERIMENTS, *SAME_RUN, ALL]
    runs.add_argument("experiment", type=one_of(names), help=listed)
    options = []

    def option(name: str, **settings: Any) -> None:
        options.extend(runs.add_argument(name, **settings).option_strings)

    option("--preset", type=one_of(PRESETS), default="standard", help=", ".join(PRESETS))
    option("--dataset", type=one_of(SETS), default="digits", help=", ".join(SETS))
    option("--data", type=Path, help="folder of the other sets, as Parquet files")
    option("--download", action="store_true", help="from the Hugging Face hub, if need be")
    option("--out", type=Path, help=f"folder; {FOLDER}/EXPERIMENT-DATASET-PRESET by default")
    option("--seeds", type=above(int, 1), help="networks, trained at once, instead of the preset's")
    option("--epochs", type=above(int, 0), help="instead of the preset's")
    for name, known in ("--rules", RULES), ("--optimizers", OPTIMIZERS):
        option(name, nargs="+", type=one_of(known), default=tuple(known), metavar="NAME")
    option("--panels", nargs="+", default=(), metavar="NAME", help="of the experiment, not all")
    for name, (check, text) in SETUP.items():
        option(f"--{name}", type=check, help=text)
    option("--tensorboard", action="store_true", help="event files too; needs tensorboardX")
    option("--save-every", type=above(float, -1), default=60.0, help="seconds between checkpoints")

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
        ["python", "-m", "examples.paper", *shown, *["--data=FOLDER"] * bool(chosen.data)]
    )


def train(chosen: argparse.Namespace, command: str) -> None:
    every = chosen.experiment == ALL
    setup = {name: getattr(chosen, name) for name in SETUP if getattr(chosen, name) is not None}
    choice = Choice(chosen.rules, chosen.optimizers, chosen.panels)
    plans = [
        plan(name, chosen.preset, chosen.dataset, choice, chosen.seeds, chosen.epochs, **setup)
        for name in (EXPERIMENTS if every else [chosen.experiment])
    ]
    data = load(chosen.dataset, chosen.data, chosen.download)
    named = every or not chosen.out  # folders of their own
    out = chosen.out or FOLDER
    for wanted in plans:
        own = "-".join((wanted.experiment, wanted.dataset, wanted.preset))
        print(f"{wanted.experiment}: {EXPERIMENTS[wanted.experiment].question}", file=sys.stderr)
        folder = out / own if named else out
        with writing_to(folder):
            run(
                wanted,
                data,
                folder,
                command,
                save_every=chosen.save_every,
                tensorboard=chosen.tensorboard,
            )
    print(f"Done. Report it: python -m examples.paper report {out}")


def main(arguments: list[str]) -> None:
    chosen = parse(arguments)
    try:
        if chosen.command == "report":
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
