"""The site: `make docs` writes it to docs/_build/html."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# The kernels of the notebooks are processes of their own.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import jax  # noqa: E402
import optax  # noqa: E402
from sphinx.util.typing import stringify_annotation  # noqa: E402

import grapes_optax  # noqa: E402

project = "grapes_optax"
author = "The grapes_optax authors"
copyright = "2026, the grapes_optax authors"
version = release = grapes_optax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "results/*/report.md.tmp"]
source_suffix = {".md": "myst-nb"}

html_theme = "furo"
html_title = f"grapes_optax {version}"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
templates_path = []

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

suppress_warnings = [
    "mystnb.unknown_mime_type",
]


def setup(app) -> None:
    """Links to files that are no pages lead to the repository; the explorer is drawn anew."""
    app.connect("builder-inited", explorer)
    app.connect("source-read", to_the_repository)
    app.connect("autodoc-process-signature", with_aliases)


ALIASES = {  # the widest first
    "WeightDimNumOrFn": grapes_optax.WeightDimNumOrFn,
    "Params": optax.Params,
    "ArrayLike": jax.typing.ArrayLike,
}
REPOSITORY = "https://github.com/grapes-optax/grapes-optax/blob/main/"
OUTSIDE = ("examples/", "benchmarks/", "tests/", "grapes_optax/", "LICENSE")


def to_the_repository(app, name: str, source: list[str]) -> None:
    import re

    for folder in OUTSIDE:
        source[0] = re.sub(rf"\]\((?:\.\./)+{folder}", f"]({REPOSITORY}{folder}", source[0])


def with_aliases(app, what, name, thing, options, signature, returns):
    """Unions under the names that they have in the code."""
    for alias, types in ALIASES.items():
        text = stringify_annotation(types, "smart")
        signature, returns = (s and s.replace(text, alias) for s in (signature, returns))
    return signature, returns


def explorer(app) -> None:
    from docs.explorer import write

    write(ROOT / "docs" / "results", Path(app.outdir) / "_static" / "explorer.html")
