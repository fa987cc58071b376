"""What a run's folder holds whatever happens: one writer, whole lines, clear messages."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from grapes_experiments import __main__ as paper
from grapes_experiments import records
from grapes_experiments.experiments import plan
from grapes_experiments.run import Folder


def numbers_of(path):
    return [line["kind"] for line in records.lines_of(path / records.NAME)]


def add_to(folder):
    folder.add({"kind": "run", "plan": records.as_json(folder.plan)})
    unit = {"cell": 0, "phase": "report", "rates": [0.1], "seeds": [0], "epochs": 1, "images": 9}
    folder.add({"kind": "unit", **unit})
    folder.add({"kind": "epoch", "epoch": 0, "correct": [[[1]]]})


def test_second_run_in_a_folder_is_refused_and_the_first_keeps_its_lines(tmp_path, capsys):
    wanted = plan("memory", "smoke")
    with Folder(tmp_path, wanted) as first:
        for _ in range(2):  # a refusal leaves the lock with the first
            with pytest.raises(SystemExit) as caught:
                paper.main(["run", "memory", "--preset=smoke", f"--out={tmp_path}"])
            assert "another run is writing here" in str(caught.value.code)
        add_to(first)
    assert numbers_of(tmp_path) == ["run", "unit", "epoch"]
    with Folder(tmp_path, wanted):  # the lock is free again
        pass


def hold(path, ready):
    folder = Folder(path, plan("memory", "smoke"))
    ready.set()
    multiprocessing.Event().wait()  # until it is killed
    folder.stream.close()


def test_lock_goes_with_its_process(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(120)
    with pytest.raises(OSError, match="another run is writing here"):
        Folder(tmp_path, plan("memory", "smoke"))
    process.kill()
    process.join()
    with Folder(tmp_path, plan("memory", "smoke")):
        pass


def test_lock_is_free_after_a_refusal_of_what_the_folder_holds(tmp_path):
    with Folder(tmp_path, plan("memory", "smoke")) as folder:
        add_to(folder)
    with pytest.raises(ValueError, match="holds another run"):
        Folder(tmp_path, plan("memory", "smoke", width=7))
    with Folder(tmp_path, plan("memory", "smoke")):
        pass


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "\x00\x00",
        "17",
        "[]",
        "null",
        '"run"',
        "{}",
        '{"kind":"other"}',
        '{"kind":["run"]}',
        '{"kind":"run"}',
        '{"kind":"unit","cell":0}',
        '{"kind":"epoch"}',
    ],
)
def test_damaged_line_is_named(line, tmp_path, capsys):
    file = tmp_path / records.NAME
    run_line = records.compact({"kind": "run", "plan": records.as_json(plan("memory", "smoke"))})
    file.write_text(f"{run_line}{line}\n{run_line}")
    before = file.read_bytes()
    for command in ["report", str(tmp_path)], ["run", "memory", f"--out={tmp_path}"]:
        with pytest.raises(SystemExit) as caught:
            paper.main(command)
        assert f"{file}, line 2: damaged" in str(caught.value.code)
    assert file.read_bytes() == before


def test_what_is_renamed_and_what_is_added_is_on_the_disk(tmp_path, monkeypatch):
    """Nothing bears the final name before its content is synchronised, nor does a line count."""
    called, fsync, rename = [], os.fsync, os.replace

    def synced(descriptor):
        called.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(draft, path):
        called.append("renamed")
        rename(draft, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    file = tmp_path / "folder" / records.NAME
    file.parent.mkdir()
    line = {"kind": "epoch", "epoch": 0}
    records.replace(file, records.compact(line).encode())
    assert called == ["epochs.tmp", "renamed", "folder"]
    assert json.loads(file.read_text()) == line
    with Folder(tmp_path / "other", plan("memory", "smoke")) as folder:
        called.clear()
        folder.add({"kind": "run", "plan": {}})
        assert called == [records.NAME]


@pytest.mark.parametrize("broken", [(shutil, "rmtree"), (ocp.CheckpointManager, "close")])
def test_lock_is_free_after_a_failure_to_close(broken, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(*broken, fail)
        with pytest.raises(OSError, match="Read-only"), Folder(tmp_path, plan("memory", "smoke")):
            pass
    with Folder(tmp_path, plan("memory", "smoke")):
        pass


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_file_is_whole_or_as_it_was(failing, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "report.md"
    records.replace(file, b"before")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        records.replace(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_report_that_cannot_be_written(code, tmp_path, monkeypatch):
    def fail(path, content):
        raise OSError(code, os.strerror(code))

    paper.main(["run", "memory", "--preset=smoke", f"--out={tmp_path}"])
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SystemExit) as caught:
        paper.main(["report", str(tmp_path)])
    assert str(caught.value.code).startswith(f"{tmp_path}: ")
    assert len(str(caught.value.code).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [records.NAME]


@pytest.fixture
def interruptible():
    """Whoever runs the tests in the background of a shell has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interruption_waits_for_the_end_of_a_save(tmp_path, monkeypatch, interruptible):
    """Also one that Orbax itself would meet: its own threads would wait for each other."""
    save, state = ocp.CheckpointManager.save, {"x": np.arange(3)}

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        return save(*arguments, **options)

    with Folder(tmp_path, plan("memory", "smoke")) as folder:
        add_to(folder)
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                folder.save(state)
        np.testing.assert_array_equal(folder.restored(state)["x"], state["x"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# A small run in processes of its own, disturbed.

SMALL = ["run", "depth", "--preset=smoke", "--panels=depth 1", "--epochs=12", "--save-every=0"]
forked = multiprocessing.get_context("forkserver")  # which imports once, and forks within moments
forked.set_forkserver_preload(["grapes_experiments.__main__"])


def first_cell(*arguments, **options):
    wanted = plan(*arguments, **options)
    return wanted._replace(cells=wanted.cells[:1])


def train(out, said=os.devnull):
    """The command, of one cell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in `interruptible`
    paper.plan = first_cell  # of this process
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    paper.main([*SMALL, f"--out={out}"])


def started(*arguments):
    process = forked.Process(target=train, args=arguments)
    process.start()
    return process


def numbers(out):
    """All lines but those of the commands, without the times."""
    lines = [line for line in records.lines_of(out / records.NAME) if line["kind"] != "run"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What the run ends with, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("undisturbed")
    imports = forked.Process()
    imports.start()
    imports.join()
    clock = time.monotonic()
    process = started(out)
    process.join()
    assert process.exitcode == 0
    assert numbers(out)
    return numbers(out), time.monotonic() - clock


@pytest.mark.slow
def test_killed_at_random_moments(undisturbed, tmp_path):
    """Started again until it ends; what ends early begins again in another folder."""
    expected, taken = undisturbed
    moments, kills, finished, longest = random.Random(0), 0, 0, 0
    while kills < 20 or not finished:
        out = tmp_path / str(finished)
        process = started(out)
        process.join(moments.uniform(0, taken) if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            lines = numbers(out) if out.exists() else []
            assert lines == expected[: len(lines)]
            longest = max(longest, len(lines))
        else:
            assert process.exitcode == 0
            assert numbers(out) == expected
            assert [path.name for path in out.iterdir()] == [records.NAME]
            finished += 1
    assert longest, "no kill has met a line"


@pytest.mark.slow
def test_interrupted_run_says_so_and_goes_on(undisturbed, tmp_path):
    expected, _ = undisturbed
    out, said = tmp_path / "out", tmp_path / "said"
    process = started(out, said)
    while process.exitcode is None and len(records.lines_of(out / records.NAME)) < 4:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1
    assert said.read_text().endswith("\nInterrupted. The same command goes on with it.\n")
    assert "Traceback" not in said.read_text()
    assert numbers(out) == expected[: len(numbers(out))] != expected
    started(out).join()
    assert numbers(out) == expected


def attempt(*arguments):
    try:
        paper.main([*arguments])
        print("done")
    except SystemExit as stop:
        print(stop.code)


def on_a_disk(disk):
    """In a process that has mounted it: fuller and fuller, made larger, then read-only."""

    def mounted(options):
        subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)

    out = Path(disk) / "out"
    paper.plan = first_cell
    for kib in 4, 8, 16, 64, 128, 256, 8192:
        mounted(f"size={kib}k")
        attempt(*SMALL, f"--out={out}")
        print(json.dumps(numbers(out) if out.exists() else []))
    report = ["report", str(out)]
    filler = Path(disk) / "filler"
    with filler.open("wb") as stream, contextlib.suppress(OSError):
        while stream.write(bytes(4096)):
            stream.flush()
    attempt(*report)
    print(*(path.name for path in out.iterdir()))
    filler.unlink()
    mounted("ro")
    attempt(*report)
    attempt(*SMALL, f"--out={out}")


@pytest.mark.slow
def test_full_and_read_only_disk(undisturbed, tmp_path):
    expected, _ = undisturbed
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    if subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    code = "from grapes_experiments.tests.test_robust import on_a_disk;"
    code += f" on_a_disk({str(tmp_path)!r})"
    command = [*alone, f'{mount} && exec "$@"', "sh", sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    *runs, full, names, report, again = (
        line for line in ran.stdout.splitlines() if not line.startswith(("Done.", "Report"))
    )
    no_room = f"{tmp_path}/out: the disk is full. Make room and give the same command again:"
    no_room += " it goes on"
    assert runs[:-2:2] == [no_room] * 6
    assert runs[-2] == "done"
    written = [json.loads(line) for line in runs[1::2]]
    assert all(lines == expected[: len(lines)] for lines in written)
    assert len({len(lines) for lines in written}) > 2  # it went on, in between
    assert written[-1] == expected
    assert full == no_room
    assert "tmp" not in names
    assert "report.md" not in names
    for message in report, again:
        assert message == f"{tmp_path}/out: it can only be read. Choose another folder"
