"""The test suite on the newest releases, and on the oldest that pyproject.toml admits.

What follows `--` is for pytest: `nox -s floor -- -m "not slow"`.
"""

import os
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

# pyenv keeps interpreters that are not selected out of the PATH.
pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
paths = [*map(str, pyenv.glob("versions/3.*/bin")), os.environ["PATH"]]
os.environ["PATH"] = os.pathsep.join(paths)


def run_tests(session: nox.Session, *options: str) -> None:
    """Install the packages with `options` of uv, and run pytest."""
    packages = "--editable=.[examples,data,tensorboard]", "--group=test"
    session.install(*options, *packages)
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python=["3.13", "3.12", "3.11"])
def newest(session: nox.Session) -> None:
    """The newest releases."""
    run_tests(session)


@nox.session(python="3.11")
def floor(session: nox.Session) -> None:
    """The oldest releases that pyproject.toml admits."""
    run_tests(session, "--resolution=lowest-direct")
