"""What users read: code in the pages runs, every public name is there, nothing private is used."""

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import grapes_optax
from benchmarks import spiking, step
from examples import digits

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADAPTERS = [
    importlib.import_module(f"grapes_optax.{name}")
    for name in ("linen", "nnx", "equinox", "haiku", "spiking")
]
PUBLIC = {
    f"{module.__name__}.{name}": thing
    for module in (grapes_optax, *ADAPTERS)
    for name, thing in vars(module).items()
    if not name.startswith("_") and (inspect.isclass(thing) or inspect.isroutine(thing))
}


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_of_frameworks")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_pages_runs(page, capsys):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(code, page.name, "exec"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for table in re.findall(r"```\n(path .*?)```", page.read_text(), re.S):
        for line in table.splitlines():
            assert line.split() in [["..."], *printed], f"{page.name}: {line}"


def test_blocks_are_of_a_kind_that_is_looked_at():
    """Code that Python runs, commands, tables or output without a language, and directives."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.M)[::2]
        plain = {fence for fence in fences if not fence.startswith("{")}
        assert plain <= {"python", "sh", "bibtex", ""}, page.name


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_of_frameworks")
def test_spiking_networks(capsys):
    few = ["--variants", "plain", spiking.THROUGH_TIME.name, "--rates", "1.0", "--layers", "1"]
    spiking.main(["--seeds=2", "--epochs=1", "--units", "SNU", "recurrent SNU", *few])
    units, rates = capsys.readouterr().out.split("\n\n")
    found = re.findall(r"^\| (plain|propagated GRAPES, through time) .* (\S+) ± ", units, re.M)
    assert all(10 < float(mean) < 100 for _, mean in found)
    assert [name for name, _ in found] == ["plain", spiking.THROUGH_TIME.name]
    assert len(rates.splitlines()) == 2 + 4


def arguments(thing):
    names = inspect.signature(thing).parameters
    return [name for name in names if not name.startswith("_") and name != "self"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented(name):
    """One line, arguments, errors, an example, the source; and it is in the reference."""
    thing, short = PUBLIC[name], name.split(".")[-1]
    text = inspect.getdoc(thing)
    summary, _, rest = text.partition("\n")
    assert summary.endswith((".", ":")) or not rest.strip(), summary
    assert ">>>" in text, "no example"
    module = name.split(".")[1]
    if module in FRAMEWORKS:  # the same names and docstrings in each
        module = "nnx"
    prefix = "grapes_optax." + (f"{module}." if name.count(".") == 2 else "")
    assert f":: {prefix}{short}\n" in (ROOT / "docs/api.md").read_text(), "not in docs/api.md"
    if not inspect.isclass(thing):
        section = text.partition("Args:")[2]
        assert all(f"{argument}:" in section for argument in arguments(thing)), "Args"
        assert "Returns:" in text
        assert "Raises:" in text
        assert "http" in text.partition("References:")[2], "no source"


FRAMEWORKS = "equinox", "haiku", "linen", "nnx"


def test_types_of_the_public_interface_say_something():
    for name, thing in PUBLIC.items():
        if inspect.isroutine(thing):
            signature = inspect.signature(thing)
            variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
            types = {
                p.name: p.annotation
                for p in signature.parameters.values()
                if p.kind not in variadic
            }
            types["return"] = signature.return_annotation
            vague = [x for x, kind in types.items() if kind in (Any, inspect.Parameter.empty)]
            assert not vague, f"{name}: {vague}"
            assert thing.__module__.startswith("grapes_optax"), name


def test_all_is_all():
    for name in grapes_optax.__all__:
        assert hasattr(grapes_optax, name)
    public = {name for name in vars(grapes_optax) if not name.startswith("_")}
    modules = {"equinox", "haiku", "linen", "nnx", "spiking"}  # where they were imported
    assert public - modules == set(grapes_optax.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", grapes_optax.__version__)


def test_table_of_the_demo_is_in_the_examples():
    text = (ROOT / "docs/examples.md").read_text().split("## The demo")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S.*?) +\| +[+-]?[\d.]+ ± ", text, re.M)
    pairs = (pair.split() for pair in digits.PAIRS)
    assert rows == [*digits.METHODS, *(f"{name} minus {other}" for name, other in pairs)]


def test_tables_of_the_steps_are_those_of_the_results():
    records = json.loads((ROOT / "benchmarks/results/step.json").read_text())["records"]
    page = (ROOT / "docs/scale.md").read_text()
    for kind in step.KINDS:
        assert step.overview(records, kind) in page


def test_every_example_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    examples = [path.stem for path in (ROOT / "examples").glob("*.py")]
    assert len(examples) > 10
    for name in {*examples} - {"__init__", "data"}:
        assert f"EXAMPLE={name}" in text or f"examples/{name}.py" in text, name


def test_tables_have_heads():
    for page in PAGES:
        for block in page.read_text().split("\n\n"):
            rows = block.strip().splitlines()
            if rows and rows[0].startswith("|"):
                assert len(rows) > 2, f"{page.name}: {rows[0]}"
                assert re.fullmatch(r"[|:\- ]+", rows[1]), f"{page.name}: {rows[0]}"


def test_every_target_of_make_is_in_its_help():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()
    assert set(re.findall(r"^([a-z-]+):.*## \S", text, re.M)) == set(phony)


def test_one_version():
    version = grapes_optax.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_links_lead_somewhere():
    links = {
        (page.parent / target).resolve(): page.name
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    }
    broken = {path: page for path, page in links.items() if not path.exists()}
    if not RESULTS.exists() and broken:
        assert all(path.is_relative_to(RESULTS) for path in broken), broken
        pytest.skip("docs/results is in the repository alone")
    assert not broken


def test_no_private_modules_of_dependencies():
    pattern = re.compile(r"^\s*(?:from|import)\s+(?!grapes_optax)(\w+(?:\.\w+)*\._\w+)", re.M)
    for source in [*ROOT.glob("grapes_optax/**/*.py"), *ROOT.glob("examples/**/*.py")]:
        assert not pattern.findall(source.read_text()), source
    assert pattern.findall("from optax._src import base")  # the ruler itself
