"""What a run's folder holds whatever happens: one writer, whole lines, clear messages."""

import json
import multiprocessing
import os

import pytest

from examples.paper import __main__ as paper
from examples.paper import records
from examples.paper.experiments import plan
from examples.paper.run import Folder


def numbers_of(path):
    return [line["kind"] for line in records.lines_of(path / records.NAME)]


def add_to(folder):
    folder.add({"kind": "run", "plan": records.as_json(folder.plan)})
    folder.add({"kind": "unit", "cell": 0, "phase": "same rate", "epochs": 1})
    folder.add({"kind": "epoch", "epoch": 0})


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
