"""The steps of a day around its stages: worktree, settings, locks, tag. `test_night.py` runs a whole one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from components.common.causes import BROKEN, TRY_AGAIN, BusyError, StepError, exit_code
from components.operations import day as module
from components.operations import run, worktree
from components.operations.day import Day, RunConfig, closed, tagged
from components.operations.worktree import git
from tests.components.operations.kills import kill_at

if TYPE_CHECKING:
    from tests.conftest import Project

DAY = "2026-01-06"
CONFIG = {"promote": "auto", "wait_hours": 12, "keep_runs": 30, "keep_worktrees": 2}


@pytest.fixture(scope="module")
def project(new_project: Callable[[str], Project]) -> Project:
    return new_project("day")


@pytest.fixture(autouse=True)
def own_environment(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in project.env.items():
        monkeypatch.setenv(name, value)


def opened(project: Project, day: str = DAY) -> tuple[Day, list[str]]:
    one, said = Day.of(project.root, day), list[str]()
    module.open_(one, said.append)
    return one, said


def commit(day: Day, hashes: dict[str, str]) -> list[str]:
    """The commit and tag of a run whose stages wrote these outputs. A whole `close` is in test_night.py."""
    lock = {"made": {"cmd": "x", "outs": [{"path": path, "md5": value} for path, value in hashes.items()]}}
    (day.worktree / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lock}))
    own = json.loads((day.worktree / module.OPENED).read_text())
    facts = own | {"day": str(day), "verdict": "reject", "model": None, "hashes": hashes}
    said: list[str] = []
    module.commit(day, facts, said.append)
    assert tagged(day.root, day.tag) == facts
    return said


# ---- open ---------------------------------------------------------------------------------------------------------


def test_the_worktree_has_the_code_of_head_and_the_settings_of_the_work_tree(project: Project) -> None:
    raw = project.root / "raw"
    raw.mkdir()
    with (project.root / "components/__init__.py").open("a") as code:
        code.write("# not committed\n")
    project.set_params({"gate.min_auc": 0.25, "embed.fit": "raw"})
    day, said = opened(project)
    params = yaml.safe_load((day.worktree / "params.yaml").read_text())
    assert params["gate"]["min_auc"] == 0.25
    assert params["ingest"]["until"] == "2026-01-07T00:00:00+00:00"
    assert params["ingest"]["raw"] == "components/data/sources/simulator.py"  # git tracks it, so it is in the worktree
    assert (day.worktree / params["embed"]["fit"]).resolve() == raw
    assert "not committed" not in (day.worktree / "components/__init__.py").read_text()
    assert any("components/__init__.py" in line for line in said)
    assert json.loads((day.worktree / "champion.json").read_text()) == {"version": None}
    git(project.root, "checkout", "-q", ".")
    raw.rmdir()


def test_the_worktree_shares_cache_and_remote_and_writes_nothing_elsewhere(project: Project) -> None:
    day, _ = opened(project)
    for name, path in (("cache.dir", worktree.cache(project.root)), ("remote.local.url", project.root / ".dvc-remote")):
        command = ["python", "-m", "dvc", "config", name]
        said = subprocess.run(command, cwd=day.worktree, env=project.env, capture_output=True, text=True, check=True)
        assert Path(said.stdout.strip()) == path
    assert git(project.root, "status", "--porcelain") == ""


@pytest.mark.parametrize(("at", "when"), [("worktree add", "during"), ("worktree add", "after"), ("reset", "after")])
def test_an_open_that_was_killed_is_opened_again(project: Project, at: str, when: str) -> None:
    day = Day.of(project.root, "2026-02-01")
    if day.worktree.exists():
        git(project.root, "worktree", "remove", "--force", "--force", str(day.worktree))
    kill_at(project, at, "day", "open", str(day), when=when)
    module.open_(day, lambda line: None)
    assert git(day.worktree, "status", "--porcelain") == "M params.yaml"
    assert (day.worktree / module.OPENED).is_file()


def test_days_that_open_at_the_same_time_do_not_meet(project: Project) -> None:
    days = [Day.of(project.root, f"2026-04-0{n}") for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda day: module.open_(day, lambda line: None), days))
    for day in days:
        until = yaml.safe_load((day.worktree / "params.yaml").read_text())["ingest"]["until"]
        assert until == day.until.isoformat()
        assert git(day.worktree, "status", "--porcelain") == "M params.yaml"


def test_a_second_open_keeps_what_the_stages_made(project: Project) -> None:
    day, _ = opened(project)
    (day.worktree / "data").mkdir(exist_ok=True)
    (day.worktree / "data/kept").write_text("made by a stage")
    (day.worktree / "dvc.lock").write_text("schema: '2.0'\n")
    (day.worktree / "params.yaml").write_text("changed by hand")
    opened(project)
    assert (day.worktree / "data/kept").read_text() == "made by a stage"
    assert (day.worktree / "dvc.lock").read_text() == "schema: '2.0'\n"
    assert yaml.safe_load((day.worktree / "params.yaml").read_text())["ingest"]


# ---- close --------------------------------------------------------------------------------------------------------


def test_the_same_run_keeps_its_tag_and_another_one_moves_it(project: Project) -> None:
    day, _ = opened(project, "2026-03-01")
    commit(day, {"out": "one"})
    first = git(project.root, "rev-parse", day.tag)
    opened(project, "2026-03-01")
    assert any("the tag stays" in line for line in commit(day, {"out": "one"}))
    assert git(project.root, "rev-parse", day.tag) == first
    said = commit(day, {"out": "two"})
    assert git(project.root, "rev-parse", f"{day.tag}.1") == first
    assert tagged(project.root, f"{day.tag}.1")["hashes"] == {"out": "one"}
    assert any("changed files: dvc.lock; changed outputs: out" in line for line in said)
    assert set(git(project.root, "show", "--name-only", "--format=", f"{day.tag}^{{commit}}").splitlines()) == {
        "dvc.lock", "params.yaml"
    }  # fmt: skip
    assert git(project.root, "rev-parse", f"{day.tag}^{{commit}}^") == git(project.root, "rev-parse", "HEAD")


def test_a_server_without_a_name_for_git_closes_days_too(project: Project, monkeypatch) -> None:
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("EMAIL", "")
    day, _ = opened(project, "2026-03-02")
    commit(day, {"out": "one"})
    assert git(project.root, "log", "-1", "--format=%an", day.tag) == "clickloop"
    assert date(2026, 3, 2) in closed(project.root)


# ---- ready, locks, codes -------------------------------------------------------------------------------------------


def test_a_day_that_is_not_there_waits_then_fails_or_goes_on(project: Project) -> None:
    day = Day.of(project.root, DAY)
    assert module.ready(day, 0)  # the simulator has every day
    raw = project.root / "raw"
    (raw / "day=2026-01-05").mkdir(parents=True)
    (raw / "day=2026-01-05/clicks.csv").write_text("user_id,item_id,timestamp,label\n1,2,2026-01-05T10:00:00Z,1\n")
    events = {"path": "day=*/*.csv", "columns": {}, "categorical": [], "numeric": []}
    project.set_params({"ingest.source": "files", "ingest.raw": str(raw), "ingest.files.events": events})
    with pytest.raises(BusyError, match=f"there is no file of {DAY}"):
        module.ready(day, 11.9)
    with pytest.raises(ValueError, match=f"there is no file of {DAY}.*after 12 hours. Bring it") as raised:
        module.ready(day, 12)
    assert exit_code(raised.value) == BROKEN
    project.set_params({"ingest.missing_day": "go_on"})
    assert not module.ready(day, 12)
    (raw / f"day={DAY}").mkdir()
    (raw / f"day={DAY}/clicks.csv").touch()
    assert module.ready(day, 0)
    git(project.root, "checkout", "-q", "params.yaml")
    shutil.rmtree(raw)


def test_stages_share_the_day_and_every_other_step_has_it_alone(project: Project) -> None:
    day, other = Day.of(project.root, DAY), Day.of(project.root, "2026-01-07")
    busy = pytest.raises(BusyError, match=rf"{DAY}: stage \(process {os.getpid()}\) is at work")
    stage = {"what": "stage", "shared": True}
    with day.locked(**stage), day.locked(**stage), other.locked("run"), busy, day.locked("close"):
        pass
    with day.locked("run"), pytest.raises(BusyError), day.locked(**stage):
        pass


def test_a_second_run_of_a_day_is_refused_and_told_who_is_at_work(project: Project) -> None:
    with Day.of(project.root, DAY).locked("the first run"):
        said = project.python("-m", "components", "run", DAY, code=TRY_AGAIN)
    assert f"the first run (process {os.getpid()}) is at work" in said.splitlines()[-1]


def test_the_exit_code_tells_whether_to_try_again(project: Project) -> None:
    assert "write a date such as" in project.python("-m", "components", "day", "open", "yesterday", code=BROKEN)
    assert "day open 2026-05-05" in project.python(
        "-m", "components", "day", "stage", "2026-05-05", "gate", code=BROKEN
    )
    assert exit_code(StepError("?")) == 1
    assert exit_code(BusyError("locked")) == TRY_AGAIN
    error = ValueError("publish: Redis does not answer")
    error.__cause__ = ConnectionRefusedError("no Redis")
    assert exit_code(error) == TRY_AGAIN


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("promote", "yes", "write auto, ask or never"),
     ("keep_runs", 0, "at least 1"), ("wait_hours", -1, "at least 0")],
)  # fmt: skip
def test_a_wrong_setting_is_named(key: str, value: object, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} is .*{says}"):
        RunConfig(**(CONFIG | {key: value}))


def test_days_are_asked_for_in_one_way(project: Project) -> None:
    for words, says in (
        ({"name": DAY, "first": DAY, "last": DAY, "jobs": 1, "promote": None}, "give one DAY, or both"),
        ({"name": None, "first": DAY, "last": DAY, "jobs": 2, "promote": "auto"}, "use --jobs 1"),
        ({"name": None, "first": "2026-01-07", "last": DAY, "jobs": 1, "promote": None}, "give the older day first"),
    ):
        with pytest.raises(ValueError, match=says):
            run.run(project.root, **words)
    assert str(run.newest(project.root)) == DAY  # it ends at ingest.until of the tiny world
