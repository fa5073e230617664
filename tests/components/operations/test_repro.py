"""One stage under a real DVC: its locks, what it prints, and why it failed. The stages are small scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from components.common.causes import BusyError, StepError
from components.operations.repro import clear_stale, repro
from tests.conftest import environment

# python -m components NAME: a stage that notes its error as the real command line does.
STEP = """
import json, os, pathlib, signal, sys, time
name, *words = sys.argv[1:]
note = pathlib.Path(".scratch/stages", f"{name}.json")
note.parent.mkdir(parents=True, exist_ok=True)
kind = pathlib.Path("kind").read_text().strip()
pathlib.Path("begun").touch()
while os.environ.get("STEP_WAITS") and not pathlib.Path("go").exists():
    time.sleep(0.05)
if kind in ("65", "75"):
    note.write_text(json.dumps({"seconds": 1.0, "error": "ingest.until is wrong; write a time", "code": int(kind)}))
    sys.exit(1)
if kind == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "import":
    raise ModuleNotFoundError("No module named 'gone'")
if kind == "full":
    sys.exit("made: the disk is full (0 MiB free): No space left on device")
pathlib.Path("out").write_text(kind)
note.write_text(json.dumps({"seconds": 0.5}))
"""


ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    root = tmp_path / "project"
    (root / "components").mkdir(parents=True)
    (root / "components/__init__.py").touch()
    (root / "components/__main__.py").write_text(STEP)
    (root / "kind").write_text("good")
    (root / "dvc.yaml").write_text(
        "stages:\n  made:\n    cmd: python -m components made --output out\n    deps: [kind]\n    outs: [out]\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    shutil.copytree(ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    return root


def test_a_stage_runs_once_and_says_nothing_of_git(project: Path) -> None:
    said: list[str] = []
    first = repro(project, "made", said.append)
    assert (first.how, first.own) == ("ran", 0.5)
    assert (project / "out").read_text() == "good"
    assert said and not [line for line in said if "git" in line or "push" in line or "dvc.lock" in line or not line]
    assert repro(project, "made", said.append).how == "unchanged"
    (project / "out").unlink()
    (project / "dvc.lock").unlink()
    assert repro(project, "made", said.append).how == "cached"


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("65", ValueError, "made: ingest.until is wrong; write a time"),
        ("75", BusyError, "made: ingest.until is wrong; write a time"),
        ("killed", BusyError, "made: killed by SIGKILL; the system may have run out of memory"),
        ("import", StepError, "made: ModuleNotFoundError: No module named 'gone'"),
        ("full", BusyError, "made: the disk is full (0 MiB free): No space left on device"),
    ],
)
def test_the_reason_is_told_and_whether_to_try_again(project: Path, kind: str, error: type, reason: str) -> None:
    (project / "kind").write_text(kind)
    with pytest.raises(error) as raised:
        repro(project, "made", lambda line: None)
    assert type(raised.value) is error
    assert str(raised.value) == reason


def test_an_old_note_is_not_the_reason_of_a_new_failure(project: Path) -> None:
    (project / "kind").write_text("65")
    with pytest.raises(ValueError, match="write a time"):
        repro(project, "made", lambda line: None)
    (project / "kind").write_text("import")
    with pytest.raises(StepError, match="No module named 'gone'"):
        repro(project, "made", lambda line: None)


def in_background(project: Path, *words: str) -> subprocess.Popen[bytes]:
    """A command that runs the stage, once the stage has begun. It ends after the file `go` is there."""
    other = subprocess.Popen(
        [sys.executable, *words], cwd=project, start_new_session=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"STEP_WAITS": "yes", "PYTHONPATH": str(ROOT) if "-c" in words else ""},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (project / "begun").is_file():
        assert other.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return other


def test_a_stage_waits_for_a_dvc_that_works_on_the_same_paths(project: Path) -> None:
    """A person's own `dvc repro` there. DVC itself gives up after 5 s."""
    other, said = in_background(project, "-m", "dvc", "repro", "made"), list[str]()

    def say(line: str) -> None:
        said.append(line)
        if "waits for DVC's lock" in line:
            (project / "go").touch()

    outcome = repro(project, "made", say)
    assert other.wait() == 0
    assert outcome.how == "unchanged"
    assert any(f"made waits for DVC's lock: process {other.pid}" in line for line in said)


def test_what_a_killed_attempt_leaves_is_ended_told_and_made_again(project: Path) -> None:
    code = "from components.operations.repro import *; repro(Path(), 'made', print)"
    killed = in_background(project, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; {code}")
    (dvc, *_) = psutil.Process(killed.pid).children()
    (command,) = [one for one in dvc.children(True) if "components" in one.cmdline()]
    for one in (killed, dvc):
        one.send_signal(signal.SIGKILL)
    killed.wait()
    assert command.is_running()
    said: list[str] = []
    assert repro(project, "made", said.append).how == "ran"
    assert not command.is_running() or command.status() == psutil.STATUS_ZOMBIE
    assert any(f"process {command.pid} of an earlier attempt was still at work" in line for line in said)
    assert any(f"process {dvc.pid}" in line and "left a lock of DVC" in line for line in said)
    assert not json.loads((project / ".dvc/tmp/rwlock").read_text()).get("write")


def test_a_lock_whose_process_number_is_in_use_again_is_stale(project: Path) -> None:
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(exist_ok=True)
    mine = {"pid": os.getpid(), "cmd": "dvc repro"}
    lock.write_text(json.dumps({"write": {"/out": mine}, "read": {"/in": [mine]}}))
    assert clear_stale(project) == []  # this process was there before the lock, so the lock may be its own
    os.utime(lock, (0, 0))
    assert clear_stale(project) == [f"process {os.getpid()} (dvc repro) is gone, and left a lock of DVC: cleared"]
    assert json.loads(lock.read_text()) == {"read": {}, "write": {}}


def test_files_that_a_kill_cut_in_two_are_removed(project: Path) -> None:
    repro(project, "made", lambda line: None)
    (project / ".dvc/tmp/rwlock").write_text('{"write": {')
    whole = (project / "dvc.lock").read_text()
    (project / "dvc.lock").write_text(whole[: len(whole) // 2] + "[: ")
    said: list[str] = []
    assert repro(project, "made", said.append).how == "cached"
    assert sum("was not whole" in line for line in said) == 2
    assert (project / "dvc.lock").read_text() == whole


def test_a_second_attempt_beside_a_living_one_is_refused(project: Path) -> None:
    os.environ["STEP_WAITS"] = "yes"
    first = threading.Thread(target=repro, args=(project, "made", lambda line: None))
    first.start()
    try:
        while not (project / "begun").is_file():
            time.sleep(0.05)
        with pytest.raises(BusyError, match=rf"stage made \(process {os.getpid()}\) is at work"):
            repro(project, "made", lambda line: None)
    finally:
        (project / "go").touch()
        first.join()
