"""What a step compiles to for accelerators that are not here: bytes, state and collectives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerators, hlo, scale

ROOT = Path(__file__).parents[2]
HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (whole: f32[256], part: f32[128]) -> f32[128] {
  %part = f32[128]{0} parameter(1)
  %whole = f32[256]{0} parameter(0)
  %slice = f32[128]{0} slice(%whole), slice={[128:256]}
  ROOT %both = f32[128]{0} add(%slice, %part)
}

%body (x: f32[128]) -> f32[128] {
  %x = f32[128]{0} parameter(0)
  ROOT %twice = f32[128]{0} add(%x, %x), metadata={op_name="jit(f)/add"}
}

%condition (y: f32[128]) -> pred[] {
  %y = f32[128]{0} parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: f32[256]) -> f32[128] {
  %p = f32[256]{0:T(256)} parameter(0), sharding={replicated}
  %copy-start = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[256]{0:T(256)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[256]{0}), f32[128]{0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:128]}
  %slice-done = f32[128]{0:S(1)} slice-done(%slice-start)
  %fusion = f32[128]{0:S(1)} fusion(%copy-done, %slice-done), kind=kLoop, calls=%fused
  %all-reduce-start = f32[128]{0} all-reduce-start(%fusion), replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done = f32[128]{0} all-reduce-done(%all-reduce-start)
  ROOT %loop = f32[128]{0} while(%all-reduce-done), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_reading_of_programs():
    program = hlo.read(HLO, "tpu")
    # Copy and slice read, the reduction writes, each turn of the loop reads and writes.
    assert program.nbytes == 1024 + 512 + 512 + 5 * (2 * 512 + 512)
    assert program.kernels == 4 + 5
    assert program.collectives == {hlo.Collective("all-reduce", "add", 512): 1}
    # Of a GPU all of this is device memory; of the copy the fusion reads a half.
    gpu = program.nbytes + 1024 + 512 + 3 * 512 + 512
    assert hlo.read(HLO, "cuda").nbytes == gpu
    with pytest.raises(ValueError, match="trips"):
        hlo.read(HLO.replace("known_trip_count", ""), "tpu")


def test_page_has_the_tables_of_its_command():
    page = (ROOT / "docs/scale.md").read_text()
    assert scale.model_table() in page
    programs = json.loads(scale.RESULTS.read_text())["programs"]
    assert scale.one_chip_table(programs) in page
    assert scale.check_table(programs) in page


@pytest.fixture(scope="module", params=accelerators.ACCELERATORS)
def programs(request, tmp_path_factory):
    """The small programs for one accelerator: by tree and optimizer."""
    if absent := accelerators.missing(request.param):
        pytest.skip(f"{', '.join(absent)} not installed, which make bench-compiled does")
    output = tmp_path_factory.mktemp("compiled") / "small.json"
    command = [sys.executable, "-m", "benchmarks.compiled", "--small", f"--output={output}"]
    # The suite compiles without optimization.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [*command, "--accelerators", request.param],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    programs = json.loads(output.read_text())["programs"]
    return {(program["tree"], program["optimizer"]): program for program in programs}


@pytest.mark.slow
def test_step_reads_the_kernel_once_more(programs):
    sgd, grapes = (programs["1024 x 1024", name] for name in ("sgd", "grapes + sgd"))
    assert sgd["bytes"] == 3 * sgd["parameters"]
    assert 4 <= grapes["bytes"] / grapes["parameters"] < 4.02
    assert grapes["state"] == 0


@pytest.mark.slow
def test_layers_share_their_reductions(programs):
    """Fan-in divided by 4, nodes by 2: the sums of all layers go at once, and so the maxima."""
    tree = "3 x (1024 x 1024, bias)"
    assert programs[tree, "sgd"]["collectives"] == []
    sums, maxima = 3 * 1024 // 2 * 4, 3 * 4
    assert programs[tree, "grapes + sgd"]["collectives"] == [
        {"name": "all-reduce", "reduction": "add", "nbytes": sums, "times": 1},
        {"name": "all-reduce", "reduction": "maximum", "nbytes": maxima, "times": 1},
    ]


@pytest.mark.slow
def test_collectives_are_those_of_the_cost_model(programs):
    expected = scale.cost(scale.SMALL, "both", 8)
    program = programs["transformer", "grapes + sgd"]
    assert {each["name"] for each in program["collectives"]} == {"all-reduce"}
    # One of sums and one of maxima for each axis of the mesh.
    assert sum(each["times"] for each in program["collectives"]) == 4
    assert scale.given(program, "add") == expected.sums
    assert scale.given(program, "maximum") == expected.maxima
    assert program["bytes"] < 1.02 * expected.grapes
