"""What an import of the package brings in, and says where a framework is absent."""

import subprocess
import sys

ADAPTERS = {"linen": "flax", "nnx": "flax", "equinox": "equinox", "haiku": "haiku"}


def output_of(code: str) -> str:
    """Of a new process, for this one has imported everything already."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def test_frameworks_are_imported_by_their_adapters_alone():
    """Neither they nor anything else that jax and optax have not imported."""
    found = output_of(
        "import sys, jax, optax; before = set(sys.modules); import grapes_optax;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(*new - sys.stdlib_module_names)"
    )
    assert "grapes_optax" in found.split()
    assert set(found.split()) <= {"grapes_optax", "jax"}  # jax.extend


ATTEMPTS = """
import importlib, sys
sys.modules.update(dict.fromkeys({absent}))
for name in {adapters}:
    for attempt in f"import grapes_optax.{{name}}", f"from grapes_optax import {{name}}":
        try:
            exec(attempt)
        except Exception as error:
            print(type(error).__name__, error, sep=": ")
"""


def test_adapter_without_its_framework_says_what_to_install():
    """Absent, or blocked here where they are installed."""
    code = ATTEMPTS.format(absent=[*ADAPTERS.values()], adapters=[*ADAPTERS])
    assert output_of(code).splitlines() == [
        f"ImportError: {framework} is not installed: pip install 'grapes-optax[{framework}]'"
        for framework in ADAPTERS.values()
        for _ in range(2)
    ]


def test_what_a_framework_lacks_itself_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "haiku.py").write_text("import what_haiku_needs")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    code = ATTEMPTS.format(absent=[], adapters=["haiku"])
    assert set(output_of(code).splitlines()) == {
        "ModuleNotFoundError: No module named 'what_haiku_needs'"
    }
