"""The test suite on the newest releases, on the oldest that pyproject.toml admits, and installed.

What follows `--` is for pytest: `nox -s floor -- -m "not slow"`.
"""

import os
import shutil
import tarfile
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
    packages = "--editable=.[equinox,haiku,examples,data]", "--group=test", "--group=experiments"
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


# What takes half of the time, or needs more packages, and tells nothing of an installation.
LEFT_OUT = [f"--ignore=tests/core/test_{name}.py" for name in ("sharding", "optax_suites")]


@nox.session(python="3.13")
def wheel(session: nox.Session) -> None:
    """The core as it is installed: from a wheel, which is built from the sdist.

    The tests are those of the sdist too, and nothing but the installed package is beside them.
    """
    folder = Path(session.create_tmp()).absolute()
    shutil.rmtree(folder)
    session.run("uv", "build", f"--out-dir={folder}", silent=True)
    (sdist,), (built,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked / "grapes_optax")

    with session.chdir(unpacked):
        session.install(built, "pytest")  # and no framework
        session.run("pytest", "tests/core/test_imports.py")
        session.install(f"{built}[flax,equinox,haiku]", "--group=test")
        session.run("pytest", "-n", "2", "tests/core", *LEFT_OUT, *session.posargs)
