"""What the sdist and the wheel hold: all that is needed, and no more."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_wheel_holds_the_package_alone(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA")))
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    sources = ROOT.glob("grapes_optax/**/*.py")
    assert package == {
        *(path.relative_to(ROOT).as_posix() for path in sources),
        "grapes_optax/py.typed",
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for extra in "flax", "equinox", "haiku":  # which the adapters name
        assert f"Provides-Extra: {extra}\n".encode() in metadata


def test_sdist_holds_what_builds_and_tests_the_package(built):
    (sdist,) = built.glob("*.tar.gz")
    assert sdist.stat().st_size < 1_500_000
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert names >= {
        *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"),
        *("pyproject.toml", "noxfile.py", "Makefile"),
        *("grapes_optax/py.typed", "docs/scale.md", "benchmarks/results/compiled.json"),
        *("tests/conftest.py", "tests/adapters/authors_updates.npz", "docs/figures/digits.png"),
    }
    folders = "grapes_optax", "tests", "examples", "benchmarks", "grapes_experiments"
    sources = {path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")}
    assert names >= {path.relative_to(ROOT).as_posix() for path in sources}
    assert not {name for name in names if name.startswith("docs/results/")}
    assert {name.split("/")[0] for name in names if "/" in name} == {*folders, "docs"}
