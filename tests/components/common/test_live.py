"""The live folder: one pointer, whole at every instant; the lock; what is dropped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.common.artifacts import write_json
from components.common.live import Deployment, current, live_folder, locked, switch, tidy

ROOT = Path(__file__).resolve().parents[3]


def release(live: Path, version: str) -> Path:
    folder = live / "releases/ctr-ranker" / version
    (folder / "bento").mkdir(parents=True, exist_ok=True)
    (folder / "bento/bento.yaml").write_text(version)
    write_json(folder / "release.json", {"version": version})
    return folder


def store(live: Path, name: str) -> Path:
    folder = live / "stores" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "receipt.json").write_text(name)
    return folder


def serves(live: Path) -> tuple[str | None, str | None]:
    """What a server would open, by the unresolved paths."""
    files = (live / "current/bento/bento.yaml", live / "current/online/receipt.json")
    bento, online = (file.read_text() if file.exists() else None for file in files)
    return bento, online


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_switch_of_one_half_keeps_the_other(tmp_path: Path) -> None:
    assert current(tmp_path) is None
    with locked(tmp_path):
        one = switch(tmp_path, store=store(tmp_path, "a"), why="the first features")
        assert serves(tmp_path) == (None, "a") and one.version is None
        switch(tmp_path, release=release(tmp_path, "v0.0.1"), why="the first model", who="ann")
        assert serves(tmp_path) == ("v0.0.1", "a")
        three = switch(tmp_path, store=store(tmp_path, "b"), why="newer features")
    assert serves(tmp_path) == ("v0.0.1", "b")
    assert current(tmp_path) == three
    assert three == Deployment(
        folder=tmp_path / "deployed/3",
        release=tmp_path / "releases/ctr-ranker/v0.0.1",
        store=tmp_path / "stores/b",
        why="newer features",
        who=three.who,
        when=three.when,
    )
    assert (three.version, three.number) == ("v0.0.1", 3)
    said = json.loads((tmp_path / "current/deployment.json").read_text())
    assert said["release"] == "ctr-ranker/v0.0.1" and said["store"] == "b" and said["who"]
    assert str((tmp_path / "current").readlink()) == "deployed/3"  # the folder can be moved
    assert str((tmp_path / "current/bento").readlink()) == "../../releases/ctr-ranker/v0.0.1/bento"


def test_the_last_deployments_stay_with_their_parts(tmp_path: Path) -> None:
    dropped = []

    def drop(folder: Path) -> None:
        dropped.append(folder.name)
        (folder / "receipt.json").unlink()
        folder.rmdir()

    with locked(tmp_path):
        switch(tmp_path, release=release(tmp_path, "v0.0.1"), store=store(tmp_path, "a"), why="1")
        switch(tmp_path, store=store(tmp_path, "b"), why="2", drop=drop)
        store(tmp_path, "in the making")
        assert dropped == []
        switch(tmp_path, release=release(tmp_path, "v0.0.2"), why="3", drop=drop)  # still with b
        switch(tmp_path, store=store(tmp_path, "c"), why="4", drop=drop)
        assert dropped == ["a"] and names(tmp_path / "releases/ctr-ranker") == ["v0.0.2"]
        assert names(tmp_path / "deployed") == ["3", "4"]
        switch(tmp_path, release=release(tmp_path, "v0.0.1"), why="back", drop=drop)
    assert dropped == ["a", "b"]
    assert names(tmp_path / "stores") == ["c", "in the making"]
    assert names(tmp_path / "releases/ctr-ranker") == ["v0.0.1", "v0.0.2"]
    assert serves(tmp_path) == ("v0.0.1", "c")


def test_a_pointer_to_nothing_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("deployed/7")
    with pytest.raises(ValueError, match=r"deployed/7/deployment.json is gone; run `python -m components registry"):
        current(tmp_path)


def test_where_the_live_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLICKLOOP_LIVE", raising=False)
    assert live_folder() == tmp_path / ".live"
    monkeypatch.setenv("CLICKLOOP_LIVE", "/elsewhere")
    assert live_folder() == Path("/elsewhere")


WAITS = """
import sys
from pathlib import Path
from components.common.live import locked
with locked(Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_one_process_changes_it_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    first = start()
    assert first.stdout and first.stdout.readline() == "mine\n"
    second = start()
    assert second.stdout and second.stderr
    assert f"waiting for process {first.pid}, which changes it" in second.stderr.readline()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.stdout.readline() == "mine\n"
    second.communicate()
    assert second.returncode == 0
    with pytest.raises(AssertionError, match="within locked"):
        tidy(tmp_path)
    with locked(tmp_path), pytest.raises(AssertionError, match="already"), locked(tmp_path):
        pass


EVERY_INSTANT = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from components.common import artifacts, live as step
from tests.components.common.test_live import names, release, serves, store

live = Path(sys.argv[1]) / "live"
os.fsync = lambda _: None  # a kill loses nothing that the system has: the power may
traced = {step.__file__, artifacts.__file__, shutil.__file__}

def old():
    shutil.rmtree(live, ignore_errors=True)
    with step.locked(live):
        step.switch(live, release=release(live, "v0.0.1"), store=store(live, "a"), why="1")
        step.switch(live, release=release(live, "v0.0.2"), store=store(live, "b"), why="2")
    release(live, "v0.0.3"), store(live, "c")

def change():
    with step.locked(live):
        parts = {"release": live / "releases/ctr-ranker/v0.0.3", "store": live / "stores/c"}
        step.switch(live, **parts, why="3", keep=1)

for instant in itertools.count():
    old()
    if (child := os.fork()) == 0:
        lines = itertools.count()

        def trace(frame, event, argument):
            if frame.f_code.co_filename in traced:
                wanted = "call" if frame.f_code.co_filename == shutil.__file__ else "line"
                if event == wanted and next(lines) == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

        sys.settrace(trace)
        change()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    before, named = serves(live), step.current(live).version
    whole = all((folder / "release.json").exists() for folder in (live / "releases/ctr-ranker").glob("v*"))
    change()
    left = names(live), len(names(live / "deployed")), names(live / "stores"), names(live / "releases/ctr-ranker")
    print(instant, os.WIFSIGNALED(status), before, named, whole, serves(live), left, sep="|")
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_kill_at_any_instant_leaves_the_old_deployment_or_the_new_one(tmp_path: Path) -> None:
    """A process is killed at every line that switches and tidies, one line after the other."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY_INSTANT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    instants = [line.split("|") for line in done.stdout.splitlines()]
    assert len(instants) > 100 and [row[1] for row in instants] == ["True"] * (len(instants) - 1) + ["False"]
    assert {(before, named) for _, _, before, named, *_ in instants} == {
        ("('v0.0.2', 'b')", "v0.0.2"),
        ("('v0.0.3', 'c')", "v0.0.3"),
    }
    assert {whole for *_, whole, _, _ in instants} == {"True"}
    assert {after for *_, after, _ in instants} == {"('v0.0.3', 'c')"}
    assert {left for *_, left in instants} == {
        "(['current', 'deployed', 'lock', 'releases', 'stores'], 1, ['c'], ['v0.0.3'])"
    }
